"""Building blocks of the executable specification: pooling, router, maps, feature map, quantisers.

Small pure functions in plain PyTorch, one per step of "SLA2: Sparse-Linear Attention with Learnable
Routing and QAT" (arXiv 2602.12675). `sla2.reference` puts them together and exports them.

Tensors are (B, H, N, D) here: B batch, H heads, N tokens, D head_dim; T_m = ceil(N / block_q) query
blocks, T_n = ceil(N / block_k) key blocks. The last block may be short.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .constants import BLOCK_K, E4M3_MAX, EPS, INT8_MAX

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


# ---- blocks -----------------------------------------------------------------------------------


def num_blocks(num_tokens: int, block: int) -> int:
    """ceil(N / block)."""
    return -(-num_tokens // block)


def to_blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, D) -> (B, H, T, block, D), the tail filled with zeros."""
    batch, heads, num_tokens, dim = x.shape
    blocks = num_blocks(num_tokens, block)
    padded = F.pad(x, (0, 0, 0, blocks * block - num_tokens))
    return padded.reshape(batch, heads, blocks, block, dim)


def from_blocks(x: Tensor, num_tokens: int) -> Tensor:
    """(B, H, T, block, D) -> (B, H, N, D): the inverse of `to_blocks`."""
    return x.flatten(2, 3)[:, :, :num_tokens]


def expand_rows(x: Tensor, block: int, num_tokens: int, dim: int) -> Tensor:
    """Repeat each entry of axis `dim` (one per block) for the tokens of its block."""
    return x.repeat_interleave(block, dim).narrow(dim, 0, num_tokens)


def expand_map(x: Tensor, num_tokens: int, block_q: int, block_k: int) -> Tensor:
    """Block map (B, H, T_m, T_n) -> token map (B, H, N, N)."""
    return expand_rows(expand_rows(x, block_q, num_tokens, -2), block_k, num_tokens, -1)


def rounded(x: Tensor, low: torch.dtype | None) -> Tensor:
    """x as the 16-bit dtype `low` would store it, in x's own dtype; x itself when `low` is None."""
    return x if low is None else x.to(low).to(x.dtype)


def matmul(a: Tensor, b: Tensor, low: torch.dtype | None = None) -> Tensor:
    """a @ b; with `low`, operands and product are rounded to that dtype, the sum is not."""
    return rounded(rounded(a, low) @ rounded(b, low), low)


# ---- router -----------------------------------------------------------------------------------


def smooth_keys(k: Tensor) -> Tensor:
    """K <- K - colmean(K), the mean over the N tokens of a head (Alg. 2).

    Shifts every score of a row alike, so neither softmax nor the hard map changes; phi(K) does.
    """
    return k - k.mean(dim=-2, keepdim=True)


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """X_bar = mean-pool(X, block) (Alg. 2): (B, H, N, D) -> (B, H, T, D), true tail length."""
    num_tokens = x.shape[-2]
    starts = torch.arange(0, num_tokens, block, device=x.device)
    lengths = (num_tokens - starts).clamp(max=block).to(x.dtype)
    return to_blocks(x, block).sum(dim=3) / lengths[:, None]


def router_scores(
    q_bar: Tensor, k_bar: Tensor, proj_q: Tensor, proj_k: Tensor, kind: str = "scaled"
) -> Tensor:
    """P_c = (Q_bar W_q)(K_bar W_k)^T / sqrt(D) (Alg. 2): (B, H, T_m, T_n).

    proj_q, proj_k: (D, D) or (H, D, D). kind: "scaled" as written here, "raw" without 1/sqrt(D),
    "softmax" the row softmax of the scaled score (Alg. 2). All three have the same hard map.
    """
    scores = (q_bar @ proj_q.to(q_bar.dtype)) @ (k_bar @ proj_k.to(k_bar.dtype)).mT
    if kind == "raw":
        return scores
    scores = scores / math.sqrt(q_bar.shape[-1])
    if kind == "scaled":
        return scores
    if kind == "softmax":
        return scores.softmax(dim=-1)
    raise ValueError(f"router_score is {kind!r}; allowed: 'scaled', 'raw', 'softmax'")


