"""The forward pass over block lists: sparse softmax branch, linear branch, blend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..constants import BLOCK_K, BLOCK_Q, E4M3_P_FACTOR
from .layout import (
    BlockLists,
    Scratch,
    compute_dtype,
    head_groups,
    load_alpha,
    load_blocks,
    plain_math,
    settle_alpha_,
    smooth_,
    store_blocks,
    token_rows,
)
from .linear import LinearBranch
from .quantize import quantize_blocks, quantize_values, round_e4m3_

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def gather(x: Tensor, blocks: Tensor, scratch: Scratch, name: str) -> Tensor:
    """The rows of key blocks (R, W) as (R, W * BLOCK_K, D), from x (T, BLOCK_K, D)."""
    rows, width = blocks.shape
    out = scratch(name, rows * width, *x.shape[1:])
    torch.index_select(x, 0, blocks.flatten(), out=out)
    return out.view(rows, width * x.shape[1], x.shape[2])


def gather_queries(x: Tensor, rows: Tensor, scratch: Scratch, name: str) -> Tensor:
    """Query blocks `rows` (R,) of x (G * T_m, BLOCK_Q, C)."""
    return torch.index_select(x, 0, rows, out=scratch(name, rows.numel(), *x.shape[1:]))


def sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float
) -> tuple[Tensor, Tensor]:
    """O_s = softmax(S restricted to the lists) V, exactly.

    q: (G * T_m, BLOCK_Q, D); k, v: (G * T_n + 1, BLOCK_K, D). Returns O_s like q and the
    log-sum-exp (G * T_m, BLOCK_Q, 1); 0 and -inf for an empty list.
    """
    scratch = Scratch(q.dtype, q.device)
    out = torch.zeros_like(q)
    lse = torch.full_like(q[..., :1], -math.inf)
    for rows, blocks in lists.chunks():
        queries = gather_queries(q, rows, scratch, "q").mul_(scale)
        keys = gather(k, blocks, scratch, "kv")
        scores = scratch("s", *queries.shape[:2], keys.shape[1])
        torch.bmm(queries, keys.mT, out=scores)
        lists.hide_(scores, blocks)
        row_max = scores.amax(-1, keepdim=True)
        scores.sub_(row_max).exp_()
        row_sum = scores.sum(-1, keepdim=True)
        values = gather(v, blocks, scratch, "kv")
        out[rows] = torch.bmm(scores, values, out=queries).div_(row_sum)
        lse[rows] = row_max.add_(row_sum.log_())
    return out, lse


# ---- low bit ----------------------------------------------------------------------------------


def sparse_forward_low_bit(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, quant: str
) -> tuple[Tensor, Tensor]:
    """`sparse_forward` with emulated int8 Q K^T, and P V in e4m3 ("int8_fp8") or fp16.

    The row maximum is rounded up to an integer in log2 units, so that rounding P does not depend on
    the order in which a kernel visits the blocks.
    """
    heads, blocks_q = lists.counts.shape
    scratch = Scratch(torch.float32, q.device)
    out = torch.zeros_like(q)
    lse = torch.full_like(q[..., :1], -math.inf)
    q8, scale_q = quantize_blocks(q)
    k8, scale_k = quantize_blocks(k)
    v_low, divisor, factor = quantize_values(v, heads, quant)
    for rows, blocks in lists.chunks():
        queries = gather_queries(q8, rows, scratch, "q")
        keys = gather(k8, blocks, scratch, "kv")
        p = scratch("s", *queries.shape[:2], keys.shape[1])
        torch.bmm(queries, keys.mT, out=p)
        step = scale_q[rows, None] * scale_k[blocks] * scale
        p.view(*p.shape[:2], -1, BLOCK_K).mul_(step[:, None, :, None]).mul_(LOG2_E)
        lists.hide_(p, blocks)
        row_max = p.amax(-1, keepdim=True).ceil_()
        p.sub_(row_max).exp2_()
        row_sum = p.sum(-1, keepdim=True)
        if quant == "int8_fp8":
            round_e4m3_(p.mul_(E4M3_P_FACTOR), scratch("work", *p.shape))
        else:
            p.copy_(p.to(torch.float16))
        values = gather(v_low, blocks, scratch, "kv")
        result = torch.bmm(p, values, out=queries).div_(row_sum * divisor)
        out[rows] = result.mul_(factor[rows // blocks_q])
        lse[rows] = row_max.add_(row_sum.log2_()).mul_(LN_2)
    return out, lse


# ---- the operation ----------------------------------------------------------------------------


@plain_math
def attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut: Tensor,
    counts: Tensor,
    alpha_logit: Tensor | None,
    *,
    scale: float,
    quant: str,
    branch: str,
    smooth_k: bool,
    phi_input: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """O = alpha O_s + (1 - alpha) O_l (eq. 13-17) over given block lists.

    q, k, v: (B, N, H, D). lut (B, H, T_m, K) uint16, counts (B, H, T_m) int32; entries >= T_n and
    repeated ones are ignored. alpha_logit: (T_m,), (H, T_m) or (H, N); unused unless branch is
    "both". branch: "both", "sparse" or "linear". Returns out (B, N, H, D), lse (B, H, N) in float32
    (float64 for float64 inputs) and out_sparse (B, N, H, D); a linear branch alone has lse -inf and
    out_sparse 0. Raises ValueError when branch "both" comes without alpha_logit.
    """
    if branch == "both" and alpha_logit is None:
        raise ValueError("branch is 'both' and alpha_logit is None; a tensor is needed to blend")
    batch, tokens, heads, _ = q.shape
    dtype = compute_dtype(q)
    fp8 = quant == "int8_fp8" and branch == "both"  # the linear branch alone is not quantised
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, tokens), -math.inf, dtype=dtype, device=q.device)
    out_sparse = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for b, hs in head_groups(q):
        queries = load_blocks(q[b, :, hs], BLOCK_Q, dtype)
        keys = load_blocks(k[b, :, hs], BLOCK_K, dtype, spare=1)
        values = load_blocks(v[b, :, hs], BLOCK_K, dtype, spare=1)
        lists = BlockLists(lut[b, hs], counts[b, hs], tokens, dtype)
        group, blocks_k = lists.unlisted.shape[0], lists.unlisted.shape[2]
        linear_inputs = keys, values, lists.unlisted, tokens

        o_linear: Tensor | None = None
        if branch != "sparse" and phi_input == "raw":
            o_linear = LinearBranch(*linear_inputs, fp8=fp8).forward(queries)
        if smooth_k:
            smooth_(token_rows(keys, group, blocks_k), tokens)
        if branch != "sparse" and phi_input != "raw":
            o_linear = LinearBranch(*linear_inputs, fp8=fp8).forward(queries)
        if branch == "linear":
            assert o_linear is not None
            store_blocks(o_linear, out[b, :, hs])
            continue

        if quant == "none":
            o_sparse, row_lse = sparse_forward(queries, keys, values, lists, scale)
        else:
            o_sparse, row_lse = sparse_forward_low_bit(
                queries.float(), keys.float(), values.float(), lists, scale, quant
            )
        lse[b, hs] = token_rows(row_lse, group, lists.counts.shape[1])[:, :tokens, 0].to(dtype)
        store_blocks(o_sparse, out_sparse[b, :, hs])
        if o_linear is not None and alpha_logit is not None:
            alpha = load_alpha(alpha_logit, hs, tokens, dtype)
            alpha = settle_alpha_(alpha, lists.empty, lists.full)
            o_sparse = torch.lerp(o_linear, o_sparse.to(dtype), alpha)
        store_blocks(o_sparse, out[b, :, hs])
    return out, lse, out_sparse
