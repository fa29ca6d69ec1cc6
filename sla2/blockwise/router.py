"""The router: pooled scores, the hard top-k lists and the SoftTop-k mask with its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..constants import BLOCK_K, BLOCK_Q
from .layout import (
    ceil_div,
    compute_dtype,
    head_groups,
    load_blocks,
    plain_math,
    smooth_,
    token_rows,
)


def block_lengths(tokens: int, block: int, device: torch.device) -> Tensor:
    """True rows of each block, (T, 1) int64."""
    starts = torch.arange(0, tokens, block, device=device)
    return (tokens - starts).clamp_(max=block)[:, None]


def mean_pool(blocks: Tensor, heads: int, tokens: int) -> Tensor:
    """X_bar of padded blocks (G * T, block, D), the tail by its true length: (G, T, D)."""
    sums = blocks.sum(1).unflatten(0, (heads, -1))
    return sums.div_(block_lengths(tokens, blocks.shape[1], blocks.device))


def head_proj(proj: Tensor, heads: slice, dtype: torch.dtype) -> Tensor:
    """(D, D) or (H, D, D) -> (1 | G, D, D) in `dtype`."""
    return (proj[None] if proj.dim() == 2 else proj[heads]).to(dtype)


def scores(q_bar: Tensor, k_bar: Tensor, proj_q: Tensor, proj_k: Tensor) -> Tensor:
    """(Q_bar W_q)(K_bar W_k)^T, unscaled: (G, T_m, T_n)."""
    return (q_bar @ proj_q) @ (k_bar @ proj_k).mT


def top_k_blocks(scores: Tensor, k: int, pinned: Tensor | None) -> Tensor:
    """Indices of the k largest scores per row, ascending; ties to the lowest index.

    scores: (..., T_n), overwritten. NaN counts as the largest number, as in torch.sort. Pinned
    blocks come before everything else.
    """
    largest = torch.finfo(scores.dtype).max
    scores.nan_to_num_(nan=largest, posinf=largest, neginf=-largest)
    if pinned is not None and pinned.numel():
        scores[..., pinned.to(device=scores.device, dtype=torch.int64)] = math.inf
    # torch.topk leaves the choice among ties open; its smallest value does not depend on it.
    threshold = scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= room))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], k)


@plain_math
def route(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    *,
    smooth_k: bool,
) -> tuple[Tensor, Tensor]:
    """The hard block map (eq. 11-12) as lists: the num_kv_blocks best key blocks per query block.

    q, k: (B, N, H, D). proj_q, proj_k: (D, D) or (H, D, D). pinned_kv: key blocks that are always
    chosen, at most num_kv_blocks. Returns lut (B, H, T_m, num_kv_blocks) uint16, ascending, and
    counts (B, H, T_m) int32, all num_kv_blocks.
    """
    batch, tokens, heads, _ = q.shape
    blocks_q, blocks_k = ceil_div(tokens, BLOCK_Q), ceil_div(tokens, BLOCK_K)
    if tokens and not 1 <= num_kv_blocks <= blocks_k:
        raise ValueError(f"num_kv_blocks is {num_kv_blocks}; allowed: 1 to T_n = {blocks_k}")
    dtype = compute_dtype(q)
    lut = q.new_empty(batch, heads, blocks_q, num_kv_blocks, dtype=torch.uint16)
    counts = q.new_full((batch, heads, blocks_q), num_kv_blocks, dtype=torch.int32)
    for b, hs in head_groups(q):
        group = hs.stop - hs.start
        q_bar = mean_pool(load_blocks(q[b, :, hs], BLOCK_Q, dtype), group, tokens)
        keys = load_blocks(k[b, :, hs], BLOCK_K, dtype)
        if smooth_k:
            smooth_(token_rows(keys, group, blocks_k), tokens)
        k_bar = mean_pool(keys, group, tokens)
        table = scores(q_bar, k_bar, head_proj(proj_q, hs, dtype), head_proj(proj_k, hs, dtype))
        lut[b, hs] = top_k_blocks(table, num_kv_blocks, pinned_kv).to(torch.uint16)
    return lut, counts


# ---- SoftTop-k --------------------------------------------------------------------------------


def soft_scores(table: Tensor, kind: str, head_dim: int) -> Tensor:
    """P_c of a `router_score` kind from the unscaled scores: "raw", "scaled" or "softmax"."""
    if kind == "raw":
        return table
    table = table / math.sqrt(head_dim)
    return table.softmax(-1) if kind == "softmax" else table


def soft_scores_backward(grad: Tensor, p_c: Tensor, kind: str, head_dim: int) -> Tensor:
    """Gradient of the unscaled scores from that of P_c."""
    if kind == "raw":
        return grad
    if kind == "softmax":
        grad = p_c * (grad - (grad * p_c).sum(-1, keepdim=True))
    return grad / math.sqrt(head_dim)


def soft_top_k(p_c: Tensor, k: int, tau: float, pinned: Tensor | None) -> Tensor:
    """m = sigmoid(P_c / tau + lambda) with sum_j m_j = k per row (eq. 14-15); P_c (..., T_n).

    lambda by bisection, in float64: float32 sums of many small m would stall it. Pinned blocks have
    m = 1 and count toward k.
    """
    x = p_c.double() / tau
    fixed = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    if pinned is not None and pinned.numel():
        fixed[pinned.to(device=x.device, dtype=torch.int64)] = True
    num_fixed = int(fixed.sum())
    target, free = k - num_fixed, x.shape[-1] - num_fixed
    if target in (0, free):  # no finite lambda reaches these sums
        m = torch.full_like(x, 1.0 if target else 0.0)
    else:
        low = -x.masked_fill(fixed, -math.inf).amax(-1, keepdim=True) - 10.0
        high = -x.masked_fill(fixed, math.inf).amin(-1, keepdim=True) + 10.0
        x.masked_fill_(fixed, -math.inf)
        work = torch.empty_like(x)
        for _ in range(64):
            middle = (low + high) / 2
            too_few = torch.add(x, middle, out=work).sigmoid_().sum(-1, keepdim=True) < target
            low, high = low.where(~too_few, middle), high.where(too_few, middle)
        m = x.add_((low + high) / 2).sigmoid_()
    return m.masked_fill_(fixed, 1.0).to(p_c.dtype)


def soft_top_k_backward(m: Tensor, grad: Tensor, grad_log: Tensor, tau: float) -> Tensor:
    """dL/dP_c from the gradients of m and of log m, with lambda's share (implicit differentiation).

    dL/dP_c,j = (1/tau) v_j (g_j - sum(g v) / sum(v)), v = m (1 - m), g = grad + grad_log / m.
    The product v g is formed without dividing by m, which may underflow.
    """
    m = m.double()
    v = m * (1.0 - m)
    vg = v * grad + (1.0 - m) * grad_log
    total = v.sum(-1, keepdim=True)
    share = torch.where(total > 0.0, v / total, 0.0)  # all 0 where every m is 0 or 1
    return vg.sub_(share.mul_(vg.sum(-1, keepdim=True))).div_(tau).to(grad.dtype)
