"""Executable specification of SLA2 attention, in plain PyTorch.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT" (arXiv 2602.12675), Alg. 2
(forward) and Alg. 3 (backward, with its omissions mended: the 1/sqrt(D) of dQ and dK, and `dV +=`).

Dense O(N^2) code, any device, differentiable by ordinary autograd. float32 and float64 are computed
as they are, 16-bit inputs in float32. `compute_dtype` overrides that: float32 or float64 sets the
precision; bfloat16 or float16 gives the low-precision reference, which rounds the operands and the
products of every matrix product to that dtype and keeps softmax in float32: its error is the
yardstick for a kernel's. On CUDA, TF32 must be off (PyTorch's default).

The steps live in `sla2.reference_math` and `sla2.reference_branches`, on (B, H, N, D) tensors; this
file has the public operations and `sla2_attention_rows`, which computes a few query blocks of a
problem that is too large for dense code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .constants import BLOCK_K, BLOCK_Q, QUANT_MODES
from .reference_branches import (
    alpha_per_token,
    apply_state,
    attend,
    attend_quantized,
    blend,
    effective_alpha,
    linear_branch,
    linear_branch_fp8,
    quantize_v,
    quantized_scores,
    sparse_branch,
    sparse_branch_quantized,
    state_scale,
    straight_through,
)
from .reference_math import (
    block_states,
    channel_amax,
    expand_rows,
    feature_map,
    hard_map,
    matmul,
    num_blocks,
    pool_blocks,
    quantize_per_block,
    quantize_states_fp8,
    quantize_v_fp8,
    quantize_v_fp16,
    rounded,
    router_scores,
    smooth_keys,
    soft_topk,
    soft_topk_with_log,
)

__all__ = [
    "Aux",
    "blend",
    "block_sparse_attention",
    "block_states",
    "complement_linear_attention",
    "feature_map",
    "hard_map",
    "linear_branch",
    "linear_branch_fp8",
    "pool_blocks",
    "quantize_per_block",
    "quantize_states_fp8",
    "quantize_v_fp16",
    "quantize_v_fp8",
    "route",
    "router_scores",
    "rows_of_blocks",
    "sla2_attention",
    "sla2_attention_rows",
    "smooth_keys",
    "soft_topk",
    "soft_topk_with_log",
    "sparse_branch",
    "sparse_branch_quantized",
]


class Aux(NamedTuple):
    """What `sla2_attention(return_aux=True)` returns besides the output."""

    lse: Tensor  # (B, H, N), of the sparse branch
    block_map: Tensor  # (B, H, T_m, T_n): bool, or the real-valued mask m when mode="soft"
    sparsity: float  # 1 - K / T_n, from shapes alone


# ---- arguments --------------------------------------------------------------------------------


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _check_layout(tensors: tuple[Tensor, ...], layout: str) -> None:
    _check_choice("layout", layout, ("BNHD", "BHND"))
    shapes = [tuple(t.shape) for t in tensors]
    if len(shapes[0]) != 4 or len(set(shapes)) != 1:
        raise ValueError(f"q, k, v have shapes {shapes}; allowed: one 4-D shape, {layout}")


def _to_bhnd(x: Tensor, layout: str) -> Tensor:
    return x.transpose(1, 2) if layout == "BNHD" else x


def _precision(
    dtype: torch.dtype, compute: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of the arithmetic, 16-bit dtype to round to or None)."""
    if compute in (torch.bfloat16, torch.float16):
        return torch.float32, compute
    if compute not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"compute_dtype is {compute}; allowed: None, float64, float32, float16, bfloat16"
        )
    default = torch.float64 if dtype == torch.float64 else torch.float32
    return compute or default, None


def _prepare(
    tensors: tuple[Tensor, ...], layout: str, compute_dtype: torch.dtype | None
) -> tuple[list[Tensor], torch.dtype | None]:
    """Inputs as (B, H, N, D) in the dtype of the arithmetic, and the dtype to round to or None."""
    _check_layout(tensors, layout)
    dtype, low = _precision(tensors[0].dtype, compute_dtype)
    return [rounded(_to_bhnd(t, layout).to(dtype), low) for t in tensors], low


def _finish(out: Tensor, layout: str, dtype: torch.dtype, low: torch.dtype | None) -> Tensor:
    return _to_bhnd(rounded(out, low), layout).to(dtype).contiguous()


def _count(topk: float, num_kv_blocks: int | None, total: int) -> int:
    """K: `num_kv_blocks`, or max(1, int(topk T_n))."""
    if num_kv_blocks is None:
        if not isinstance(topk, float):
            raise TypeError(f"topk is {topk!r}, a fraction in (0, 1] is needed; see num_kv_blocks")
        if not 0.0 < topk <= 1.0:
            raise ValueError(f"topk is {topk}; allowed: (0, 1]; see num_kv_blocks for a count")
        return max(1, int(topk * total))
    if not 1 <= num_kv_blocks <= total:
        raise ValueError(f"num_kv_blocks is {num_kv_blocks}; allowed: 1 to T_n = {total}")
    return num_kv_blocks


