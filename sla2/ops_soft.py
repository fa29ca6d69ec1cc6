"""Stage 1 as PyTorch operators: attention under the SoftTop-k mask, and its gradients.

`sla2::soft_fwd` and `sla2::soft_bwd`, conventions as in `sla2.ops`. The CPU runs `sla2.blockwise`.
On CUDA block means and their products, the scores P_c (B, H, T_m, T_n) and what becomes of their
gradient, come from `sla2.blockwise` too, which does not wait for the device there; the mask m of
the scores and everything of N tokens is kernels. These attend to the key blocks with m >=
SOFT_MAP_MIN. Pinned key blocks have the mask 1 and no gradient, so the backward pass need not know
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blockwise
from .autograd import Grads, keep_needed, no_second_order
from .checks import check_pinned_range, num_k_blocks, num_q_blocks
from .constants import BLOCK_K, BLOCK_Q
from .ops import (
    _DTYPES,
    _attn_fwd_cuda,
    _extension,
    bnhd,
    check_device,
    empty_grads,
    empty_like,
    in_layout,
    lse_dtype,
    new_lse,
    sizes,
)
from .ops_bwd import _attn_bwd_cuda


def _new_mask(q: Tensor, layout: str) -> Tensor:
    b, n, h, _ = sizes(q, layout)
    return q.new_empty((b, h, num_q_blocks(n), num_k_blocks(n)), dtype=lse_dtype(q))


def _shape(q: Tensor, layout: str) -> tuple[int, int, int, int, int]:
    return *sizes(q, layout), _DTYPES[q.dtype]


def _soft_top_k_cuda_(
    scores: Tensor,
    shape: tuple[int, ...],
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    tau: float,
) -> None:
    """`blockwise.router.soft_top_k` in place: (B, H, T_m, T_n) contiguous float32 P_c become m."""
    with torch.cuda.device(scores.device):
        if pinned_kv is not None:
            pinned_kv = pinned_kv.to(torch.int32).contiguous()
        _extension().soft_map(
            shape=shape,
            tau=tau,
            scores=scores.data_ptr(),
            pinned_kv=0 if pinned_kv is None else pinned_kv.data_ptr(),
            num_pinned=0 if pinned_kv is None else pinned_kv.shape[0],
            num_kv_blocks=num_kv_blocks,
            soft_map=scores.data_ptr(),
            stream=torch.cuda.current_stream(scores.device).cuda_stream,
        )


def _soft_top_k_bwd_cuda_(
    grad_log: Tensor, mask: Tensor, shape: tuple[int, ...], tau: float
) -> None:
    """The gradient of log m, contiguous float32 like the mask, becomes that of P_c."""
    with torch.cuda.device(mask.device):
        _extension().soft_map_bwd(
            shape=shape,
            tau=tau,
            soft_map=mask.data_ptr(),
            grad_log_map=grad_log.data_ptr(),
            grad_scores=grad_log.data_ptr(),
            stream=torch.cuda.current_stream(mask.device).cuda_stream,
        )


def _soft_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    alpha_logit: Tensor,
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    tau: float,
    router_score: str,
    scale: float,
    smooth_k: bool,
    phi_input: str,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attention with the SoftTop-k mask in place of M: out, lse, out_sparse and the mask."""
    check_device(q)
    if q.numel() == 0:
        mask = _new_mask(q, layout).zero_()
        return empty_like(q), new_lse(q, layout), empty_like(q), mask
    # torch.matmul picks its algorithm by requires_grad; eager and compiled should agree.
    projs = proj_q.detach(), proj_k.detach()
    if q.device.type == "cuda":
        mask = blockwise.soft_scores(
            bnhd(q, layout), bnhd(k, layout), *projs, router_score=router_score, smooth_k=smooth_k
        )
        _soft_top_k_cuda_(mask, _shape(q, layout), pinned_kv, num_kv_blocks, tau)
        fwd = _attn_fwd_cuda(
            q, k, v, None, None, alpha_logit, None, scale, "none", "both", smooth_k, phi_input,
            layout, True, mask,
        )  # fmt: skip
        return *fwd, mask
    check_pinned_range(pinned_kv, sizes(q, layout)[1])
    out, lse, out_sparse, mask = blockwise.soft_fwd(
        bnhd(q, layout),
        bnhd(k, layout),
        bnhd(v, layout),
        *projs,
        alpha_logit,
        num_kv_blocks=num_kv_blocks,
        pinned_kv=pinned_kv,
        tau=tau,
        router_score=router_score,
        scale=scale,
        smooth_k=smooth_k,
        phi_input=phi_input,
    )
    return in_layout(out, layout), lse, in_layout(out_sparse, layout), mask


