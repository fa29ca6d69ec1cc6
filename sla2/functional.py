"""SLA2 attention as functions: softmax attention over a few key blocks, linear over the rest.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675.

Sizes: B batch, N tokens, H heads, D head_dim, T_m = ceil(N / 128) query blocks, T_n = ceil(N / 64)
key blocks. q, k, v are (B, N, H, D), or (B, H, N, D) with layout="BHND"; the last stride is 1, the
others are free. On CUDA they are bfloat16 or float16 with D 64 or 128 (memory that is not 16-byte
aligned is copied); the CPU takes float32 and float64 too, and any D. Under autocast q, k, v are
cast to its dtype; the router and alpha stay float32. Inputs are never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, ops_soft
from . import ops_bwd as ops_bwd  # registers the gradient of what ops registers
from .block_map import BlockMap
from .checks import (
    MODES,
    PHI_INPUTS,
    ROUTER_SCORES,
    Shape,
    check_alpha,
    check_block_map_fits,
    check_choice,
    check_flag,
    check_pinned,
    check_qkv,
    check_quant,
    check_router,
    check_router_frozen,
    check_scale,
    check_tau,
    resolve_num_kv_blocks,
)


class Aux(NamedTuple):
    """What `sla2_attention(..., return_aux=True)` returns besides the output."""

    lse: Tensor
    """(B, H, N) float32 (float64 for float64 inputs): log-sum-exp of the sparse branch's logits."""
    block_map: BlockMap | Tensor
    """The hard map; with mode="soft" the SoftTop-k mask m, (B, H, T_m, T_n) float32."""
    sparsity: float
    """1 - K / T_n, from shapes alone."""


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on; it casts all floating types but float64."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors  # reported by the checks
    device = first.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_block_map(block_map: BlockMap, q: Tensor, shape: Shape) -> None:
    if not isinstance(block_map, BlockMap):
        raise TypeError(
            f"block_map must be a sla2.BlockMap; got {type(block_map).__name__}. sla2.route makes "
            "one, and BlockMap.from_dense(mask, seqlen) one of a bool mask (B, H, T_m, T_n)"
        )
    lut = block_map.lut
    check_block_map_fits(lut.shape, block_map.seqlen, lut.device, q, shape)


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
    pinned_kv: Tensor | None = None,
    block_map: BlockMap | None = None,
    layout: str = "BNHD",
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, Aux]:
    """O = alpha (.) O_s + (1 - alpha) (.) O_l: the whole SLA2 operation (eq. 11-17, Alg. 2).

    The router picks the K best key blocks of every query block; O_s is softmax attention over
    these, O_l linear attention over all the others. Where every block is picked, O = O_s.

    Args:
        q, k, v: see the module's notes; one shape, dtype and device. k and v have q's N and H.
        proj_q, proj_k: router projections, (D, D) or (H, D, D) float32. Unused with `block_map`,
            and may be None then.
        alpha_logit: (T_m,), (H, T_m) or per token (H, N) float32; alpha = sigmoid(alpha_logit).
        topk: fraction of the key blocks kept, a float in (0, 1]: K = max(1, int(topk * T_n)).
        num_kv_blocks: K itself, in 1..T_n; overrides `topk`.
        scale: softmax scale, by default 1 / sqrt(D). The router's own 1 / sqrt(D) does not follow
        it.
        quant: "none", "int8_fp16" or "int8_fp8": precision of the sparse branch's forward pass;
            "int8_fp8" also keeps the linear branch's states in e4m3. The gradient is always that of
            the unquantised operands.
        mode: "hard", or "soft" for stage 1: the SoftTop-k mask with temperature `tau` on
            `router_score` "scaled", "raw" or "softmax", differentiable in proj_q and proj_k.
            Both need quant="none" in soft mode; `tau` and `router_score` do not affect hard mode.
        smooth_k: subtract K's mean over the tokens first.
        phi_input: "smoothed" or "raw": which K the feature map of the linear branch sees.
        pinned_kv: (P,) integer, distinct key blocks that are always kept and count toward K.
            Indices outside 0..T_n-1 raise ValueError on the CPU and are ignored on CUDA.
        block_map: use this selection instead of the router's (`sla2.route`); hard mode only, and
            without `num_kv_blocks` and `pinned_kv`. `topk` has no effect then.
        layout: "BNHD" or "BHND", of q, k, v and the output.
        return_aux: also return `Aux(lse, block_map, sparsity)`.

    Returns:
        The output, of q's shape and dtype and contiguous; with `return_aux` (output, Aux).

    Raises:
        TypeError: a wrong type or dtype (an integer topk; float32 q, k, v on CUDA).
        ValueError: shapes, strides, devices or options that do not fit.
        RuntimeError: no kernel for this device; proj_q or proj_k requires grad in hard mode; a
            tensor has a tangent of forward mode, which has no implementation.
    """
    check_choice("mode", mode, MODES)
    check_quant(quant)
    check_choice("phi_input", phi_input, PHI_INPUTS)
    check_choice("router_score", router_score, ROUTER_SCORES)
    check_flag("smooth_k", smooth_k)
    check_flag("return_aux", return_aux)
    tau = check_tau(tau)
    q, k, v = _autocast(q, k, v)
    shape = check_qkv(q, k, v, layout)
    check_alpha(alpha_logit, q, shape)
    scale = check_scale(scale, shape)

    if block_map is not None:
        if mode == "soft":
            raise ValueError("block_map is a hard selection: it needs mode='hard'; got mode='soft'")
        if num_kv_blocks is not None or pinned_kv is not None:
            raise ValueError(
                "block_map already is the selection: num_kv_blocks and pinned_kv must be None with "
                "it; pass them to sla2.route"
            )
        _check_block_map(block_map, q, shape)
        out, lse, _ = ops.attn_fwd(
            q,
            k,
            v,
            block_map.lut,
            block_map.counts,
            alpha_logit,
            scale,
            quant,
            "both",
            smooth_k,
            phi_input,
            layout,
            _needs_grad(q, k, v, alpha_logit),
        )
        if not return_aux:
            return out
        return out, Aux(lse, block_map, _sparsity(block_map.num_kv_blocks, shape))

    if proj_q is None or proj_k is None:
        raise TypeError("proj_q and proj_k may only be None together with block_map")
    check_router(proj_q, proj_k, q, shape)
    count = resolve_num_kv_blocks(topk, num_kv_blocks, shape)
    check_pinned(pinned_kv, q, count)
    if mode == "soft":
        if quant != "none":
            raise ValueError(f"mode='soft' is a 16-bit mode: it needs quant='none'; got {quant!r}")
        out, lse, _, mask = ops_soft.soft_fwd(
            q,
            k,
            v,
            proj_q,
            proj_k,
            alpha_logit,
            pinned_kv,
            count,
            tau,
            router_score,
            scale,
            smooth_k,
            phi_input,
            layout,
        )
        return (out, Aux(lse, mask, _sparsity(count, shape))) if return_aux else out

    check_router_frozen(proj_q, proj_k)
    out, lse, _, lut, counts = ops.route_attn_fwd(
        q,
        k,
        v,
        proj_q,
        proj_k,
        alpha_logit,
        pinned_kv,
        count,
        scale,
        quant,
        smooth_k,
        phi_input,
        layout,
        _needs_grad(q, k, v, alpha_logit),
    )
    if not return_aux:
        return out
    block_map = BlockMap._from_router(lut, counts, shape.seqlen)
    return out, Aux(lse, block_map, _sparsity(count, shape))


