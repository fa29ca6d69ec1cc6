"""What the GPU tests share: the oracle and its comparison, inputs, guarded buffers, raw calls.

SLA2_TEST_DEVICE=cpu runs the tests of numbers on the CPU path instead, which tests the tests; those
that need a GPU as such are marked `gpu` whatever it says. The kernels are those the device uses, or
with SLA2_PATH=portable these, but for tests that choose them.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from cases import Inputs
from compare import (
    EMULATION_FACTOR,
    EMULATION_REL_L2,
    LSE_ATOL,
    check_forward,
    check_lse,
    max_err,
    rel_l2,
    rounding_atol,
)
from torch import Tensor

import sla2
from sla2 import ops, reference
from sla2.constants import BLOCK_K, BLOCK_Q
from sla2.reference_branches import alpha_per_token, effective_alpha
from sla2.reference_math import (
    LOG2_E,
    expand_map,
    expand_rows,
    hard_map,
    pool_blocks,
    rounded,
    router_scores,
)

DEVICE = torch.device(os.environ.get("SLA2_TEST_DEVICE", "cuda"))
# The mark of a module whose tests compare numbers; others take pytest.mark.gpu itself.
GPU = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

# Up to this length the dense reference computes every row, in float64; above, sampled rows.
DENSE_SEQLEN = 2048


def synchronize() -> None:
    if DEVICE.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()


def why_not_sm90(quant: str = "none") -> str | None:
    """Why the Hopper kernels would not run here; None when they would."""
    if DEVICE.type == "cpu":
        return "the CPU has one path"
    arguments = (torch.cuda.current_device(), 0, 64, ops._QUANTS[quant], ops._PATHS["sm90"])
    reason: str | None = ops._extension().supported(*arguments)
    return reason


def need_memory(gib: float) -> None:
    """Skips the test where the device has less memory free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:g} GiB of free device memory; there are {free:.1f}")


def as_bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: NaN equals NaN, 0 differs from -0."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((as_bytes(a) == as_bytes(b)).all())


