"""A call of the gradient operator on the device, its oracle and its yardsticks.

The oracle is `sla2.blockwise` in float64 on the same 16-bit tensors, O_s and lse: what the operator
should return for what it is given. The yardstick is the error that autograd through the
low-precision reference makes (see `compare`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case, Inputs
from compare import (
    BACKWARD_FACTOR,
    BACKWARD_REL_L2,
    check_backward,
    max_err,
    rel_l2,
    rounding_atol,
)
from gpu_tools import same_bits
from torch import Tensor

import sla2
from sla2 import blockwise, ops, ops_bwd, reference
from sla2.constants import BLOCK_Q

BRANCHES = ("both", "sparse", "linear")
NAMES = ("dq", "dk", "dv", "dalpha")
Grads = tuple[Tensor, ...]


@dataclass
class Problem:
    """The operands of one backward call, in the layout of `case`."""

    case: Case
    branch: str
    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out_sparse: Tensor
    lse: Tensor
    dense: Tensor
    lut: Tensor
    counts: Tensor
    alpha_logit: Tensor | None
    scale: float
    smooth_k: bool = True
    phi_input: str = "smoothed"

    def run(self, **replaced: Any) -> Grads:
        """Through the operator; gradients in the layout."""
        x = {**self.__dict__, **replaced}
        grads: Grads = ops_bwd.attn_bwd(
            x["grad_out"], x["q"], x["k"], x["v"], x["out_sparse"], x["lse"], x["lut"], x["counts"],
            x["alpha_logit"], x["scale"], x["branch"], x["smooth_k"], x["phi_input"],
            self.case.layout,
        )  # fmt: skip
        return grads if self.branch == "both" else grads[:3]

    def exact(self) -> Grads:
        """The same call in float64."""

        def wide(x: Tensor) -> Tensor:
            return ops.bnhd(x, self.case.layout).double()

        saved = wide(self.out_sparse) if self.branch != "linear" else self.out_sparse
        grads = blockwise.attn_bwd(
            wide(self.grad_out), wide(self.q), wide(self.k), wide(self.v), saved,
            self.lse.double(), self.lut, self.counts,
            None if self.alpha_logit is None else self.alpha_logit.double(), scale=self.scale,
            branch=self.branch, smooth_k=self.smooth_k, phi_input=self.phi_input,
        )  # fmt: skip
        made = [ops.in_layout(x, self.case.layout) for x in grads[:3]]
        return (*made, grads[3]) if grads[3] is not None else tuple(made)

    def alpha_terms(self) -> Tensor:
        """The gradient of alpha as if every token had its own, in float64: (H, N)."""
        assert self.alpha_logit is not None
        case = self.case
        logit = self.alpha_logit
        if case.alpha != "token":
            logit = logit.expand(case.num_heads, -1).repeat_interleave(BLOCK_Q, -1)
        logit = logit[:, : case.seqlen].contiguous()
        return replace(self, alpha_logit=logit).exact()[3]

    def reference(self, compute: torch.dtype) -> Grads:
        wide = torch.float64 if compute == torch.float64 else torch.float32
        q, k, v = (
            x.detach().to(wide, copy=True).requires_grad_() for x in (self.q, self.k, self.v)
        )
        common: dict[str, Any] = {
            "smooth_k": self.smooth_k, "compute_dtype": compute, "layout": self.case.layout,
        }  # fmt: skip
        leaves = [q, k, v]
        out: Any
        if self.branch == "sparse":
            out = reference.block_sparse_attention(q, k, v, self.dense, scale=self.scale, **common)
        elif self.branch == "linear":
            out = reference.complement_linear_attention(
                q, k, v, self.dense, phi_input=self.phi_input, **common
            )
        else:
            assert self.alpha_logit is not None
            leaves.append(self.alpha_logit.detach().to(wide, copy=True).requires_grad_())
            out = reference.sla2_attention(
                q, k, v, proj_q=None, proj_k=None, alpha_logit=leaves[3], block_map=self.dense,
                scale=self.scale, phi_input=self.phi_input, **common,
            )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype), allow_unused=True)
        return tuple(
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        )

    def yardsticks(self, exact: Grads) -> Grads:
        """The exact gradients plus the low-precision reference's errors.

        The linear branch's products are bfloat16 whatever the inputs are.
        """
        plain = self.reference(torch.float64)
        dtypes = {self.case.dtype} if self.branch == "sparse" else {self.case.dtype, torch.bfloat16}
        errors = [
            [low - ref for low, ref in zip(self.reference(dtype), plain, strict=True)]
            for dtype in sorted(dtypes, key=str)
        ]
        largest = [max(e, key=lambda x: x.abs().max().item()) for e in zip(*errors, strict=True)]
        return tuple(x + e for x, e in zip(exact, largest, strict=True))


def make_problem(
    case: Case, branch: str, inputs: Inputs, block_map: sla2.BlockMap, grad_out: Tensor,
    **options: Any,
) -> Problem:  # fmt: skip
    """The backward call after the forward one. options: scale, smooth_k and phi_input."""
    lut, counts = block_map.lut, block_map.counts
    alpha = inputs.alpha_logit if branch == "both" else None
    scale = options.pop("scale", case.head_dim**-0.5)
    smooth_k, phi_input = options.get("smooth_k", True), options.get("phi_input", "smoothed")
    out, lse, out_sparse = ops.attn_fwd(
        *inputs.qkv, lut, counts, alpha, scale, case.quant, branch, smooth_k, phi_input,
        case.layout, True,
    )  # fmt: skip
    return Problem(
        case, branch, grad_out, *inputs.qkv, out if branch == "sparse" else out_sparse, lse,
        block_map.to_dense(), lut, counts, alpha, scale, **options,
    )  # fmt: skip


def check(problem: Problem, *, cancelling: bool = False) -> None:
    """The rules of T2; after a low-bit forward pass, relative L2 alone. The same bits twice.

    cancelling: dalpha may be a few sums that nearly cancel; compared is the norm of their terms.
    """
    got, exact = problem.run(), problem.exact()
    quantised = problem.case.quant != "none"
    yardsticks = exact if quantised else problem.yardsticks(exact)
    for name, a, b, c in zip(NAMES, got, exact, yardsticks, strict=False):
        if name == "dalpha" and bool(b.any()):
            # Sums of thousands of products, and a handful of them: the largest error of as many is
            # no measure.
            norm = max(b.norm().item(), problem.alpha_terms().norm().item() if cancelling else 0.0)
            assert (a.double() - b).norm().item() <= BACKWARD_REL_L2 / 2 * norm, name
        elif bool(b.any()) and quantised:  # what storing O_s in 16 bit costs is in no yardstick
            assert rel_l2(a, b) <= BACKWARD_REL_L2, name
        elif bool(b.any()):
            check_backward(a, b, c, name=name)
        else:  # with one key dP - delta is zero, but for the order of two float32 sums
            products = (problem.grad_out * problem.v).float().abs().sum(-1).max().item()
            factor = max(x.float().abs().max().item() for x in (problem.q, problem.k))
            rounding = problem.case.head_dim * 2.0**-24 * products
            assert max_err(a, b) <= rounding * factor * problem.scale, name
    assert all(map(same_bits, got, problem.run()))


def check_extreme(problem: Problem, ordinary: Problem | None = None) -> None:
    """The rules of T2 as far as the low-precision reference keeps them itself: where its relative
    L2 is over the limit, 3 times its own are allowed.

    A gradient that is nothing beside that of `ordinary`, a problem of the same shape, and so the
    rounding of terms that cancel, must be small beside it.
    """
    got, exact = problem.run(), problem.exact()
    sizes = exact if ordinary is None else ordinary.exact()
    lows = problem.yardsticks(exact)
    for name, a, b, low, size in zip(NAMES, got, exact, lows, sizes, strict=False):
        if b.norm() < torch.finfo(a.dtype).eps * size.norm():
            assert a.double().norm() <= BACKWARD_REL_L2 * size.norm(), name
            continue
        own, limit = rel_l2(low, b), BACKWARD_REL_L2 / (2 if name == "dalpha" else 1)
        assert rel_l2(a, b) <= (limit if own <= limit else BACKWARD_FACTOR * own), name
        if problem.case.quant == "none" and name != "dalpha":
            largest = BACKWARD_FACTOR * max_err(low, b) + rounding_atol(b, a.dtype)
            assert max_err(a, b) <= largest, name
    assert all(map(same_bits, got, problem.run()))
