"""Stage 1: the soft mask m inside attention, P = softmax(S + log m), linear weights 1 - m.

Every key block has some weight, so the work is that of dense attention; the memory is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..constants import BLOCK_K, BLOCK_Q
from .backward import merge_key_grads_
from .layout import (
    Scratch,
    add_alpha_grad_,
    ceil_div,
    chunk_elements,
    compute_dtype,
    head_groups,
    load_alpha,
    load_blocks,
    load_rows,
    plain_math,
    settle_alpha_,
    smooth_,
    store_blocks,
    token_rows,
)
from .linear import LinearBranch
from .router import add_to_blocks_, soft_map, soft_map_backward


def _query_chunks(mask: Tensor) -> Iterator[slice]:
    """Query blocks per step for a mask (G, T_m, T_n): whole rows of scores, at least one block."""
    heads, blocks_q, blocks_k = mask.shape
    per_block = heads * BLOCK_Q * blocks_k * BLOCK_K
    step = max(1, 2 * chunk_elements(mask.device) // per_block)
    for start in range(0, blocks_q, step):
        yield slice(start, min(start + step, blocks_q))


def _masked_scores(
    queries: Tensor, keys: Tensor, log_m: Tensor, tokens: int, scratch: Scratch
) -> Tensor:
    """S + log m of some query blocks: (G, R * BLOCK_Q, T_n * BLOCK_K), -inf on padded keys.

    queries: (G, R * BLOCK_Q, D), scaled; keys: (G, T_n * BLOCK_K, D); log_m: (G, R, T_n).
    """
    out = scratch("s", *queries.shape[:2], keys.shape[1])
    torch.bmm(queries, keys.mT, out=out)
    out.view(*log_m.shape[:2], BLOCK_Q, -1, BLOCK_K).add_(log_m[:, :, None, :, None])
    out[..., tokens:] = -math.inf
    return out


def _gate(mask: Tensor, alpha_logit: Tensor, heads: slice, tokens: int) -> Tensor:
    """alpha with the rows settled whose mask is 0 or 1 throughout: (G * T_m, 1 | BLOCK_Q, 1)."""
    alpha = load_alpha(alpha_logit, heads, tokens, mask.dtype)
    return settle_alpha_(alpha, (mask == 0).all(-1), (mask == 1).all(-1))


@plain_math
def soft_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    alpha_logit: Tensor,
    *,
    num_kv_blocks: int,
    pinned_kv: Tensor | None,
    tau: float,
    router_score: str,
    scale: float,
    smooth_k: bool,
    phi_input: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SLA2 with the SoftTop-k mask (eq. 14-15) in place of the hard map; unquantised.

    q, k, v: (B, N, H, D). Returns out, lse (B, H, N) of S + log m, out_sparse, and the mask m
    (B, H, T_m, T_n); lse and m in float32 (float64 for float64 inputs).
    """
    batch, tokens, heads, dim = q.shape
    blocks_q, blocks_k = ceil_div(tokens, BLOCK_Q), ceil_div(tokens, BLOCK_K)
    dtype = compute_dtype(q)
    out, out_sparse = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    lse = torch.empty(batch, heads, tokens, dtype=dtype, device=q.device)
    mask = soft_map(
        q, k, proj_q, proj_k, pinned_kv, num_kv_blocks, tau=tau, router_score=router_score,
        smooth_k=smooth_k,
    )  # fmt: skip
    scratch = Scratch(dtype, q.device)
    for b, hs in head_groups(q, BLOCK_Q):
        group = hs.stop - hs.start
        queries = load_blocks(q[b, :, hs], BLOCK_Q, dtype)
        keys = load_blocks(k[b, :, hs], BLOCK_K, dtype)
        values = load_blocks(v[b, :, hs], BLOCK_K, dtype)
        key_rows = token_rows(keys, group, blocks_k)
        value_rows = token_rows(values, group, blocks_k)
        phi_keys = keys.clone() if phi_input == "raw" and smooth_k else keys
        if smooth_k:
            smooth_(key_rows, tokens)

        m = mask[b, hs]
        log_m = m.log()
        query_rows = queries.view(group, blocks_q, BLOCK_Q, dim)
        o_sparse = torch.empty_like(query_rows)
        row_lse = torch.empty_like(query_rows[..., :1])
        for rows in _query_chunks(m):
            scaled = query_rows[:, rows].flatten(1, 2) * scale
            p = _masked_scores(scaled, key_rows, log_m[:, rows], tokens, scratch)
            row_max = p.amax(-1, keepdim=True)
            row_sum = p.sub_(row_max).exp_().sum(-1, keepdim=True)
            o_sparse[:, rows] = torch.bmm(p, value_rows).div_(row_sum).view_as(o_sparse[:, rows])
            row_lse[:, rows] = row_max.add_(row_sum.log_()).view_as(row_lse[:, rows])
        o_sparse = o_sparse.view_as(queries)
        lse[b, hs] = row_lse.view(group, -1)[:, :tokens]
        store_blocks(o_sparse, out_sparse[b, :, hs])

        o_linear = LinearBranch(phi_keys, values, 1.0 - m, tokens).forward(queries)
        alpha = _gate(m, alpha_logit, hs, tokens)
        store_blocks(torch.lerp(o_linear, o_sparse, alpha), out[b, :, hs])
    return out, lse, out_sparse, mask