def settled_keys(k: Tensor, layout: str = "BNHD", *, uneven: bool = False) -> Tensor:
    """Keys whose mean over the tokens is 0 however it is summed: what smoothing then leaves, and so
    every int8 value, is the same in the kernels and in the emulation of their quantiser.

    Multiples of 1/32, exact in both 16-bit types; token N - 1 - n is the negative of token n.
    uneven: every other key block of the first half is half as large, so that a block with the scale
    of another would show.
    """
    axis = 1 if layout == "BNHD" else 2
    grid = (k.float() * 32).round().clamp(-127, 127) / 32
    n = k.shape[axis]
    first = grid.narrow(axis, 0, n // 2)
    if uneven:
        size = 1.0 - torch.arange(n // 2, device=k.device) // BLOCK_K % 2 / 2
        first = first * size.view(-1, *[1] * (k.dim() - 1 - axis))
    middle = torch.zeros_like(grid.narrow(axis, 0, n % 2))
    return torch.cat([first, middle, -first.flip(axis)], dim=axis).to(k.dtype)


# ---- the oracle ---------------------------------------------------------------------------------


class Parts(NamedTuple):
    """Rows of the results, (B, R, H, D) and (B, H, R); None where a test has no interest."""

    out: Tensor | None
    o_s: Tensor | None = None
    o_l: Tensor | None = None
    lse: Tensor | None = None

    def rows(self, index: Tensor) -> Parts:
        out, o_s, o_l = (None if x is None else x[:, index] for x in self[:3])
        return Parts(out, o_s, o_l, None if self.lse is None else self.lse[..., index])


@dataclass(frozen=True)
class Problem:
    """q, k, v (B, N, H, D) in 16 bit, dense block map (B, H, T_m, T_n), alpha_logit.

    options: scale, smooth_k and phi_input where not the default. Compared are all rows of a short
    problem, and those of `blocks` (query blocks) of a long one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    alpha_logit: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def seqlen(self) -> int:
        return self.q.shape[1]

    @property
    def blocks(self) -> Tensor:
        """The first two query blocks, one in the middle and the last two of a long problem."""
        last = self.dense.shape[2] - 1
        chosen = range(last + 1)
        if self.seqlen > DENSE_SEQLEN:
            chosen = sorted({0, 1, last // 2, last - 1, last})  # type: ignore[assignment]
        return torch.tensor(list(chosen), device=self.q.device)

    @property
    def rows(self) -> Tensor:
        return reference.rows_of_blocks(self.blocks, self.seqlen)

    def expected(self, compute: torch.dtype, quant: str = "none") -> Parts:
        """The reference's rows in float32 or float64, or rounded as 16-bit products would be."""
        common: dict[str, Any] = {"quant": quant, "compute_dtype": compute, **self.options}
        if self.seqlen > DENSE_SEQLEN:
            return Parts(
                *reference.sla2_attention_rows(
                    self.q, self.k, self.v, query_blocks=self.blocks, block_map=self.dense,
                    alpha_logit=self.alpha_logit, **common,
                )
            )  # fmt: skip
        # Wide inputs: the reference returns its results in their dtype.
        wide = torch.float64 if compute == torch.float64 else torch.float32
        q, k, v = (x.to(wide) for x in (self.q, self.k, self.v))
        whole: Any = reference.sla2_attention(
            q, k, v, proj_q=None, proj_k=None, alpha_logit=self.alpha_logit, block_map=self.dense,
            **common,
        )  # fmt: skip
        phi_input = common.pop("phi_input", "smoothed")
        sparse: Any = reference.block_sparse_attention(
            q, k, v, self.dense, return_lse=True, **common
        )
        for name in ("quant", "scale"):
            common.pop(name, None)
        linear = reference.complement_linear_attention(
            q, k, v, self.dense, phi_input=phi_input, **common
        )
        return Parts(whole, sparse[0], linear, sparse[1])

    def low_precision(self, plain: Parts) -> Parts:
        """The yardstick: the low-precision reference of q's dtype, but bfloat16 in the linear
        branch, whose products are bfloat16 in the kernels whatever q is.

        The reference divides P by its sum and rounds it then, a kernel the other way round; with a
        single key the former makes no error at all. Of the two the larger counts.
        """
        linear = self.expected(torch.bfloat16)
        sparse = linear if self.q.dtype == torch.bfloat16 else self.expected(self.q.dtype)
        assert sparse.o_s is not None and linear.o_l is not None and plain.o_s is not None
        o_s = sparse.o_s
        if self.seqlen <= DENSE_SEQLEN:
            other = self._rounded_before_dividing()
            larger = (other - plain.o_s).abs() > (o_s - plain.o_s).abs()
            o_s = torch.where(larger, other, o_s)
        listed, empty = (
            expand_rows(flag, BLOCK_Q, self.seqlen, -1)
            for flag in (self.dense.any(-1), self.dense.all(-1))
        )
        heads = self.dense.shape[1]
        alpha = alpha_per_token(self.alpha_logit, heads, self.seqlen, BLOCK_Q, torch.float32)
        alpha = effective_alpha(alpha, listed, empty).transpose(1, 2)[:, self.rows]
        out = reference.blend(o_s, linear.o_l, alpha)
        return Parts(rounded(out, self.q.dtype), o_s, linear.o_l, sparse.lse)

    def _rounded_before_dividing(self) -> Tensor:
        """O_s with P = 2^(s - ceil(max s)) of raw K in 16 bit and its float32 sum: all rows."""
        q, k, v = (x.transpose(1, 2).float() for x in (self.q, self.k, self.v))
        scale = self.options.get("scale", q.shape[-1] ** -0.5)
        s = (q @ k.mT) * (scale * LOG2_E)
        s = s.masked_fill(~expand_map(self.dense, self.seqlen, BLOCK_Q, BLOCK_K), -torch.inf)
        row_max = s.amax(-1, keepdim=True).ceil()
        p = (s - row_max.masked_fill(row_max == -torch.inf, 0.0)).exp2()
        row_sum = p.sum(-1, keepdim=True)
        o_s = (rounded(p, self.q.dtype) @ v) / row_sum.masked_fill(row_sum == 0.0, 1.0)
        return rounded(o_s, self.q.dtype).transpose(1, 2)


def check_emulation(
    out: Tensor, emulation: Tensor, plain: Tensor, yardstick: Tensor, *, name: str
) -> None:
    """Part (i) of `compare.check_quant`: a low-bit result against its emulation.

    yardstick: the low-precision reference, for the linear branch's share, which is 16-bit.
    """
    if not torch.isfinite(out).all():
        raise AssertionError(f"{name}: not finite")
    figure = rel_l2(out, emulation)
    if figure > EMULATION_REL_L2:
        raise AssertionError(f"{name}: relative L2 {figure:.3e} against the emulation")
    # The formats' rounding: of the products, and one unit of the output's own.
    rounding = max(max_err(emulation, plain), max_err(yardstick, plain))
    unit = torch.finfo(out.dtype).eps * emulation.abs().max().item() if out.numel() else 0.0
    error = max_err(out, emulation)
    if error > EMULATION_FACTOR * rounding + max(unit, rounding_atol(emulation, out.dtype)):
        raise AssertionError(
            f"{name}: max error {error:.3e} against the emulation, whose own is {rounding:.3e}"
        )


def check_lse_by_format(lse: Tensor, emulation: Tensor, plain: Tensor) -> None:
    """lse after low-bit products on any data: one int8 value that rounds the other way, as the last
    bit of K's mean may make it, moves a logit by more than 1e-3; the format's own error is the
    measure."""
    limit = LSE_ATOL + EMULATION_FACTOR * max_err(emulation, plain)
    if not max_err(lse, emulation) <= limit:
        raise AssertionError(f"lse: max error {max_err(lse, emulation):.3e} > {limit:.3e}")


def check_parts(
    problem: Problem, got: Parts, quant: str = "none", *, apart: int | None = None
) -> None:
    """The rules of T1 for the unquantised results and of T2q (i) for low-bit ones.

    got: all N rows. Low-bit results need `settled_keys`. apart: a channel of V so large that its
    errors would hide those of the others; it is compared alone.
    """
    got = got.rows(problem.rows)
    short = problem.seqlen <= DENSE_SEQLEN
    plain = problem.expected(torch.float64 if short else torch.float32)
    low = problem.low_precision(plain)
    emulation = plain if quant == "none" else problem.expected(torch.float32, quant)
    every = torch.arange(problem.q.shape[3], device=problem.q.device)
    groups = {"": every}
    if apart is not None:
        groups = {" beside the channel": every[every != apart], " of the channel": every[[apart]]}
    for (suffix, channels), name in itertools.product(groups.items(), ("o_l", "o_s", "out")):
        x, exact, yardstick, emulated = (getattr(p, name) for p in (got, plain, low, emulation))
        if x is None:
            continue
        x, exact, yardstick, emulated = (y[..., channels] for y in (x, exact, yardstick, emulated))
        if quant == "none" or name == "o_l":
            check_forward(x, exact, yardstick, name=name + suffix)
        else:
            check_emulation(x, emulated, exact, yardstick, name=name + suffix)
    if got.lse is not None:
        assert emulation.lse is not None
        check_lse(got.lse, emulation.lse)


def run_parts(
    inputs: Inputs, block_map: sla2.BlockMap, *, quant: str, layout: str, **options: Any
) -> Parts:
    """The operation and each branch alone over a given map, as (B, N, H, D)."""
    out: Any = sla2.sla2_attention(
        *inputs.qkv, proj_q=None, proj_k=None, alpha_logit=inputs.alpha_logit, quant=quant,
        block_map=block_map, layout=layout, **options,
    )  # fmt: skip
    phi_input = options.pop("phi_input", "smoothed")
    sparse: Any = sla2.block_sparse_attention(
        *inputs.qkv, block_map, quant=quant, layout=layout, return_lse=True, **options
    )
    options.pop("scale", None)
    linear = sla2.complement_linear_attention(
        *inputs.qkv, block_map, layout=layout, phi_input=phi_input, **options
    )
    out, o_s, o_l = (ops.bnhd(x, layout) for x in (out, sparse[0], linear))
    return Parts(out, o_s, o_l, sparse[1])


# ---- the router's oracle ------------------------------------------------------------------------


def exact_scores(
    q: Tensor, k: Tensor, proj_q: Tensor, proj_k: Tensor, *, smooth_k: bool = True
) -> Tensor:
    """Unscaled P_c in float64, (B, H, T_m, T_n); q, k (B, N, H, D)."""
    q_bar = pool_blocks(q.double().transpose(1, 2), BLOCK_Q)
    k_bar = pool_blocks(k.double().transpose(1, 2), BLOCK_K)
    if smooth_k:  # pooling is linear: the mean may be subtracted after it
        k_bar = k_bar - k.double().mean(1).unsqueeze(2)
    return router_scores(q_bar, k_bar, proj_q, proj_k, "raw")


def check_selection(
    dense: Tensor, scores: Tensor, count: int, pinned: Tensor | None = None
) -> None:
    """Each row has `count` blocks, the pinned among them; one that the exact scores would not
    choose may only stand for one whose score is within 1e-5 max|s|."""
    expected = hard_map(scores, count, pinned)
    assert bool((dense.sum(-1) == count).all())
    if pinned is not None and pinned.numel():
        assert bool(dense[..., pinned.long()].all())
    missed, extra = expected & ~dense, dense & ~expected
    best_missed = scores.masked_fill(~missed, -torch.inf).amax(-1)
    worst_extra = scores.masked_fill(~extra, torch.inf).amin(-1)
    gap = (best_missed - worst_extra)[missed.any(-1)]
    if gap.numel():
        assert gap.max().item() < 1e-5 * scores.abs().max().item()


# ---- the compiled module, called directly -------------------------------------------------------

GUARD = 1 << 20
GUARD_BYTE = 0xA5
RANDOM = -1


class Guarded:
    """A tensor between two bands of 1 MiB, in memory that held `pattern` bytes before."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pattern: int) -> None:
        count = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full((count + 2 * GUARD,), GUARD_BYTE, dtype=torch.uint8, device=DEVICE)
        self._count = count
        payload = self._bytes[GUARD : GUARD + count]
        if pattern == RANDOM:
            payload.random_(0, 256)
        else:
            payload.fill_(pattern)
        self.tensor = payload.view(dtype).view(shape)

    def check(self, name: str) -> None:
        before, after = self._bytes[:GUARD], self._bytes[GUARD + self._count :]
        for where, band in (("before", before), ("after", after)):
            wrong = int((band != GUARD_BYTE).sum())
            assert wrong == 0, f"{wrong} bytes {where} {name} were overwritten"


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream if DEVICE.type == "cuda" else 0


def raw_route(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    count: int,
    *,
    pinned: Tensor | None = None,
    smooth_k: bool = True,
    scores: bool = True,
    pattern: int = 0xFF,
) -> dict[str, Tensor]:
    """sla2_route with guarded buffers: scores (B, H, T_m, T_n), lut and counts."""
    ext = ops._extension()
    b, n, h, d = q.shape
    t_m, t_n = -(-n // BLOCK_Q), -(-n // BLOCK_K)
    shape = (b, n, h, d, ops._DTYPES[q.dtype])
    path = ops._PATHS[ops._path.get()]
    size = ext.route_workspace(shape=shape, path=path, max_kv_blocks=count)
    made = {
        "lut": Guarded((b, h, t_m, count), torch.uint16, pattern),
        "counts": Guarded((b, h, t_m), torch.int32, pattern),
        "workspace": Guarded((size,), torch.uint8, pattern),
    }
    if scores:
        made["scores"] = Guarded((b, h, t_m, t_n), torch.float32, pattern)
    tensors = {name: buffer.tensor for name, buffer in made.items()}
    ext.route(
        shape=shape,
        path=path,
        smooth_k=smooth_k,
        q=ops._operand(q),
        k=ops._operand(k),
        router=ops._router_operand(proj_q, proj_k, pinned, count),
        lists=(tensors["lut"].data_ptr(), tensors["counts"].data_ptr(), count),
        scores=tensors["scores"].data_ptr() if scores else 0,
        workspace=(tensors["workspace"].data_ptr(), size),
        stream=current_stream(),
    )
    for name, buffer in made.items():
        buffer.check(name)
    del tensors["workspace"]
    return tensors


def raw_attn_fwd(
    inputs: Inputs,
    count: int,
    *,
    quant: str,
    branch: str = "both",
    lists: tuple[Tensor, Tensor] | None = None,
    pattern: int = 0xFF,
    **options: Any,
) -> dict[str, Tensor]:
    """sla2_attn_fwd on (B, N, H, D) inputs with guarded buffers; routed unless lists are given.

    Returns out, out_sparse, lse and, where routed, lut and counts.
    """
    ext = ops._extension()
    q, k, v = inputs.qkv
    b, n, h, d = q.shape
    t_m = -(-n // BLOCK_Q)
    shape = (b, n, h, d, ops._DTYPES[q.dtype])
    settings = (
        ops._QUANTS[quant], ops._BRANCHES[branch], ops._PATHS[ops._path.get()],
        options.get("phi_input") == "raw", options.get("smooth_k", True),
        options.get("scale", d**-0.5),
    )  # fmt: skip
    size = ext.attn_fwd_workspace(
        shape=shape, options=settings, routed=lists is None, max_kv_blocks=count
    )
    made = {
        "out": Guarded((b, n, h, d), q.dtype, pattern),
        "out_sparse": Guarded((b, n, h, d), q.dtype, pattern),
        "lse": Guarded((b, h, n), torch.float32, pattern),
        "workspace": Guarded((size,), torch.uint8, pattern),
    }
    if lists is None:
        made["lut"] = Guarded((b, h, t_m, count), torch.uint16, pattern)
        made["counts"] = Guarded((b, h, t_m), torch.int32, pattern)
    tensors = {name: buffer.tensor for name, buffer in made.items()}
    lut, counts = (tensors["lut"], tensors["counts"]) if lists is None else lists
    alpha = inputs.alpha_logit if branch == "both" else None
    router = None
    if lists is None:
        router = ops._router_operand(inputs.proj_q, inputs.proj_k, None, count)
    ext.attn_fwd(
        shape=shape,
        options=settings,
        q=ops._operand(q),
        k=ops._operand(k),
        v=ops._operand(v),
        out=ops._operand(tensors["out"]),
        out_sparse=ops._operand(tensors["out_sparse"]),
        lse=tensors["lse"].data_ptr(),
        alpha=ops._alpha_operand(alpha, n),
        router=router,
        lists=(lut.data_ptr(), counts.data_ptr(), count),
        workspace=(tensors["workspace"].data_ptr(), size),
        stream=current_stream(),
    )
    for name, buffer in made.items():
        buffer.check(name)
    del tensors["workspace"]
    return tensors