def _soft_bwd(
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
    tau: float,
    router_score: str,
    scale: float,
    smooth_k: bool,
    phi_input: str,
    layout: str,
) -> tuple[Tensor, ...]:
    """Gradients of `soft_fwd` with respect to q, k, v, proj_q, proj_k and alpha_logit."""
    check_device(q)
    if q.numel() == 0:
        zeros = (empty_like(x).zero_() for x in (proj_q, proj_k, alpha_logit))
        return *empty_grads(q, k, v), *zeros
    if q.device.type == "cuda":
        *grads, grad_alpha, grad_log = _attn_bwd_cuda(
            grad_out, q, k, v, out_sparse, lse, None, None, alpha_logit, scale, "both", smooth_k,
            phi_input, layout, mask,
        )  # fmt: skip
        _soft_top_k_bwd_cuda_(grad_log, mask.contiguous(), _shape(q, layout), tau)
        *grad_projs, dq_block, dk_block = blockwise.soft_scores_backward(
            bnhd(q, layout),
            bnhd(k, layout),
            proj_q.detach(),
            proj_k.detach(),
            grad_log,
            router_score=router_score,
            smooth_k=smooth_k,
        )
        blockwise.add_to_blocks_(bnhd(grads[0], layout), dq_block, BLOCK_Q)
        blockwise.add_to_blocks_(bnhd(grads[1], layout), dk_block, BLOCK_K)
        return *grads, *grad_projs, grad_alpha
    dq, dk, dv, *params = blockwise.soft_bwd(
        bnhd(grad_out, layout),
        bnhd(q, layout),
        bnhd(k, layout),
        bnhd(v, layout),
        bnhd(out_sparse, layout),
        lse,
        mask,
        proj_q.detach(),
        proj_k.detach(),
        alpha_logit,
        tau=tau,
        router_score=router_score,
        scale=scale,
        smooth_k=smooth_k,
        phi_input=phi_input,
    )
    return *(in_layout(x, layout) for x in (dq, dk, dv)), *params


# ---- registration -------------------------------------------------------------------------------

_QKV = "Tensor q, Tensor k, Tensor v"
_ROUTER = "Tensor? pinned_kv, SymInt num_kv_blocks"
_OPTIONS = "float tau, str router_score, float scale, bool smooth_k, str phi_input, str layout"

soft_fwd = torch.library.custom_op(
    "sla2::soft_fwd",
    _soft_fwd,
    mutates_args=(),
    schema=f"({_QKV}, Tensor proj_q, Tensor proj_k, Tensor alpha_logit, {_ROUTER}, {_OPTIONS}) "
    "-> (Tensor out, Tensor lse, Tensor out_sparse, Tensor mask)",
)
soft_bwd = torch.library.custom_op(
    "sla2::soft_bwd",
    _soft_bwd,
    mutates_args=(),
    schema=f"(Tensor grad_out, {_QKV}, Tensor out_sparse, Tensor lse, Tensor mask, Tensor proj_q, "
    f"Tensor proj_k, Tensor alpha_logit, {_OPTIONS}) -> (Tensor grad_q, Tensor grad_k, "
    "Tensor grad_v, Tensor grad_proj_q, Tensor grad_proj_k, Tensor grad_alpha_logit)",
)


@soft_fwd.register_fake
def _soft_fwd_fake(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layout = args[12]
    return empty_like(q), new_lse(q, layout), empty_like(q), _new_mask(q, layout)


@soft_bwd.register_fake
def _soft_bwd_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return *empty_grads(q, k, v), *(empty_like(x) for x in args[3:6])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, proj_q, proj_k, alpha_logit, _, _, *options = inputs
    _, lse, out_sparse, mask = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, out_sparse, mask)
    ctx.save_for_backward(q, k, v, out_sparse, lse, mask, proj_q, proj_k, alpha_logit)
    ctx.options = tuple(options)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Grads:
    if grad_out is None:
        return (None,) * 14
    grads = torch.ops.sla2.soft_bwd(grad_out, *ctx.saved_tensors, *ctx.options)
    return keep_needed(ctx, tuple(grads) + (None,) * 8)


soft_fwd.register_autograd(_backward, setup_context=_setup)
soft_bwd.register_autograd(no_second_order)
