"""The installed operation compared with `sla2.reference`: `selftest`, `bench --refcheck`.

The rules. Unquantised: the largest error is at most twice what the low-precision reference makes
(the same formulas, operands and products rounded to the input's dtype) plus the rounding of the
result, and the error's relative L2 norm is at most 1e-2 (bf16), 2e-3 (fp16); gradients: three
times, 2e-2. float32, which has no lower precision to compare with: relative L2 at most 1e-5.
Quantised: relative L2 at most 5e-3 against the exact emulation of the quantisers; against the
unquantised reference a cosine of at least 0.999 and a relative L2 of at most 3e-2, or 1.1 times the
emulation's own where the format itself exceeds that (e4m3 on Gaussian data does); gradients:
relative L2 at most 2e-2 against the emulation, cosine at least 0.99. lse: absolute 1e-3; in the
quantised modes what one int8 rounding of one key element can change a score by, because kernel and
emulation may differ in the last bit of the mean of K, and so in how a value half-way rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sla2 import reference
from sla2.constants import BLOCK_K, BLOCK_Q, INT8_MAX
from sla2.reference_math import pool_blocks, router_scores

REL_L2 = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
REL_L2_EMULATION = 5e-3
REL_L2_QUANTISED = 3e-2
COSINE_QUANTISED = 0.999
LSE_ERROR = 1e-3
GRADIENT_REL_L2 = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-5}
GRADIENT_COSINE = 0.99  # of gradients behind a quantised forward pass
ROUTER_GAP = 1e-5  # two scores closer than this times the largest may change places
SMALL_SEQLEN = 2048  # up to here every row is compared, above it sampled query blocks


class Check(NamedTuple):
    """One figure and its limit; `at_least` says on which side of it the figure has to be."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """NaN fails."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: those become text."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {
            "name": self.name,
            "value": value,
            "limit": self.limit,
            "at_least": self.at_least,
            "passed": self.passed,
        }


class Rows(NamedTuple):
    """R rows of the three outputs (B, R, H, D) and of lse (B, H, R)."""

    out: Tensor
    out_sparse: Tensor
    out_linear: Tensor
    lse: Tensor