def _pinned(pinned_kv: Any, device: torch.device) -> Tensor | None:
    return None if pinned_kv is None else torch.as_tensor(pinned_kv, device=device).long().flatten()


def _dense_map(block_map: Any, q: Tensor, block_q: int, block_k: int) -> Tensor:
    """The bool map (B, H, T_m, T_n) of a tensor or of an object with `.to_dense()`."""
    dense = block_map if isinstance(block_map, Tensor) else block_map.to_dense()
    batch, heads, num_tokens, _ = q.shape
    shape = (batch, heads, num_blocks(num_tokens, block_q), num_blocks(num_tokens, block_k))
    if dense.dtype != torch.bool or tuple(dense.shape) != shape:
        raise ValueError(
            f"block_map is {dense.dtype} {tuple(dense.shape)}; "
            f"allowed: bool (B, H, T_m, T_n) = {shape}"
        )
    return dense.to(q.device)


# ---- public operations ------------------------------------------------------------------------


def route(
    q: Tensor,
    k: Tensor,
    *,
    proj_q: Tensor,
    proj_k: Tensor,
    topk: float = 0.03,
    num_kv_blocks: int | None = None,
    pinned_kv: Any = None,
    smooth_k: bool = True,
    layout: str = "BNHD",
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> Tensor:
    """The hard block map (Alg. 2), bool (B, H, T_m, T_n): `sla2.route(...).to_dense()`."""
    (q, k), _ = _prepare((q, k), layout, None)
    k = smooth_keys(k) if smooth_k else k
    scores = router_scores(pool_blocks(q, block_q), pool_blocks(k, block_k), proj_q, proj_k)
    count = _count(topk, num_kv_blocks, scores.shape[-1])
    return hard_map(scores, count, _pinned(pinned_kv, q.device))


def sla2_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    alpha_logit: Tensor,
    topk: float = 0.03,
    num_kv_blocks: int | None = None,
    scale: float | None = None,
    quant: str = "none",
    mode: str = "hard",
    tau: float = 0.1,
    router_score: str = "scaled",
    smooth_k: bool = True,
    phi_input: str = "smoothed",
    pinned_kv: Any = None,
    block_map: Any = None,
    layout: str = "BNHD",
    return_aux: bool = False,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """SLA2 attention (Alg. 2): O = alpha (.) O_s + (1 - alpha) (.) O_l.

    q, k, v: (B, N, H, D), or (B, H, N, D) with layout="BHND", any floating dtype; the output has
    q's shape and dtype. proj_q, proj_k: (D, D) or (H, D, D), None only with a block_map.
    alpha_logit: (T_m,), (H, T_m) or (H, N). block_map: bool (B, H, T_m, T_n) or an object with
    `.to_dense()`; hard mode only. mode="soft" replaces the hard map by SoftTop-k with temperature
    tau: sparse weights softmax(S + log m), linear weights 1 - m, gradients to proj_q and proj_k.
    The router's 1/sqrt(D) does not follow `scale`. Raises ValueError or TypeError for an argument
    outside its range.
    """
    _check_choice("quant", quant, QUANT_MODES)
    _check_choice("mode", mode, ("hard", "soft"))
    _check_choice("phi_input", phi_input, ("smoothed", "raw"))
    if mode == "soft" and (quant != "none" or block_map is not None):
        raise ValueError(f"mode='soft' needs quant='none' and no block_map; quant is {quant!r}")
    dtype = q.dtype
    (q, k_raw, v), low = _prepare((q, k, v), layout, compute_dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, num_tokens, _ = q.shape
    if q.numel() == 0:
        query_blocks, key_blocks = num_blocks(num_tokens, block_q), num_blocks(num_tokens, block_k)
        empty = q.new_zeros(batch, heads, query_blocks, key_blocks, dtype=torch.bool)
        out = _finish(q + k_raw + v, layout, dtype, low)
        return (out, Aux(q.new_empty(batch, heads, num_tokens), empty, 0.0)) if return_aux else out

    k = smooth_keys(k_raw) if smooth_k else k_raw
    bias = None
    if block_map is not None:
        listed = _dense_map(block_map, q, block_q, block_k)
        mask, weights = listed, (~listed).to(q.dtype)
        count = int(listed.sum(dim=-1).max())
    else:
        if proj_q is None or proj_k is None:
            raise ValueError("proj_q and proj_k are None; allowed only together with a block_map")
        q_bar, k_bar = pool_blocks(q, block_q), pool_blocks(k, block_k)
        scores = router_scores(q_bar, k_bar, proj_q, proj_k, router_score)
        count, pinned = _count(topk, num_kv_blocks, scores.shape[-1]), _pinned(pinned_kv, q.device)
        if mode == "soft":
            mask, bias = soft_topk_with_log(scores, count, tau, pinned)
            listed, weights = mask.detach() > 0, 1 - mask
        else:
            mask = listed = hard_map(scores, count, pinned)
            weights = (~listed).to(q.dtype)

    blocks: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "low": low}
    if quant == "none":
        o_s, lse = sparse_branch(q, k, v, listed, scale=scale, bias=bias, **blocks)
    else:
        o_s, lse = sparse_branch_quantized(q, k, v, listed, scale=scale, quant=quant, **blocks)
    k_phi = k_raw if phi_input == "raw" else k
    o_l = linear_branch(q, k_phi, v, weights, **blocks)
    alpha = alpha_per_token(alpha_logit, heads, num_tokens, block_q, q.dtype)
    has_list = expand_rows(listed.any(dim=-1), block_q, num_tokens, -1)
    empty = expand_rows((weights == 0).all(dim=-1), block_q, num_tokens, -1)
    alpha = effective_alpha(alpha, has_list, empty)
    out = blend(o_s, o_l, alpha)
    if quant == "int8_fp8":
        o_l = linear_branch_fp8(q, k_phi, v, weights, **blocks)
        out = straight_through(blend(o_s, o_l, alpha), out)
    out = _finish(out, layout, dtype, low)
    if not return_aux:
        return out
    return out, Aux(lse, mask, 1.0 - count / mask.shape[-1])


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Any,
    *,
    scale: float | None = None,
    quant: str = "none",
    smooth_k: bool = True,
    layout: str = "BNHD",
    return_lse: bool = False,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """O_s alone: softmax attention over the listed key blocks; lse (B, H, N) with `return_lse`."""
    _check_choice("quant", quant, QUANT_MODES)
    dtype = q.dtype
    (q, k, v), low = _prepare((q, k, v), layout, compute_dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    listed = _dense_map(block_map, q, block_q, block_k)
    if q.numel() == 0:
        o_s, lse = q + k + v, q.new_empty(q.shape[:3])
    else:
        k = smooth_keys(k) if smooth_k else k
        blocks: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "low": low}
        if quant == "none":
            o_s, lse = sparse_branch(q, k, v, listed, scale=scale, **blocks)
        else:
            o_s, lse = sparse_branch_quantized(q, k, v, listed, scale=scale, quant=quant, **blocks)
    out = _finish(o_s, layout, dtype, low)
    return (out, lse) if return_lse else out


def complement_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Any,
    *,
    smooth_k: bool = True,
    phi_input: str = "smoothed",
    layout: str = "BNHD",
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """O_l alone: linear attention over the key blocks that are not listed."""
    _check_choice("phi_input", phi_input, ("smoothed", "raw"))
    dtype = q.dtype
    (q, k, v), low = _prepare((q, k, v), layout, compute_dtype)
    listed = _dense_map(block_map, q, block_q, block_k)
    if q.numel() == 0:
        return _finish(q + k + v, layout, dtype, low)
    k = smooth_keys(k) if smooth_k and phi_input == "smoothed" else k
    weights = (~listed).to(q.dtype)
    o_l = linear_branch(q, k, v, weights, block_q=block_q, block_k=block_k, low=low)
    return _finish(o_l, layout, dtype, low)


# ---- sampled rows of large problems -----------------------------------------------------------


def rows_of_blocks(query_blocks: Tensor, num_tokens: int, block_q: int = BLOCK_Q) -> Tensor:
    """Token indices of the given query blocks, block after block: int64 (R,)."""
    starts = query_blocks.long()[:, None] * block_q
    rows = (starts + torch.arange(block_q, device=query_blocks.device)).flatten()
    return rows[rows < num_tokens]


def _state_of_blocks(
    phi_k: Tensor, v: Tensor, weights: Tensor, block_k: int, low: torch.dtype | None, *, fp8: bool
) -> tuple[Tensor, Tensor]:
    """H_i, Z_i of one head from phi(K), V (N, D) and weights (I, T_n), 64 key blocks at a time.

    fp8: states in e4m3, as in `linear_branch_fp8`.
    """
    num_tokens, dim = v.shape
    amax = channel_amax(v[None, None])
    state, norm = v.new_zeros(len(weights), dim * dim), v.new_zeros(len(weights), dim)
    step = 64 * block_k
    for start in range(0, num_tokens, step):
        part = slice(start, start + step)
        h, z = block_states(phi_k[None, None, part], v[None, None, part], block_k)
        h = quantize_states_fp8(h, amax, block_k).to(h.dtype) if fp8 else rounded(h, low)
        w = weights[:, start // block_k :][:, : z.shape[2]]
        state += w @ h[0, 0].flatten(1)
        norm += w @ rounded(z[0, 0], low)
    if fp8:
        state *= state_scale(amax, block_k)[0, 0].to(state.dtype)
    return state, norm


@torch.no_grad()
def sla2_attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_blocks: Tensor,
    block_map: Any,
    alpha_logit: Tensor,
    scale: float | None = None,
    quant: str = "none",
    smooth_k: bool = True,
    phi_input: str = "smoothed",
    layout: str = "BNHD",
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of `query_blocks` (int64 (I,)) of hard-mode `sla2_attention`, lean in memory.

    Gathers the listed key blocks alone and sums the linear states over the key blocks, one head at
    a time. Arguments are those of `sla2_attention`; block_map is required; no gradient. Returns
    (out, o_s, o_l, lse) in the dtype of the arithmetic: three (B, R, H, D) (in `layout`) and
    (B, H, R), rows in the order of `rows_of_blocks(query_blocks, N)`; o_s and o_l as `quant` makes
    them.
    """
    _check_choice("quant", quant, QUANT_MODES)
    _check_choice("phi_input", phi_input, ("smoothed", "raw"))
    _check_layout((q, k, v), layout)
    dtype, low = _precision(q.dtype, compute_dtype)
    q, k, v = (_to_bhnd(t, layout) for t in (q, k, v))
    batch, heads, num_tokens, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    query_blocks = query_blocks.to(q.device)
    listed = _dense_map(block_map, q, block_q, block_k)[:, :, query_blocks]
    rows = rows_of_blocks(query_blocks, num_tokens, block_q)
    chunks = [rows_of_blocks(i[None], num_tokens, block_q) for i in query_blocks]
    alpha = alpha_per_token(alpha_logit, heads, num_tokens, block_q, dtype)[..., rows]
    o_s = torch.empty(batch, heads, len(rows), dim, dtype=dtype, device=q.device)
    o_l, lse = torch.empty_like(o_s), torch.empty_like(o_s[..., 0])

    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        q_h, k_raw, v_h = (rounded(t[b, h].to(dtype), low) for t in (q, k, v))
        k_h = smooth_keys(k_raw) if smooth_k else k_raw
        if quant != "none":
            k8, scale_k = (t[0, 0] for t in quantize_per_block(k_h[None, None], block_k))
            v_low, channel = (t[0, 0] for t in quantize_v(v_h[None, None], quant))
        first = 0
        for i, chunk in enumerate(chunks):
            chosen = listed[b, h, i].nonzero().flatten()
            keys = rows_of_blocks(chosen, num_tokens, block_k)
            out = slice(first, first + len(chunk))
            first += len(chunk)
            if len(keys) == 0:
                o_s[b, h, out], lse[b, h, out] = 0.0, -torch.inf
            elif quant == "none":
                s = matmul(q_h[chunk], k_h[keys].mT, low) * scale
                o_s[b, h, out], lse[b, h, out] = attend(s, v_h[keys], low)
            else:
                q8, scale_q = (t[0, 0] for t in quantize_per_block(q_h[None, None, chunk], block_q))
                pair_scale = scale_q * scale_k[keys // block_k] * scale
                s2 = quantized_scores(q8, k8[keys], pair_scale)
                o_s[b, h, out], lse[b, h, out] = attend_quantized(s2, v_low[keys], channel, quant)

        fp8 = quant == "int8_fp8"
        phi_k = feature_map(k_raw if phi_input == "raw" else k_h)
        phi_k = rounded(phi_k, torch.bfloat16 if fp8 else low)
        weights = (~listed[b, h]).to(dtype)
        state, norm = _state_of_blocks(phi_k, v_h, weights, block_k, low, fp8=fp8)
        for i, chunk in enumerate(chunks):
            first = sum(map(len, chunks[:i]))
            phi_q = feature_map(q_h[chunk])[None]
            empty = listed[b, h, i].all()[None]
            o_l[b, h, first : first + len(chunk)] = apply_state(
                phi_q, state[i : i + 1], norm[i : i + 1], empty, low
            )[0]

    has_list, empty = (
        torch.cat([flag[..., i, None].expand(-1, -1, len(c)) for i, c in enumerate(chunks)], dim=-1)
        for flag in (listed.any(dim=-1), listed.all(dim=-1))
    )
    o = blend(o_s, o_l, effective_alpha(alpha, has_list, empty))
    o, o_s, o_l = (_to_bhnd(rounded(t, low), layout).contiguous() for t in (o, o_s, o_l))
    return o, o_s, o_l, lse
