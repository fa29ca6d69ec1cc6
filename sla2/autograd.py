"""Gradient formulas of the operators in `sla2.ops`: what is saved, which operator differentiates.

The gradient is an operator too, `sla2::attn_bwd`, so compiled graphs hold forward and backward
alike. The block lists, lse and the saved O_s are not differentiable, and neither is a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]


def keep_needed(ctx: Any, grads: Grads) -> Grads:
    return tuple(
        grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True)
    )


def _check_saved(saved: bool) -> None:
    if not saved:
        raise RuntimeError(
            "this forward pass ran with save_for_backward=False and cannot be differentiated; call "
            "sla2.sla2_attention, which sets it when an input requires grad"
        )


def _attn_grads(ctx: Any, grad_out: Tensor) -> Grads:
    _check_saved(ctx.saved)
    return torch.ops.sla2.attn_bwd(grad_out, *ctx.saved_tensors, *ctx.options)


def attn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, lut, counts, alpha_logit, scale, _, branch, smooth_k, phi_input, layout, saved = inputs
    out, lse, out_sparse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, out_sparse)
    ctx.saved = saved
    if branch == "sparse":
        out_sparse = out  # the same thing, not stored twice
    if saved:
        ctx.save_for_backward(q, k, v, out_sparse, lse, lut, counts, alpha_logit)
    ctx.options = (scale, branch, smooth_k, phi_input, layout)


def attn_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Grads:
    if grad_out is None:
        return (None,) * 13
    dq, dk, dv, dalpha = _attn_grads(ctx, grad_out)
    return keep_needed(ctx, (dq, dk, dv, None, None, dalpha) + (None,) * 7)


def route_attn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, alpha_logit, _, _, scale, _, smooth_k, phi_input, layout, saved = inputs
    _, lse, out_sparse, lut, counts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, out_sparse, lut, counts)
    ctx.saved = saved
    if saved:
        ctx.save_for_backward(q, k, v, out_sparse, lse, lut, counts, alpha_logit)
    ctx.options = (scale, "both", smooth_k, phi_input, layout)


def route_attn_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> Grads:
    if grad_out is None:
        return (None,) * 14
    dq, dk, dv, dalpha = _attn_grads(ctx, grad_out)
    return keep_needed(ctx, (dq, dk, dv, None, None, dalpha) + (None,) * 8)


def no_second_order(ctx: Any, *_: Any) -> Grads:
    raise RuntimeError(
        "second-order gradients of SLA2 attention are not implemented (create_graph=True followed "
        "by another backward pass)"
    )
