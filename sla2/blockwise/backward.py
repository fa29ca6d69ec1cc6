"""The explicit gradient over block lists (Alg. 3, with its omissions mended)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import BLOCK_K, BLOCK_Q
from .forward import gather, gather_queries
from .layout import (
    BlockLists,
    Scratch,
    add_alpha_grad_,
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


def sparse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_sparse: Tensor,
    delta: Tensor,
    lse: Tensor,
    lists: BlockLists,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Adds the sparse branch's part to dq, dk, dv (shaped like q, k, v), P recomputed from lse.

    q, grad_sparse = dL/dO_s: (G * T_m, BLOCK_Q, D); k, v: (G * T_n + 1, BLOCK_K, D); lse and
    delta = <dL/dO_s, O_s>: (G * T_m, BLOCK_Q, 1).
    """
    scratch = Scratch(q.dtype, q.device)
    for rows, blocks in lists.chunks():
        queries = gather_queries(q, rows, scratch, "q").mul_(scale)
        grad = gather_queries(grad_sparse, rows, scratch, "grad")
        keys = gather(k, blocks, scratch, "k")
        values = gather(v, blocks, scratch, "v")
        p = scratch("p", *queries.shape[:2], keys.shape[1])
        torch.bmm(queries, keys.mT, out=p)
        lists.hide_(p, blocks)
        p.sub_(lse[rows]).exp_()

        ds = scratch("ds", *p.shape)
        torch.bmm(grad, values.mT, out=ds).sub_(delta[rows]).mul_(p)
        # dV_j += P^T dO_s; a key block may be listed by many query blocks of the chunk.
        flat, block_shape = blocks.flatten(), (-1, *k.shape[1:])
        add_blocks(dv, flat, torch.bmm(p.mT, grad, out=values).view(block_shape))
        # dQ_i += dS K_j scale; dK_j += dS^T (Q_i scale)
        dq[rows] += torch.bmm(ds, keys, out=grad).mul_(scale)
        add_blocks(dk, flat, torch.bmm(ds.mT, queries, out=keys).view(block_shape))


def add_blocks(total: Tensor, index: Tensor, blocks: Tensor) -> None:
    """total[index] += blocks, in a fixed order, so that gradients repeat bit for bit.

    On CUDA index_add_ adds in any order; index_put_ sorts the indices first.
    """
    if total.is_cuda:
        total.index_put_((index,), blocks, accumulate=True)
    else:
        total.index_add_(0, index, blocks)


@plain_math
def attn_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_sparse: Tensor,
    lse: Tensor,
    lut: Tensor,
    counts: Tensor,
    alpha_logit: Tensor | None,
    *,
    scale: float,
    branch: str,
    smooth_k: bool,
    phi_input: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients (dq, dk, dv, dalpha_logit) of `attn_fwd`; the last is None unless branch is "both".

    grad_out (B, N, H, D), any strides; out_sparse and lse as `attn_fwd` returned them, of the same
    arguments. After a quantised forward the gradient is that of the unquantised operands with the
    quantised O_s and lse (the paper's straight-through rule). Memory is O(B N H D) plus one chunk.
    Raises ValueError when branch "both" comes without alpha_logit.
    """
    if branch == "both" and alpha_logit is None:
        raise ValueError("branch is 'both' and alpha_logit is None; a tensor is needed to blend")
    tokens = q.shape[1]
    dtype = compute_dtype(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dalpha: Tensor | None = None
    if branch == "both" and alpha_logit is not None:
        dalpha = torch.zeros(alpha_logit.shape, dtype=dtype, device=q.device)
    for b, hs in head_groups(q):
        queries = load_blocks(q[b, :, hs], BLOCK_Q, dtype)
        grads = load_blocks(grad_out[b, :, hs], BLOCK_Q, dtype)
        keys = load_blocks(k[b, :, hs], BLOCK_K, dtype, spare=1)
        values = load_blocks(v[b, :, hs], BLOCK_K, dtype, spare=1)
        lists = BlockLists(lut[b, hs], counts[b, hs], tokens, dtype)
        group, blocks_q, blocks_k = lists.unlisted.shape
        dqs, dks, dvs = (torch.zeros_like(x) for x in (queries, keys, values))

        # The shares of dL/dO that reach the branches.
        gain_s: Tensor | float = 1.0
        gain_l = (~lists.full).to(dtype).view(-1, 1, 1)
        alpha: Tensor | None = None
        if dalpha is not None and alpha_logit is not None:
            alpha = load_alpha(alpha_logit, hs, tokens, dtype)
            alpha = settle_alpha_(alpha, lists.empty, lists.full)
            gain_s, gain_l = alpha, 1.0 - alpha

        # Linear branch first: it needs K before or after smoothing, never both.
        dot_l: Tensor | None = None
        dk_phi: Tensor | None = None
        raw = phi_input == "raw"
        if smooth_k and not raw:
            smooth_(token_rows(keys, group, blocks_k), tokens)
        if branch != "sparse":
            linear = LinearBranch(keys, values, lists.unlisted, tokens)
            dot_l, dk_phi, _ = linear.backward(queries, grads, gain_l, dqs, dvs, want_map=False)
            del linear
        if smooth_k and raw:
            smooth_(token_rows(keys, group, blocks_k), tokens)
        if branch != "linear":
            saved = load_blocks(out_sparse[b, :, hs], BLOCK_Q, dtype)
            dot_s = (grads * saved).sum(-1, keepdim=True)
            if alpha is not None and dalpha is not None and dot_l is not None:
                dlogit = (dot_s - dot_l) * alpha * (1.0 - alpha)
                dlogit = dlogit.view(group, blocks_q, BLOCK_Q)
                add_alpha_grad_(dalpha, dlogit, hs, tokens)
            row_lse = load_rows(lse[b, hs], BLOCK_Q, dtype)
            sparse_backward(
                queries, keys, values, grads.mul_(gain_s), dot_s.mul_(gain_s), row_lse, lists,
                scale, dqs, dks, dvs,
            )  # fmt: skip
        merge_key_grads_(dks, dk_phi, group, tokens, smooth_k=smooth_k, raw=raw)
        store_blocks(dqs, dq[b, :, hs])
        store_blocks(dks, dk[b, :, hs])
        store_blocks(dvs, dv[b, :, hs])
    if dalpha is not None and alpha_logit is not None:
        dalpha = dalpha.to(alpha_logit.dtype)
    return dq, dk, dv, dalpha


def merge_key_grads_(
    dk: Tensor, dk_phi: Tensor | None, heads: int, tokens: int, *, smooth_k: bool, raw: bool
) -> None:
    """dk (G * T_n + 1, BLOCK_K, D) of smoothed K, dk_phi of what phi saw: dk <- gradient of K."""
    blocks = dk[:-1]
    if dk_phi is not None and not raw:
        blocks += dk_phi
    if smooth_k:
        smooth_(token_rows(dk, heads, blocks.shape[0] // heads), tokens)
    if dk_phi is not None and raw:
        blocks += dk_phi