def _sparsity(num_kv_blocks: int, shape: Shape) -> float:
    return 1.0 - num_kv_blocks / shape.num_k_blocks if shape.seqlen else 0.0


def route(
    q: Tensor,
    k: Tensor,
    *,
    proj_q: Tensor,
    proj_k: Tensor,
    topk: float = 0.03,
    num_kv_blocks: int | None = None,
    pinned_kv: Tensor | None = None,
    smooth_k: bool = True,
    layout: str = "BNHD",
) -> BlockMap:
    """The hard block map (eq. 11-12): per query block the K key blocks with the largest score.

    P_c = (pool(q) proj_q) (pool(k) proj_k)^T in float32 on mean-pooled blocks; ties go to the
    lowest index. Arguments as in `sla2_attention`. The map has no gradient.

    Raises TypeError, ValueError and RuntimeError as `sla2_attention` does.
    """
    check_flag("smooth_k", smooth_k)
    q, k = _autocast(q, k)
    shape = check_qkv(q, k, None, layout)
    check_router(proj_q, proj_k, q, shape)
    count = resolve_num_kv_blocks(topk, num_kv_blocks, shape)
    check_pinned(pinned_kv, q, count)
    lut, counts = ops.route(q, k, proj_q, proj_k, pinned_kv, count, smooth_k, layout)
    return BlockMap._from_router(lut, counts, shape.seqlen)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    scale: float | None = None,
    quant: str = "none",
    smooth_k: bool = True,
    layout: str = "BNHD",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """O_s alone: softmax attention of every query block over its listed key blocks (Alg. 2).

    A query block that lists nothing gives 0 and lse = -inf. Arguments as in `sla2_attention`.
    Differentiable in q, k and v; lse is not.

    Returns the output, of q's shape and dtype; with return_lse also lse (B, H, N) float32, natural
    logarithm, of smoothed K with smooth_k.
    Raises TypeError, ValueError and RuntimeError as `sla2_attention` does.
    """
    check_quant(quant)
    check_flag("smooth_k", smooth_k)
    check_flag("return_lse", return_lse)
    q, k, v = _autocast(q, k, v)
    shape = check_qkv(q, k, v, layout)
    _check_block_map(block_map, q, shape)
    out, lse, _ = ops.attn_fwd(
        q,
        k,
        v,
        block_map.lut,
        block_map.counts,
        None,
        check_scale(scale, shape),
        quant,
        "sparse",
        smooth_k,
        "smoothed",
        layout,
        _needs_grad(q, k, v),
    )
    return (out, lse) if return_lse else out


def complement_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    smooth_k: bool = True,
    phi_input: str = "smoothed",
    layout: str = "BNHD",
) -> Tensor:
    """O_l alone: linear attention of every query block over its unlisted key blocks (Alg. 2).

    phi(Q) H / (phi(Q) Z), where phi is the softmax over head_dim and H, Z sum phi(K)^T V and phi(K)
    over the unlisted blocks. A query block that lists every key block gives 0. Arguments as in
    `sla2_attention`. Differentiable in q, k and v.

    Returns the output, of q's shape and dtype.
    Raises TypeError, ValueError and RuntimeError as `sla2_attention` does.
    """
    check_choice("phi_input", phi_input, PHI_INPUTS)
    check_flag("smooth_k", smooth_k)
    q, k, v = _autocast(q, k, v)
    shape = check_qkv(q, k, v, layout)
    _check_block_map(block_map, q, shape)
    out, _, _ = ops.attn_fwd(
        q,
        k,
        v,
        block_map.lut,
        block_map.counts,
        None,
        1.0,  # the softmax scale: no part of this branch
        "none",
        "linear",
        smooth_k,
        phi_input,
        layout,
        _needs_grad(q, k, v),
    )
    return out
