"""The tolerances of the tests: the only place that has any.

The yardstick is the error plain PyTorch makes in the same 16-bit dtype ("low-precision reference":
`sla2.reference` with `compute_dtype`) against the float32 or float64 reference; a kernel may make
2 times (forward) or 3 times (backward) that error. The reference gets the same block map as the
kernel, so that a swapped near-tie block does not hide the arithmetic's error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
FORWARD_REL_L2 = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
LSE_ATOL = 1e-3

BACKWARD_FACTOR = 3.0
BACKWARD_REL_L2 = 2e-2

# (i) against the emulation of the quantiser: catches bugs.
EMULATION_REL_L2 = 5e-3
EMULATION_FACTOR = 3.0
# (ii) against the unquantised result: catches bad design. int8_fp8 rounds both factors of P V to
# three bits of mantissa; on unit Gaussians these errors are independent and come to 0.037 whatever
# the kernel. Measured on the emulation (D 64 and 128, N 1000 to 4096): cosine 0.9992, relative L2
# 0.039; int8_fp16: 0.9999, 0.013. So int8_fp8's relative L2 limit is what cosine 0.999 implies.
PLAIN_COSINE = 0.999
PLAIN_COSINE_REAL_DATA = 0.995
PLAIN_REL_L2 = {"int8_fp16": 3e-2, "int8_fp8": math.sqrt(2 * (1 - PLAIN_COSINE))}


def rel_l2(out: Tensor, ref: Tensor) -> float:
    """|out - ref| / |ref|; 0 when both are zero."""
    error, norm = (out.double() - ref.double()).norm().item(), ref.double().norm().item()
    return 0.0 if error == 0.0 else error / norm if norm > 0.0 else math.inf


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors, seen as vectors."""
    x, y = a.double().flatten(), b.double().flatten()
    return (x @ y / (x.norm() * y.norm())).item()


def max_err(out: Tensor, ref: Tensor) -> float:
    return (out.double() - ref.double()).abs().max().item() if out.numel() else 0.0


def rounding_atol(ref: Tensor, dtype: torch.dtype) -> float:
    """2 max|(ref + 0.3 - 0.3) - ref|, evaluated in `dtype`: what storing the result costs."""
    x = ref.to(dtype)
    return 2.0 * max_err(x + 0.3 - 0.3, x) if x.numel() else 0.0


def _same_kind(name: str, out: Tensor, *others: Tensor) -> None:
    for other in others:
        if out.shape != other.shape:
            raise AssertionError(f"{name}: shape {tuple(out.shape)} against {tuple(other.shape)}")
        if not torch.isfinite(other).all():
            raise AssertionError(f"{name}: what it is compared with is not finite")
    bad = int((~torch.isfinite(out)).sum())
    if bad:
        raise AssertionError(f"{name}: {bad} of {out.numel()} values are not finite")


def _where(out: Tensor, ref: Tensor) -> str:
    """Index of the largest error, for the message."""
    flat = int((out.double() - ref.double()).abs().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), out.shape)]
    return (
        f"at {index}: {out.flatten()[flat].item():.6g}, expected {ref.flatten()[flat].item():.6g}"
    )


def _check_max(name: str, out: Tensor, ref: Tensor, lowp: Tensor, factor: float) -> None:
    error, low_error, atol = max_err(out, ref), max_err(lowp, ref), rounding_atol(ref, out.dtype)
    if error > factor * low_error + atol:
        raise AssertionError(
            f"{name}: max error {error:.3e} > {factor:g} x {low_error:.3e} (low-precision "
            f"reference) + {atol:.3e}; {_where(out, ref)}"
        )