def _pinned_mask(scores: Tensor, k: int, pinned: Tensor | None) -> Tensor:
    """Bool (T_n,) of the pinned key blocks, checked against k and T_n."""
    blocks = scores.shape[-1]
    if not 1 <= k <= blocks:
        raise ValueError(f"num_kv_blocks is {k}; allowed: 1 to T_n = {blocks}")
    mask = torch.zeros(blocks, dtype=torch.bool, device=scores.device)
    if pinned is None or pinned.numel() == 0:
        return mask
    if int(pinned.min()) < 0 or int(pinned.max()) >= blocks:
        raise ValueError(f"pinned_kv is {pinned.tolist()}; allowed: 0 to T_n - 1 = {blocks - 1}")
    mask[pinned.to(scores.device, torch.long)] = True
    if int(mask.sum()) > k:
        raise ValueError(f"pinned_kv names {int(mask.sum())} blocks; num_kv_blocks is {k}")
    return mask


def hard_map(scores: Tensor, k: int, pinned: Tensor | None = None) -> Tensor:
    """M (Alg. 2): per row the k largest scores, ties to the lowest index; bool, scores' shape.

    pinned: indices of key blocks that are always among the k. Raises ValueError when k is not in
    1..T_n or the pinned blocks do not fit into k.
    """
    mask = _pinned_mask(scores, k, pinned)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    # A second stable sort puts the pinned blocks first and keeps the order of the rest.
    first = mask[order].to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    chosen = order.gather(-1, first)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


class _SoftTopK(torch.autograd.Function):
    """(scores) -> (m, log m) with the gradient through the bisected threshold lambda."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: int, tau: float, pinned: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        fixed = _pinned_mask(scores, k, pinned)
        target = k - int(fixed.sum())
        num_free = fixed.numel() - int(fixed.sum())
        x = scores.double() / tau
        if target in (0, num_free):
            # The sum fixes every entry: no finite lambda reaches 0 or 1, and nothing can move.
            logits = torch.full_like(x, math.inf if target else -math.inf)
            free = torch.zeros_like(fixed)
        else:
            free = ~fixed
            lo = -x.masked_fill(fixed, -math.inf).amax(-1, keepdim=True) - 10.0
            hi = -x.masked_fill(fixed, math.inf).amin(-1, keepdim=True) + 10.0
            for _ in range(64):
                mid = (lo + hi) / 2
                too_few = ((x + mid).sigmoid() * free).sum(-1, keepdim=True) < target
                lo, hi = torch.where(too_few, mid, lo), torch.where(too_few, hi, mid)
            logits = x + (lo + hi) / 2
        logits = logits.masked_fill(fixed, math.inf)
        m = logits.sigmoid()
        ctx.save_for_backward(m * free, (-logits).sigmoid() * free)
        ctx.tau = tau
        return m.to(scores.dtype), F.logsigmoid(logits).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_m: Tensor, grad_log_m: Tensor) -> tuple[Tensor | None, ...]:
        # With v = m (1 - m): dL/dx_j = v_j g_j - v_j sum(v g) / sum(v). The second term is lambda's
        # share: sum_j m_j = k stays fixed. v g is formed without dividing by m.
        m, rest = ctx.saved_tensors
        v = m * rest
        vg = grad_m.double() * v + grad_log_m.double() * rest
        total = v.sum(-1, keepdim=True)
        share = torch.where(total > 0, v / total.where(total > 0, 1.0), 0.0)
        grad = (vg - share * vg.sum(-1, keepdim=True)) / ctx.tau
        return grad.to(grad_m.dtype), None, None, None


def soft_topk_with_log(
    scores: Tensor, k: int, tau: float = 0.1, pinned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`soft_topk` and its logarithm, which stays finite where m underflows."""
    m, log_m = _SoftTopK.apply(scores, k, tau, pinned)
    return m, log_m


