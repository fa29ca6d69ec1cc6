"""A call in soft mode on the device, its oracles and its yardsticks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from cases import Case, Inputs, make_inputs
from gpu_tools import DEVICE
from torch import Tensor

from sla2 import blockwise, ops, ops_soft, reference
from sla2.blockwise import soft
from sla2.constants import SOFT_MAP_MIN
from sla2.reference_branches import sparse_branch
from sla2.reference_math import (
    LOG2_E,
    expand_map,
    pool_blocks,
    rounded,
    router_scores,
    smooth_keys,
    soft_topk_with_log,
)


@dataclass
class Problem:
    """The operands of a call and the gradient of its output, in the layout of `case`."""

    case: Case
    inputs: Inputs
    tau: float
    router_score: str = "scaled"
    smooth_k: bool = True
    phi_input: str = "smoothed"
    pinned: list[int] | None = None
    scale: float = 0.125
    saved: list[Tensor] = field(default_factory=list)  # out_sparse, lse, mask

    @property
    def options(self) -> dict[str, Any]:
        return {
            "tau": self.tau, "router_score": self.router_score, "scale": self.scale,
            "smooth_k": self.smooth_k, "phi_input": self.phi_input,
        }  # fmt: skip

    @property
    def learned(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs.proj_q, self.inputs.proj_k, self.inputs.alpha_logit

    @property
    def grad_out(self) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randn(self.case.shape, generator=generator).to(DEVICE, self.case.dtype)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pinned = None if self.pinned is None else torch.tensor(self.pinned, device=DEVICE)
        results: tuple[Tensor, Tensor, Tensor, Tensor] = ops_soft.soft_fwd(
            *self.inputs.qkv, *self.learned, pinned, self.case.num_kv_blocks,
            *self.options.values(), self.case.layout,
        )  # fmt: skip
        self.saved = [results[2], results[1], results[3]]
        return results

    def backward(self) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = ops_soft.soft_bwd(
            self.grad_out, *self.inputs.qkv, *self.saved, *self.learned, *self.options.values(),
            self.case.layout,
        )  # fmt: skip
        return grads

    def exact_backward(self) -> tuple[Tensor, ...]:
        """The same call in float64.

        A block that the kernels do not list gives log m no sum of dS. That sum is proportional to
        m, but so is all of a router's gradient where the map is nearly hard.
        """
        sparse_backward = soft._sparse_backward

        def listed_alone(*args: Any) -> Tensor:
            return sparse_backward(*args).masked_fill_(args[6] < SOFT_MAP_MIN, 0.0)

        def wide(x: Tensor) -> Tensor:
            return ops.bnhd(x, self.case.layout).double()

        out_sparse, lse, mask = self.saved
        part = listed_alone if DEVICE.type == "cuda" else sparse_backward
        with mock.patch.object(soft, "_sparse_backward", part):
            grads = blockwise.soft_bwd(
                wide(self.grad_out), *map(wide, self.inputs.qkv), wide(out_sparse), lse.double(),
                mask.double(), *(x.double() for x in self.learned), **self.options,
            )  # fmt: skip
        return *(ops.in_layout(x, self.case.layout) for x in grads[:3]), *grads[3:]

    def reference(self, compute: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and gradients of all six inputs."""
        wide = torch.float64 if compute == torch.float64 else torch.float32
        leaves = [
            x.detach().to(wide, copy=True).requires_grad_()
            for x in (*self.inputs.qkv, *self.learned)
        ]
        out: Any = reference.sla2_attention(
            *leaves[:3], proj_q=leaves[3], proj_k=leaves[4], alpha_logit=leaves[5], mode="soft",
            num_kv_blocks=self.case.num_kv_blocks, pinned_kv=self.pinned, compute_dtype=compute,
            layout=self.case.layout, **self.options,
        )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype), allow_unused=True)
        made = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
        return out.detach(), tuple(made)

    def sparse_reference(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """O_s, lse and the map in float64, and O_s in low precision.

        The reference divides P by its sum and rounds it then, the kernels the other way round: of
        the two the larger error counts.
        """
        q, k, v = (ops.bnhd(x, self.case.layout).transpose(1, 2).double() for x in self.inputs.qkv)
        k = smooth_keys(k) if self.smooth_k else k
        scores = router_scores(
            pool_blocks(q, 128), pool_blocks(k, 64), *self.learned[:2], self.router_score
        )
        pinned = None if self.pinned is None else torch.tensor(self.pinned, device=DEVICE)
        m, log_m = soft_topk_with_log(scores, self.case.num_kv_blocks, self.tau, pinned)
        o_s, lse = sparse_branch(q, k, v, m > 0, scale=self.scale, bias=log_m)
        low, _ = sparse_branch(
            q.float(), k.float(), v.float(), m > 0, scale=self.scale, bias=log_m.float(),
            low=self.case.dtype,
        )  # fmt: skip
        s = (q @ k.mT) * self.scale + expand_map(log_m, self.case.seqlen, 128, 64)
        p = ((s - s.amax(-1, keepdim=True)) * LOG2_E).exp2()
        other = (rounded(p, self.case.dtype) @ v) / p.sum(-1, keepdim=True)
        low = torch.where((other - o_s).abs() > (low - o_s).abs(), other, low.double())
        made = (ops.in_layout(x.transpose(1, 2), self.case.layout) for x in (o_s, low))
        return next(made), lse, m, next(made)


def make_problem(case: Case, *, seed: int = 0, **options: Any) -> Problem:
    return Problem(case, make_inputs(case, DEVICE, seed=seed), **options)
