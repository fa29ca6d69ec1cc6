"""The router: pooled scores, the hard top-k lists and the SoftTop-k mask with its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..constants import BLOCK_K, BLOCK_Q
from .layout import (
    ceil_div,
    chunk_elements,
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


def soft_top_k(p_c: Tensor, k: int, tau: float, pinned: Tensor | None) -> Tensor:
    """m = sigmoid(P_c / tau + lambda) with sum_j m_j = k per row (eq. 14-15); P_c (..., T_n).

    lambda by bisection, in float64: float32 sums of many small m would stall it. Pinned blocks have
    m = 1 and count toward k; indices out of range are ignored.
    """
    x = p_c.double() / tau
    blocks = x.shape[-1]
    fixed = torch.zeros(blocks + 1, dtype=torch.bool, device=x.device)
    if pinned is not None:
        index = pinned.to(device=x.device, dtype=torch.int64)
        fixed.index_fill_(0, index.where((index >= 0) & (index < blocks), blocks), True)
    fixed = fixed[:blocks]
    num_fixed = fixed.sum()
    target, free = k - num_fixed, blocks - num_fixed
    low = -x.masked_fill(fixed, -math.inf).amax(-1, keepdim=True) - 10.0
    high = -x.masked_fill(fixed, math.inf).amin(-1, keepdim=True) + 10.0
    x.masked_fill_(fixed, -math.inf)
    work = torch.empty_like(x)
    for _ in range(64):
        middle = (low + high) / 2
        too_few = torch.add(x, middle, out=work).sigmoid_().sum(-1, keepdim=True) < target
        low, high = low.where(~too_few, middle), high.where(too_few, middle)
    m = x.add_((low + high) / 2).sigmoid_()
    # No finite lambda reaches these sums.
    m = m.masked_fill_(target == 0, 0.0).masked_fill_(target == free, 1.0)
    return m.masked_fill_(fixed, 1.0).to(p_c.dtype)


def soft_top_k_backward(m: Tensor, grad_log: Tensor, tau: float) -> Tensor:
    """dL/dP_c from the gradient of log m, with lambda's share (implicit differentiation).

    dL/dP_c,j = (1/tau) v_j (g_j - sum(g v) / sum(v)), v = m (1 - m), g = grad_log / m. The product
    v g is formed without dividing by m, which may underflow.
    """
    m = m.double()
    v = m * (1.0 - m)
    vg = (1.0 - m) * grad_log
    total = v.sum(-1, keepdim=True)
    share = torch.where(total > 0.0, v / total, 0.0)  # all 0 where every m is 0 or 1
    return vg.sub_(share.mul_(vg.sum(-1, keepdim=True))).div_(tau).to(grad_log.dtype)


def pooled(x: Tensor, block: int, *, centre: bool) -> Tensor:
    """X_bar of x (B, N, H, D), the tail by its true length: (B, H, T, D) in the compute type.

    centre: of x minus its mean over the tokens.
    """
    tokens, dtype = x.shape[1], compute_dtype(x)
    whole = tokens // block
    # Sums in the compute type without a copy of x in it.
    sums = x[:, : whole * block].unflatten(1, (whole, block)).sum(2, dtype=dtype)
    if whole * block < tokens:
        tail = x[:, whole * block :].sum(1, keepdim=True, dtype=dtype)
        sums = torch.cat([sums, tail], 1)
    sums = sums.transpose(1, 2)
    means = sums / block_lengths(tokens, block, x.device)
    return means.sub_(sums.sum(2, keepdim=True) / tokens) if centre else means


@plain_math
def soft_scores(
    q: Tensor, k: Tensor, proj_q: Tensor, proj_k: Tensor, *, router_score: str, smooth_k: bool
) -> Tensor:
    """P_c (B, H, T_m, T_n) of q, k (B, N, H, D), contiguous, in the compute type."""
    _, _, a, c = _projected(q, k, proj_q, proj_k, router_score, smooth_k)
    p_c = a @ c.mT
    return p_c.softmax(-1) if router_score == "softmax" else p_c


@plain_math
def soft_scores_backward(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    grad: Tensor,
    *,
    router_score: str,
    smooth_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of P_c through `soft_scores`.

    Returns the gradients of the projections, summed over what shares them, and those that each
    token of a block gets in q, (B, H, T_m, D), and in k, (B, H, T_n, D): see `add_to_blocks_`.
    """
    tokens = q.shape[1]
    q_bar, k_bar, a, c = _projected(q, k, proj_q, proj_k, router_score, smooth_k)
    if router_score == "softmax":
        p_c = (a @ c.mT).softmax(-1)
        grad = p_c * (grad - (grad * p_c).sum(-1, keepdim=True))
    da, dc = (grad @ c) * _score_scale(router_score, q.shape[3]), grad.mT @ a
    projs = ((q_bar.mT @ da).sum(0), (k_bar.mT @ dc).sum(0))
    if proj_q.dim() == 2:
        projs = (projs[0].sum(0), projs[1].sum(0))
    w_q, w_k = _head_projs(q, proj_q, proj_k)
    dq_bar, dk_bar = da @ w_q.mT, dc @ w_k.mT
    dq = dq_bar / block_lengths(tokens, BLOCK_Q, q.device)
    dk = dk_bar / block_lengths(tokens, BLOCK_K, q.device)
    if smooth_k:  # the mean over the tokens of what each of them gets
        dk -= dk_bar.sum(2, keepdim=True) / tokens
    return *projs, dq, dk