def soft_topk(scores: Tensor, k: int, tau: float = 0.1, pinned: Tensor | None = None) -> Tensor:
    """SoftTop-k (Stage 1): m_ij = sigmoid(P_c,ij / tau + lambda_i) with sum_j m_ij = k.

    lambda_i by bisection between -max_j(x) - 10 and -min_j(x) + 10, x = P_c / tau: these always
    bracket the root while T_n <= 16384. The gradient is the exact implicit one,
    dL/dP_c,j = (1/tau) v_j (g_j - sum(g v) / sum(v)), v = m (1 - m). Pinned blocks have m = 1 and
    count toward k; k = T_n gives m = 1 everywhere.
    """
    return soft_topk_with_log(scores, k, tau, pinned)[0]


# ---- linear branch ----------------------------------------------------------------------------


def feature_map(x: Tensor) -> Tensor:
    """phi(X) = softmax over the feature dimension D, row by row, no scale (Alg. 2)."""
    return x.softmax(dim=-1)


def block_states(phi_k: Tensor, v: Tensor, block_k: int = BLOCK_K) -> tuple[Tensor, Tensor]:
    """h_j = phi(K_j)^T V_j (B, H, T_n, D, D) and z_j = sum over rows of phi(K_j) (B, H, T_n, D)."""
    phi_blocks = to_blocks(phi_k, block_k)
    return phi_blocks.mT @ to_blocks(v, block_k), phi_blocks.sum(dim=3)


# ---- quantisers -------------------------------------------------------------------------------


def quantize_per_block(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per block of rows: a = max(amax, EPS), x8 = round(x 127 / a).

    Returns int8 values (B, H, N, D), rounded half to even, and float32 scales a / 127 (B, H, T).
    """
    values = x.float()
    amax = to_blocks(values, block).abs().amax(dim=(3, 4)).clamp_min(EPS)
    # torch turns number / tensor into a product with the reciprocal, which rounds twice.
    factor = expand_rows(torch.full_like(amax, INT8_MAX) / amax, block, x.shape[-2], -1)
    x8 = (values * factor[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return x8.to(torch.int8), amax / INT8_MAX


def to_e4m3(x: Tensor) -> Tensor:
    """Round float32 to e4m3, half to even, saturating; torch's own cast turns overflow into NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def channel_amax(v: Tensor) -> Tensor:
    """a_c = max(amax over the N tokens of channel c, EPS): float32 (B, H, 1, D)."""
    return v.float().abs().amax(dim=-2, keepdim=True).clamp_min(EPS)


def quantize_v_fp8(v: Tensor) -> tuple[Tensor, Tensor]:
    """V8 = e4m3(v 448 / a_c): e4m3 values (B, H, N, D) and float32 scales a_c / 448 (B, H, 1, D).

    a_c: see `channel_amax`.
    """
    amax = channel_amax(v)
    return to_e4m3(v.float() * (torch.full_like(amax, E4M3_MAX) / amax)), amax / E4M3_MAX


def quantize_states_fp8(h: Tensor, amax: Tensor, block_k: int = BLOCK_K) -> Tensor:
    """h8_j = e4m3(h_j 448 / (block_k a_c)) of states (B, H, T, D, D), V's `channel_amax` given.

    |h_j| <= block_k a_c, as phi <= 1 and a block has block_k rows, so nothing saturates. The scale,
    block_k a_c / 448, is the same for all blocks: sums over j add e4m3 values.
    """
    factor = torch.full_like(amax, E4M3_MAX) / amax / block_k
    return to_e4m3(h.float() * factor[:, :, None])


def scale_by_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent in two steps: an amax near float32's end asks for 2^128, itself too large."""
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, half), exponent - half)


def quantize_v_fp16(v: Tensor) -> tuple[Tensor, Tensor]:
    """V16 = fp16(v 2^-e_c), e_c the exponent of frexp(max(amax_c, EPS)): |V16| <= 1.

    A power of two keeps the bits of fp16 input (but for its subnormals) and tames bf16's range.
    Returns fp16 values (B, H, N, D) and int32 exponents e_c (B, H, 1, D).
    """
    exponent = torch.frexp(channel_amax(v)).exponent
    return scale_by_power_of_two(v.float(), -exponent).half(), exponent