def relative_l2(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; where exact is zero, ||got||."""
    difference = (got.double() - exact.double()).norm().item()
    norm = exact.double().norm().item()
    return difference / norm if norm > 0 else difference


def cosine(got: Tensor, exact: Tensor) -> float:
    """Cosine of the angle between the two as vectors; 1 when both are zero."""
    a, b = got.double().flatten(), exact.double().flatten()
    norms = (a.norm() * b.norm()).item()
    if norms == 0.0:
        return 1.0 if a.norm() == b.norm() else 0.0
    return torch.dot(a, b).item() / norms


def check_unquantised(
    name: str,
    got: Tensor,
    exact: Tensor,
    low: Tensor | None,
    *,
    factor: float = 2.0,
    rel: float = 0.0,
) -> list[Check]:
    """`got` against the exact result, by the yardstick of the low-precision one; all of one shape.

    low: None where no lower precision is involved; then the relative L2 decides alone. factor: how
    many times the low-precision error is allowed. rel: limit of the relative L2, by default that of
    got's dtype.
    """
    if got.numel() == 0:
        return []
    checks = [Check(f"{name} rel L2", relative_l2(got, exact), rel or REL_L2[got.dtype])]
    if low is None:
        return checks
    stored = exact.to(got.dtype)
    rounding = 2.0 * ((stored + 0.3 - 0.3) - stored).abs().max().double().item()
    allowed = factor * _max_error(low, exact) + rounding
    return [*checks, Check(f"{name} max error", _max_error(got, exact), allowed)]


def check_quantised(name: str, got: Tensor, emulated: Tensor, exact: Tensor) -> list[Check]:
    """`got` against the emulation of the quantisers, and against the unquantised result."""
    limit = max(REL_L2_QUANTISED, 1.1 * relative_l2(emulated, exact))
    return [
        Check(f"{name} rel L2, emulation", relative_l2(got, emulated), REL_L2_EMULATION),
        Check(f"{name} rel L2, unquantised", relative_l2(got, exact), limit),
        Check(f"{name} cosine, unquantised", cosine(got, exact), COSINE_QUANTISED, at_least=True),
    ]


def int8_step(q: Tensor, k: Tensor, scale: float | None, smooth_k: bool) -> float:
    """Largest change of a score, natural log, by one step of one int8 key element; BNHD."""
    if q.numel() == 0:
        return 0.0
    keys = k.float() - k.float().mean(dim=1, keepdim=True) if smooth_k else k.float()
    largest = q.float().abs().max().item() * keys.abs().max().item()
    return largest / INT8_MAX * (q.shape[-1] ** -0.5 if scale is None else scale)


def check_lse(got: Tensor, exact: Tensor, limit: float = LSE_ERROR) -> list[Check]:
    """Largest absolute error; both must be -inf at the same rows."""
    same_infinite = torch.equal(got == -math.inf, exact == -math.inf)
    finite = exact > -math.inf
    error = _max_error(got[finite], exact[finite]) if bool(finite.any()) else 0.0
    return [Check("lse max error", error if same_infinite else math.inf, limit)]


def _max_error(got: Tensor, exact: Tensor) -> float:
    difference = (got.double() - exact.double()).abs()
    # max() drops no NaN, so a NaN anywhere fails the comparison with the limit.
    return difference.max().item() if difference.numel() else 0.0


def sampled_query_blocks(seqlen: int, device: torch.device) -> Tensor:
    """Query blocks to compare: all of a short sequence, else two at each end and two inside."""
    blocks = -(-seqlen // BLOCK_Q)
    if seqlen <= SMALL_SEQLEN:
        return torch.arange(blocks, device=device)
    chosen = sorted({0, 1, blocks // 3, 2 * blocks // 3, blocks - 2, blocks - 1})
    return torch.tensor(chosen, device=device)


def reference_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_blocks: Tensor,
    block_map: Any,
    alpha_logit: Tensor,
    compute_dtype: torch.dtype,
    quant: str = "none",
    scale: float | None = None,
    smooth_k: bool = True,
    phi_input: str = "smoothed",
) -> Rows:
    """The reference's rows of `query_blocks`; q, k, v are (B, N, H, D)."""
    return Rows(
        *reference.sla2_attention_rows(
            q,
            k,
            v,
            query_blocks=query_blocks,
            block_map=block_map,
            alpha_logit=alpha_logit,
            scale=scale,
            quant=quant,
            smooth_k=smooth_k,
            phi_input=phi_input,
            compute_dtype=compute_dtype,
        )
    )


def exact_dtype(q: Tensor) -> torch.dtype:
    """float64 on the CPU; float32 on a GPU, where inputs have 16 bits and float64 is slow."""
    return torch.float32 if q.device.type == "cuda" else torch.float64


def check_forward(
    got: Rows, q: Tensor, k: Tensor, v: Tensor, *, quant: str, **options: Any
) -> list[Check]:
    """All figures of a forward pass; `got` holds the rows of options["query_blocks"].

    options: those of `reference_rows` but quant and compute_dtype.
    """
    exact = reference_rows(q, k, v, compute_dtype=exact_dtype(q), **options)
    low: Sequence[Tensor | None] = (None,) * 3
    if q.dtype != torch.float32:
        low = reference_rows(q, k, v, compute_dtype=q.dtype, **options)
    checks = []
    if quant == "none":
        checks += check_unquantised("out", got.out, exact.out, low[0])
        checks += check_unquantised("sparse", got.out_sparse, exact.out_sparse, low[1])
        checks += check_lse(got.lse, exact.lse)
    else:
        emulated = reference_rows(q, k, v, compute_dtype=torch.float32, quant=quant, **options)
        checks += check_quantised("out", got.out, emulated.out, exact.out)
        checks += check_quantised("sparse", got.out_sparse, emulated.out_sparse, exact.out_sparse)
        step = int8_step(q, k, options.get("scale"), options.get("smooth_k", True))
        checks += check_lse(got.lse, emulated.lse, max(LSE_ERROR, step))
    return checks + check_unquantised("linear", got.out_linear, exact.out_linear, low[2])


def check_router(
    dense_map: Tensor,
    q: Tensor,
    k: Tensor,
    *,
    proj_q: Tensor,
    proj_k: Tensor,
    num_kv_blocks: int,
    pinned_kv: Sequence[int] = (),
    smooth_k: bool = True,
) -> list[Check]:
    """The selected key blocks (B, H, T_m, T_n) against scores in float64; q, k are (B, N, H, D).

    Two figures: query blocks whose list has the wrong length or lacks a pinned block, and the
    largest score gap, relative to the largest score, by which a wrong block was preferred to a
    right one.
    """
    pinned = torch.tensor(pinned_kv, dtype=torch.long, device=q.device)
    wrong = int((dense_map.sum(-1) != num_kv_blocks).sum())
    wrong += int((~dense_map[..., pinned].all(-1)).sum()) if len(pinned_kv) else 0
    gap = 0.0
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[2])):
        q_bar, k_bar = (
            pool_blocks(x[b, :, h].double()[None, None], block)[0, 0]
            for x, block in ((q, BLOCK_Q), (k, BLOCK_K))
        )
        if smooth_k:  # pooling is linear: the mean of the keys may be subtracted after it
            k_bar = k_bar - k[b, :, h].double().mean(dim=0)
        w_q, w_k = (p[h] if p.dim() == 3 else p for p in (proj_q, proj_k))
        scores = router_scores(q_bar[None, None], k_bar[None, None], w_q, w_k)[0, 0]
        expected = reference.hard_map(scores, num_kv_blocks, pinned if len(pinned_kv) else None)
        missed, extra = expected & ~dense_map[b, h], dense_map[b, h] & ~expected
        best_missed = scores.masked_fill(~missed, -math.inf).amax(-1)
        worst_extra = scores.masked_fill(~extra, math.inf).amin(-1)
        differences = (best_missed - worst_extra)[missed.any(-1) & extra.any(-1)]
        if differences.numel():
            gap = max(gap, differences.max().item() / max(scores.abs().max().item(), 1e-30))
    return [Check("router wrong lists", wrong, 0), Check("router gap", gap, ROUTER_GAP)]


def check_gradients(
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    low: Sequence[Tensor] | None,
    names: Sequence[str],
) -> list[Check]:
    """Largest error at most three times the low-precision reference's; relative L2 by dtype.

    got[0] has the dtype of the inputs, which decides the limit for all. low: None where the
    reference has no such yardstick: float32, and a quantised forward pass, whose rounding `exact`
    emulates.
    """
    rel = GRADIENT_REL_L2[got[0].dtype]
    yardsticks: Sequence[Tensor | None] = [None] * len(got) if low is None else low
    checks = []
    for name, a, b, yardstick in zip(names, got, exact, yardsticks, strict=True):
        checks += check_unquantised(name, a, b, yardstick, factor=3.0, rel=rel)
    return checks


def check_quantised_gradients(
    got: Sequence[Tensor], plain: Sequence[Tensor], names: Sequence[str]
) -> list[Check]:
    """Those behind a quantised forward pass point the way of those behind an unquantised one."""
    return [
        Check(f"{name} cosine, unquantised", cosine(a, b), GRADIENT_COSINE, at_least=True)
        for name, a, b in zip(names, got, plain, strict=True)
    ]
