"""The quantisers of the low-bit forward pass (Alg. 2), on padded blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import BLOCK_K, E4M3_MAX, E4M3_P_FACTOR, EPS, INT8_MAX
from .layout import token_rows


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per block: integers as float32, shaped like x, and amax / 127 (T,).

    float32 holds every int32 sum of 128 such products exactly: 127 * 127 * 128 < 2^24.
    """
    amax = x.abs().amax((1, 2)).clamp_min_(EPS)
    # torch turns number / tensor into a product with the reciprocal, which rounds twice.
    factor = torch.full_like(amax, INT8_MAX) / amax
    x8 = (x * factor[:, None, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return x8, amax / INT8_MAX


def round_e4m3_(x: Tensor, work: Tensor) -> Tensor:
    """Round |x| <= 448 to e4m3, half to even, in place; 8 times faster than CPU casts.

    Adding 1.5 * 2^(23 - 3) ulp-steps of x's binade leaves x's three mantissa bits; below 2^-6 the
    steps of e4m3 stop shrinking. `work`: float32 scratch like x.
    """
    exponent = torch.bitwise_and(x.view(torch.int32), 0x7F800000, out=work.view(torch.int32))
    shift = exponent.view(torch.float32).clamp_(min=2.0**-6).mul_(1.5 * 2.0**20)
    return x.add_(shift).sub_(shift)


def channel_amax(v: Tensor, heads: int) -> Tensor:
    """max(amax over the tokens, EPS) of every channel of V: float32 (G, 1, D).

    v: (>= G * T_n, BLOCK_K, D), padded with zeros.
    """
    rows = token_rows(v, heads, v.shape[0] // heads)
    return rows.abs().amax(1, keepdim=True).float().clamp_min_(EPS)


def quantize_values(v: Tensor, heads: int, quant: str) -> tuple[Tensor, float, Tensor]:
    """V8 or V16 as float32, shaped like v (G * T_n + 1, BLOCK_K, D), and its two scales.

    O_s = (P_low V_low) / (divisor l) * factor, factor (G, 1, D). "int8_fp8": 256 and a_c / 448;
    "int8_fp16": 2^e_c, as 1/2 and 2^(e_c - 1) because e_c may be 128.
    """
    blocks = (v.shape[0] - 1) // heads
    amax = channel_amax(v, heads)
    out = torch.zeros_like(v)
    rows = token_rows(v, heads, blocks)
    if quant == "int8_fp8":
        scaled = rows * (torch.full_like(amax, E4M3_MAX) / amax)
        low = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        divisor, factor = E4M3_P_FACTOR, amax / E4M3_MAX
    else:
        exponent = torch.frexp(amax).exponent
        # In two steps: 2^128, which values near float32's end ask for, is no float32.
        half = exponent // 2
        low = torch.ldexp(torch.ldexp(rows, -half), half - exponent).to(torch.float16)
        divisor, factor = 0.5, torch.ldexp(torch.ones_like(amax), exponent - 1)
    token_rows(out, heads, blocks).copy_(low)
    return out, divisor, factor


def round_states_(h: Tensor, amax: Tensor) -> None:
    """h_j of a group of heads (G, T_n, D * D) as e4m3 with the scale 64 a_c / 448 holds it.

    |h_j| <= 64 a_c: phi <= 1 and a block has 64 rows. amax: `channel_amax` of V.
    """
    dim = amax.shape[-1]
    factor = torch.full_like(amax, E4M3_MAX) / amax / BLOCK_K
    scaled = h.float() * factor.repeat(1, 1, dim)
    round_e4m3_(scaled, torch.empty_like(scaled))
    h.copy_(scaled.mul_((amax / E4M3_MAX * BLOCK_K).repeat(1, 1, dim)))