@plain_math
def soft_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_sparse: Tensor,
    lse: Tensor,
    mask: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    alpha_logit: Tensor,
    *,
    tau: float,
    router_score: str,
    scale: float,
    smooth_k: bool,
    phi_input: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dproj_q, dproj_k, dalpha_logit) of `soft_fwd`.

    out_sparse, lse and mask as `soft_fwd` returned them. The mask's gradient reaches q and k
    through the pooled means as well.
    """
    tokens = q.shape[1]
    blocks_q, blocks_k = ceil_div(tokens, BLOCK_Q), ceil_div(tokens, BLOCK_K)
    dtype = compute_dtype(q)
    raw = phi_input == "raw"
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dproj_q, dproj_k, dalpha = (
        torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (proj_q, proj_k, alpha_logit)
    )
    scratch = Scratch(dtype, q.device)
    for b, hs in head_groups(q, BLOCK_Q):
        group = hs.stop - hs.start
        queries = load_blocks(q[b, :, hs], BLOCK_Q, dtype)
        grads = load_blocks(grad_out[b, :, hs], BLOCK_Q, dtype)
        keys = load_blocks(k[b, :, hs], BLOCK_K, dtype)
        values = load_blocks(v[b, :, hs], BLOCK_K, dtype)
        saved = load_blocks(out_sparse[b, :, hs], BLOCK_Q, dtype)
        m = mask[b, hs]
        dqs, dvs = torch.zeros_like(queries), torch.zeros_like(values)
        dks = torch.zeros(keys.shape[0] + 1, *keys.shape[1:], dtype=dtype, device=q.device)

        phi_keys = keys.clone() if raw and smooth_k else keys
        if smooth_k:
            smooth_(token_rows(keys, group, blocks_k), tokens)
        alpha = _gate(m, alpha_logit, hs, tokens)
        gain_l = (1.0 - alpha).masked_fill_((m == 1).all(-1).view(-1, 1, 1), 0.0)
        linear = LinearBranch(phi_keys, values, 1.0 - m, tokens)
        dot_l, dk_phi, dw = linear.backward(queries, grads, gain_l, dqs, dvs, want_map=True)
        assert dw is not None
        dot_s = (grads * saved).sum(-1, keepdim=True)
        dlogit = ((dot_s - dot_l) * alpha * (1.0 - alpha)).view(group, blocks_q, BLOCK_Q)
        add_alpha_grad_(dalpha, dlogit, hs, tokens)

        dlog_m = _sparse_backward(
            queries, keys, values, grads.mul_(alpha), dot_s.mul_(alpha),
            load_rows(lse[b, hs], BLOCK_Q, dtype), m, scale, tokens, scratch, dqs, dks, dvs,
        )  # fmt: skip

        merge_key_grads_(dks, dk_phi, group, tokens, smooth_k=smooth_k, raw=raw)

        per_head = proj_q.dim() == 3
        *dprojs, dq_block, dk_block = soft_map_backward(
            q[b : b + 1, :, hs], k[b : b + 1, :, hs], proj_q[hs] if per_head else proj_q,
            proj_k[hs] if per_head else proj_k, m[None], dlog_m.addcmul_(m, dw, value=-1)[None],
            tau=tau, router_score=router_score, smooth_k=smooth_k,
        )  # fmt: skip
        for total, part in zip((dproj_q, dproj_k), dprojs, strict=True):
            (total[hs] if per_head else total).add_(part)
        add_to_blocks_(_as_tokens(dqs, group, tokens), dq_block, BLOCK_Q)
        add_to_blocks_(_as_tokens(dks[:-1], group, tokens), dk_block, BLOCK_K)
        store_blocks(dqs, dq[b, :, hs])
        store_blocks(dks, dk[b, :, hs])
        store_blocks(dvs, dv[b, :, hs])
    return (
        dq,
        dk,
        dv,
        dproj_q.to(proj_q.dtype),
        dproj_k.to(proj_k.dtype),
        dalpha.to(alpha_logit.dtype),
    )


def _sparse_backward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_sparse: Tensor,
    delta: Tensor,
    lse: Tensor,
    m: Tensor,
    scale: float,
    tokens: int,
    scratch: Scratch,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> Tensor:
    """Adds to dq, dk, dv; returns dL/d(log m) = the sums of dS over each block, (G, T_m, T_n)."""
    heads, blocks_q, blocks_k = m.shape
    shape = (heads, blocks_q, BLOCK_Q, -1)
    q4, grad4, delta4, lse4, dq4 = (x.view(shape) for x in (queries, grad_sparse, delta, lse, dq))
    key_rows, value_rows = token_rows(keys, heads, blocks_k), token_rows(values, heads, blocks_k)
    dk_rows, dv_rows = token_rows(dk, heads, blocks_k), token_rows(dv, heads, blocks_k)
    log_m = m.log()
    dlog_m = torch.empty_like(m)
    for rows in _query_chunks(m):
        scaled = q4[:, rows].flatten(1, 2) * scale
        grad = grad4[:, rows].flatten(1, 2)
        p = _masked_scores(scaled, key_rows, log_m[:, rows], tokens, scratch)
        p.sub_(lse4[:, rows].flatten(1, 2)).exp_()
        dv_rows.baddbmm_(p.mT, grad)
        ds = scratch("ds", *p.shape)
        torch.bmm(grad, value_rows.mT, out=ds).sub_(delta4[:, rows].flatten(1, 2)).mul_(p)
        dlog_m[:, rows] = ds.view(heads, -1, BLOCK_Q, blocks_k, BLOCK_K).sum((2, 4))
        dq4[:, rows] += torch.bmm(ds, key_rows).mul_(scale).view_as(dq4[:, rows])
        dk_rows.baddbmm_(ds.mT, scaled)
    return dlog_m


def _as_tokens(blocks: Tensor, heads: int, tokens: int) -> Tensor:
    """Padded blocks (G * T, block, D) as a (1, N, G, D) view."""
    return token_rows(blocks, heads, blocks.shape[0] // heads)[:, :tokens].transpose(0, 1)[None]
