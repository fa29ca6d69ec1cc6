"""The two branches of the executable specification and their blend.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT" (arXiv 2602.12675), Alg. 2
and Alg. 3. Tensors are (B, H, N, D); `low` is the 16-bit dtype that the operands and products of
matrix products are rounded to, or None. `sla2.reference` exports what is public here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .constants import BLOCK_K, BLOCK_Q, E4M3_MAX, E4M3_P_FACTOR, EPS
from .reference_math import (
    LN_2,
    LOG2_E,
    block_states,
    channel_amax,
    expand_map,
    expand_rows,
    feature_map,
    from_blocks,
    matmul,
    num_blocks,
    quantize_per_block,
    quantize_states_fp8,
    quantize_v_fp8,
    quantize_v_fp16,
    rounded,
    scale_by_power_of_two,
    to_blocks,
    to_e4m3,
)

# ---- sparse branch ----------------------------------------------------------------------------


def attend(s: Tensor, v: Tensor, low: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """softmax(s) v and log-sum-exp of s (..., R, N); a row of -inf alone gives 0 and -inf."""
    row_max = s.detach().amax(dim=-1, keepdim=True)
    p = (s - row_max.masked_fill(row_max == -math.inf, 0.0)).exp()
    row_sum = p.sum(dim=-1, keepdim=True)
    listed = row_sum > 0
    safe_sum = row_sum.where(listed, 1.0)
    lse = torch.where(listed, row_max + safe_sum.log(), -math.inf).squeeze(-1)
    return matmul(p / safe_sum, v, low), lse


def sparse_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    *,
    scale: float,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    bias: Tensor | None = None,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """O_s = softmax(S restricted to M = 1) V, S = scale Q K^T (Alg. 2), in 16 bit or better.

    "Restricted" is -inf elsewhere. block_map: bool (B, H, T_m, T_n); bias: added to the scores of a
    block, log m of the soft mask. Returns O_s (B, H, N, D) and lse (B, H, N), natural logarithm;
    rows without any listed block give 0 and -inf.
    """
    num_tokens = q.shape[-2]
    s = matmul(q, k.mT, low) * scale
    if bias is not None:
        s = s + expand_map(bias, num_tokens, block_q, block_k)
    s = s.masked_fill(~expand_map(block_map, num_tokens, block_q, block_k), -math.inf)
    return attend(s, v, low)


def quantize_v(v: Tensor, quant: str) -> tuple[Tensor, Tensor]:
    """V in the mode's format as float32, and its per-channel scale or exponent."""
    if quant == "int8_fp8":
        values, channel = quantize_v_fp8(v)
    elif quant == "int8_fp16":
        values, channel = quantize_v_fp16(v)
    else:
        raise ValueError(f"quant is {quant!r}; allowed here: 'int8_fp16', 'int8_fp8'")
    return values.float(), channel


def quantized_scores(q8: Tensor, k8: Tensor, pair_scale: Tensor) -> Tensor:
    """S log2(e) = (Q8 K8^T) (scale_q scale_k softmax_scale) log2(e), float32."""
    # float32 holds the int32 dot products exactly: D * 127^2 < 2^24 up to D = 1040.
    return (q8.float() @ k8.float().mT) * pair_scale * LOG2_E


def attend_quantized(s2: Tensor, v: Tensor, channel: Tensor, quant: str) -> tuple[Tensor, Tensor]:
    """Low-bit softmax(S) V from s2 = S log2(e), float32 with -inf where unlisted.

    m = ceil(rowmax s2), p = 2^(s2 - m), l = sum p (unrounded), lse = ln2 (m + log2 l). The integer
    m makes the rounding of p independent of the order in which the key blocks are visited.
    int8_fp8:  O = (e4m3(256 p) V8) / (256 l) (a_c / 448)
    int8_fp16: O = (fp16(p) V16) / l 2^e_c
    """
    row_max = s2.amax(dim=-1, keepdim=True).ceil()
    listed = row_max != -math.inf
    p = (s2 - row_max.where(listed, 0.0)).exp2()
    row_sum = p.sum(dim=-1, keepdim=True).where(listed, 1.0)
    lse = LN_2 * (row_max + row_sum.log2())
    if quant == "int8_fp8":
        p8 = to_e4m3(E4M3_P_FACTOR * p).float()
        # Divided first: times a_c, the sum over the keys could leave float32.
        o = (p8 @ v) / (E4M3_P_FACTOR * row_sum) * channel
    else:
        o = scale_by_power_of_two((p.half().float() @ v) / row_sum, channel)
    return o, lse.squeeze(-1)