def _score_scale(router_score: str, head_dim: int) -> float:
    return 1.0 if router_score == "raw" else head_dim**-0.5


def _head_projs(q: Tensor, proj_q: Tensor, proj_k: Tensor) -> tuple[Tensor, Tensor]:
    heads, dtype = slice(0, q.shape[2]), compute_dtype(q)
    return head_proj(proj_q, heads, dtype), head_proj(proj_k, heads, dtype)


def _projected(
    q: Tensor, k: Tensor, proj_q: Tensor, proj_k: Tensor, router_score: str, smooth_k: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q_bar, K_bar, Q_bar W_q with the scores' scale, and K_bar W_k: (B, H, T, D) each."""
    q_bar = pooled(q, BLOCK_Q, centre=False)
    k_bar = pooled(k, BLOCK_K, centre=smooth_k)
    w_q, w_k = _head_projs(q, proj_q, proj_k)
    return q_bar, k_bar, (q_bar @ w_q) * _score_scale(router_score, q.shape[3]), k_bar @ w_k


@plain_math
def soft_map(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    *,
    tau: float,
    router_score: str,
    smooth_k: bool,
) -> Tensor:
    """The SoftTop-k mask m (B, H, T_m, T_n) of q, k (B, N, H, D), in the compute type.

    Besides m some float64 tensors exist of a few rows at a time.
    """
    table = soft_scores(q, k, proj_q, proj_k, router_score=router_score, smooth_k=smooth_k)
    for rows in _row_chunks(table):
        rows.copy_(soft_top_k(rows, num_kv_blocks, tau, pinned_kv))
    return table


@plain_math
def soft_map_backward(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    mask: Tensor,
    grad_log: Tensor,
    *,
    tau: float,
    router_score: str,
    smooth_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From dL/d(log m) through `soft_map`: exact, as lambda moves with the scores.

    grad_log: like mask; overwritten. Pinned blocks need no argument: their m is 1, where m (1 - m)
    vanishes. Returns what `soft_scores_backward` does.
    """
    for m, grad in zip(_row_chunks(mask), _row_chunks(grad_log), strict=True):
        grad.copy_(soft_top_k_backward(m, grad, tau))
    return soft_scores_backward(
        q, k, proj_q, proj_k, grad_log, router_score=router_score, smooth_k=smooth_k
    )


def _row_chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows of (B, H, T_m, T_n) as views (R, T_n), few enough for float64 copies."""
    rows = max(1, chunk_elements(x.device) // (4 * x.shape[-1]))
    return x.flatten(0, 2).split(rows)


def add_to_blocks_(grad: Tensor, shares: Tensor, block: int) -> None:
    """Adds to every token what its block gives: grad (B, N, H, D), shares (B, H, T, D)."""
    whole = grad.shape[1] // block
    shares = shares.transpose(1, 2)
    body = grad[:, : whole * block].unflatten(1, (whole, block))
    body += shares[:, :whole, None]
    grad[:, whole * block :] += shares[:, whole:]