def check_forward(out: Tensor, ref: Tensor, lowp: Tensor, *, name: str = "out") -> None:
    """max|out - ref| <= 2 max|lowp - ref| + atol; relative L2 by out's dtype (16-bit dtypes alone).

    out: the kernel's result; ref: float32 or float64 reference; lowp: low-precision reference.
    """
    _same_kind(name, out, ref, lowp)
    if out.numel() == 0:
        return
    _check_max(name, out, ref, lowp, FORWARD_FACTOR)
    limit, figure = FORWARD_REL_L2.get(out.dtype, math.inf), rel_l2(out, ref)
    if figure > limit:
        raise AssertionError(f"{name}: relative L2 {figure:.3e} > {limit:.0e} for {out.dtype}")


def check_lse(lse: Tensor, ref: Tensor, *, name: str = "lse") -> None:
    """|lse - ref| <= 1e-3, and -inf exactly where the reference has it."""
    if lse.shape != ref.shape:
        raise AssertionError(f"{name}: shape {tuple(lse.shape)} against {tuple(ref.shape)}")
    empty = ref == -math.inf
    if not torch.equal(lse == -math.inf, empty):
        raise AssertionError(f"{name}: -inf in other rows than the reference")
    out, expected = lse.masked_fill(empty, 0.0), ref.masked_fill(empty, 0.0)
    _same_kind(name, out, expected)
    error = max_err(out, expected)
    if error > LSE_ATOL:
        raise AssertionError(
            f"{name}: max error {error:.3e} > {LSE_ATOL:.0e}; {_where(out, expected)}"
        )


def check_backward(out: Tensor, ref: Tensor, lowp: Tensor, *, name: str = "grad") -> None:
    """max|out - ref| <= 3 max|lowp - ref| + atol and relative L2 <= 2e-2.

    The latter bounds the ratio of the norms to 0.98 to 1.02 as well.
    """
    _same_kind(name, out, ref, lowp)
    if out.numel() == 0:
        return
    _check_max(name, out, ref, lowp, BACKWARD_FACTOR)
    figure = rel_l2(out, ref)
    if figure > BACKWARD_REL_L2:
        raise AssertionError(f"{name}: relative L2 {figure:.3e} > {BACKWARD_REL_L2:.0e}")


def check_quant(
    out: Tensor,
    emulation: Tensor,
    plain: Tensor,
    *,
    quant: str = "int8_fp8",
    real_data: bool = False,
    name: str = "out",
) -> None:
    """A low-bit result against (i) the emulation of its quantiser and (ii) the unquantised result.

    (i) relative L2 <= 5e-3 and max error <= 3 times the format's own rounding on this data,
    max|emulation - plain|, + atol. (ii) cosine >= 0.999 (0.995 for real Wan QKV); relative L2 by
    mode, 3e-2 for int8_fp16 and 4.5e-2 for int8_fp8.
    """
    _same_kind(name, out, emulation, plain)
    if out.numel() == 0:
        return
    figure = rel_l2(out, emulation)
    if figure > EMULATION_REL_L2:
        raise AssertionError(
            f"{name}: relative L2 {figure:.3e} > {EMULATION_REL_L2:.0e} against the emulation"
        )
    error, rounding = max_err(out, emulation), max_err(emulation, plain)
    limit = EMULATION_FACTOR * rounding + rounding_atol(emulation, out.dtype)
    if error > limit:
        raise AssertionError(
            f"{name}: max error {error:.3e} > {limit:.3e} against the emulation, whose own "
            f"rounding is {rounding:.3e}; {_where(out, emulation)}"
        )
    least = PLAIN_COSINE_REAL_DATA if real_data else PLAIN_COSINE
    angle = cosine(out, plain)
    if not angle >= least:
        raise AssertionError(f"{name}: cosine {angle:.6f} < {least} against the unquantised result")
    figure = rel_l2(out, plain)
    if not real_data and figure > PLAIN_REL_L2[quant]:
        raise AssertionError(
            f"{name}: relative L2 {figure:.3e} > {PLAIN_REL_L2[quant]:.1e} ({quant}) against the "
            "unquantised result"
        )