class _SparseQuantized(torch.autograd.Function):
    """Low-bit forward, 16-bit backward (Alg. 3): O_s and L of the forward, unquantised q, k, v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_map: Tensor,
        scale: float,
        quant: str,
        blocks: tuple[int, int],
        low: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = q.shape[-2]
        token_map = expand_map(block_map, num_tokens, *blocks)
        q8, scale_q = quantize_per_block(q, blocks[0])
        k8, scale_k = quantize_per_block(k, blocks[1])
        pair_scale = scale_q[..., :, None] * scale_k[..., None, :] * scale
        s2 = quantized_scores(q8, k8, expand_map(pair_scale, num_tokens, *blocks))
        s2 = s2.masked_fill(~token_map, -math.inf)
        o, lse = attend_quantized(s2, *quantize_v(v, quant), quant)
        o, lse = o.to(q.dtype), lse.to(q.dtype)
        ctx.save_for_backward(q, k, v, token_map, o, lse)
        ctx.scale, ctx.low = scale, low
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, token_map, o, lse = ctx.saved_tensors
        low = ctx.low
        s = matmul(q, k.mT, low) * ctx.scale
        safe_lse = lse.masked_fill(lse == -math.inf, 0.0)
        p = (s - safe_lse[..., None]).masked_fill(~token_map, -math.inf).exp()
        delta = (grad_o * o).sum(dim=-1, keepdim=True)
        ds = p * (matmul(grad_o, v.mT, low) - delta) * ctx.scale
        grads = matmul(ds, k, low), matmul(ds.mT, q, low), matmul(p.mT, grad_o, low)
        return (*grads, None, None, None, None, None)


def sparse_branch_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    *,
    scale: float,
    quant: str,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`sparse_branch` in low bit: exact emulation of the quantisers, in float32 (Alg. 2).

    Q and K int8 with one scale per block, int32 scores; P and V per `quant`: "int8_fp8" (e4m3) or
    "int8_fp16". k is smoothed already. The backward pass is unquantised (rounded to `low` where
    given) and uses O_s and lse of the low-bit forward (Alg. 3). lse has no gradient.
    """
    o, lse = _SparseQuantized.apply(q, k, v, block_map, scale, quant, (block_q, block_k), low)
    return o, lse


# ---- linear branch and blend ------------------------------------------------------------------


def apply_state(
    phi_q: Tensor, state: Tensor, norm: Tensor, empty: Tensor, low: torch.dtype | None
) -> Tensor:
    """phi(Q_i) H_i / (phi(Q_i) Z_i), 0 where `empty`: (..., T_m, block_q, D).

    phi_q: (..., T_m, block_q, D); state H: (..., T_m, D * D); norm Z: (..., T_m, D); empty:
    (..., T_m). The denominator is positive but may underflow when phi is one-hot: EPS bounds it.
    """
    dim = phi_q.shape[-1]
    numerator = matmul(phi_q, rounded(state, low).unflatten(-1, (dim, dim)), low)
    denominator = matmul(phi_q, rounded(norm, low)[..., None], low)
    return numerator / denominator.clamp_min(EPS).masked_fill(empty[..., None, None], 1.0)


def linear_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    low: torch.dtype | None = None,
) -> Tensor:
    """O_l,i = phi(Q_i) H_i / (phi(Q_i) Z_i), H_i = sum_j w_ij h_j, Z_i = sum_j w_ij z_j (Alg. 2).

    h_j = phi(K_j)^T V_j, z_j = sum over rows of phi(K_j); weights w = 1 - M (or 1 - m), real,
    (B, H, T_m, T_n). Returns (B, H, N, D); rows whose weights are all zero give 0.
    """
    phi_k, v = rounded(feature_map(k), low), rounded(v, low)
    h, z = block_states(phi_k, v, block_k)
    state = rounded(weights, low) @ rounded(h, low).flatten(-2)
    return _apply_sums(q, weights, state, z, block_q, low)


def _apply_sums(
    q: Tensor, weights: Tensor, state: Tensor, z: Tensor, block_q: int, low: torch.dtype | None
) -> Tensor:
    """`apply_state` to all of Q, with Z_i summed here."""
    norm = rounded(weights, low) @ rounded(z, low)
    phi_q = to_blocks(feature_map(q), block_q)
    empty = (weights == 0).all(dim=-1)
    return from_blocks(apply_state(phi_q, state, norm, empty, low), q.shape[-2])


def state_scale(amax: Tensor, block_k: int) -> Tensor:
    """The unit of `quantize_states_fp8` for every entry of a state: (B, H, 1, D * D)."""
    return (amax / E4M3_MAX * block_k).repeat(1, 1, 1, amax.shape[-1])


@torch.no_grad()
def linear_branch_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    low: torch.dtype | None = None,
) -> Tensor:
    """`linear_branch` with its states in e4m3, as quant "int8_fp8" keeps them. It has no gradient.

    phi(K) is rounded to bfloat16, h_j = phi(K_j)^T V_j to e4m3 in units of block_k a_c / 448;
    H_i sums the e4m3 values and multiplies by the unit then. z_j sums the same phi(K), exactly.
    """
    amax = channel_amax(v)
    h, z = block_states(rounded(feature_map(k), torch.bfloat16), rounded(v, low), block_k)
    total = rounded(weights, low) @ quantize_states_fp8(h, amax, block_k).to(h.dtype).flatten(-2)
    state = total * state_scale(amax, block_k).to(h.dtype)
    return _apply_sums(q, weights, state, z, block_q, low)


class _StraightThrough(torch.autograd.Function):
    """(low_bit, plain) -> low_bit, with the gradient going to plain."""

    @staticmethod
    def forward(ctx: Any, low_bit: Tensor, plain: Tensor) -> Tensor:
        return low_bit.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(low_bit: Tensor, plain: Tensor) -> Tensor:
    """The value of `low_bit` with the gradient of `plain`, which it approximates."""
    out: Tensor = _StraightThrough.apply(low_bit.detach(), plain)
    return out


def blend(o_s: Tensor, o_l: Tensor, alpha: Tensor) -> Tensor:
    """O = alpha (.) O_s + (1 - alpha) (.) O_l (eq. 13)."""
    return alpha * o_s + (1 - alpha) * o_l


def alpha_per_token(
    alpha_logit: Tensor, heads: int, num_tokens: int, block_q: int, dtype: torch.dtype
) -> Tensor:
    """alpha = sigmoid(alpha_logit), (N,) or (H, N), from (T_m,), (H, T_m) or (H, N)."""
    query_blocks = num_blocks(num_tokens, block_q)
    shape = tuple(alpha_logit.shape)
    allowed = ((query_blocks,), (heads, query_blocks), (heads, num_tokens))
    if shape not in allowed:
        raise ValueError(
            f"alpha_logit has shape {shape}; allowed: (T_m,) = {allowed[0]}, "
            f"(H, T_m) = {allowed[1]} or (H, N) = {allowed[2]}"
        )
    alpha = alpha_logit.to(dtype).sigmoid()
    return alpha if shape == allowed[2] else expand_rows(alpha, block_q, num_tokens, -1)


def effective_alpha(alpha: Tensor, listed: Tensor, empty: Tensor) -> Tensor:
    """alpha; 0 where no block is listed and 1 where the complement is empty: (..., N, 1)."""
    return torch.where(empty, 1.0, torch.where(listed, alpha, 0.0))[..., None]
