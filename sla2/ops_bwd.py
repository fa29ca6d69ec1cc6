"""The gradients of `sla2.ops` as an operator, `sla2::attn_bwd`, that `sla2.autograd` calls.

Conventions as in `sla2.ops`: the CPU runs `sla2.blockwise`, CUDA the kernels. `sla2.ops_soft` calls
these too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blockwise
from .autograd import no_second_order
from .ops import (
    _BRANCHES,
    _DTYPES,
    _PATHS,
    _alpha_operand,
    _extension,
    _kernel_input,
    _operand,
    bnhd,
    check_device,
    current_path,
    empty_grads,
    empty_like,
    in_layout,
    list_operand,
    sizes,
)


def _new_grad_alpha(q: Tensor, alpha_logit: Tensor | None) -> Tensor:
    return q.new_empty((0,)) if alpha_logit is None else empty_like(alpha_logit)


def _attn_bwd_cuda(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_sparse: Tensor,
    lse: Tensor,
    lut: Tensor | None,
    counts: Tensor | None,
    alpha_logit: Tensor | None,
    scale: float,
    branch: str,
    smooth_k: bool,
    phi_input: str,
    layout: str,
    soft_map: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`_attn_bwd` by the kernels; with `soft_map` instead of lists, also the gradient of log m."""
    ext = _extension()
    b, n, h, d = sizes(q, layout)
    with torch.cuda.device(q.device):
        grads = empty_grads(q, k, v)
        grad_alpha = _new_grad_alpha(q, alpha_logit)
        grad_log_map = None if soft_map is None else empty_like(soft_map)
        # Copies stay referenced until the launch; the allocator orders their reuse on this stream.
        q, k, v, grad_out = (_kernel_input(bnhd(x, layout)) for x in (q, k, v, grad_out))
        if branch != "linear":
            out_sparse, lse = _kernel_input(bnhd(out_sparse, layout)), lse.contiguous()
        if lut is not None and counts is not None:
            lut, counts = lut.contiguous(), counts.contiguous()
        lists = list_operand(lut, counts)
        if soft_map is not None:
            soft_map = soft_map.contiguous()
        if alpha_logit is not None:
            alpha_logit = alpha_logit.contiguous()
        alpha = _alpha_operand(alpha_logit, n)
        shape = (b, n, h, d, _DTYPES[q.dtype])
        path = _PATHS["portable" if soft_map is not None else current_path()]
        options = (_BRANCHES[branch], path, phi_input == "raw", smooth_k, scale)
        size = ext.attn_bwd_workspace(
            shape=shape,
            options=options,
            alpha_per_token=alpha is not None and alpha[2],
            soft=soft_map is not None,
            max_kv_blocks=lists[2],
        )
        workspace = q.new_empty((size,), dtype=torch.uint8)
        grad_q, grad_k, grad_v = (_operand(bnhd(x, layout)) for x in grads)
        ext.attn_bwd(
            shape=shape,
            options=options,
            q=_operand(q),
            k=_operand(k),
            v=_operand(v),
            grad_out=_operand(grad_out),
            out_sparse=_operand(out_sparse) if branch != "linear" else None,
            lse=lse.data_ptr(),
            alpha=alpha,
            lists=lists,
            grad_q=grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
            grad_alpha_logit=grad_alpha.data_ptr() if branch == "both" else 0,
            soft_map=0 if soft_map is None else soft_map.data_ptr(),
            grad_log_map=0 if grad_log_map is None else grad_log_map.data_ptr(),
            workspace=(workspace.data_ptr(), size),
            stream=torch.cuda.current_stream(q.device).cuda_stream,
        )
    made = (*grads, grad_alpha)
    return made if grad_log_map is None else (*made, grad_log_map)


def _attn_bwd(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_sparse: Tensor,
    lse: Tensor,
    lut: Tensor,
    counts: Tensor,
    alpha_logit: Tensor | None,
    scale: float,
    branch: str,
    smooth_k: bool,
    phi_input: str,
    layout: str,
) -> tuple[Tensor, ...]:
    """Gradients of `attn_fwd`, on the unquantised inputs whatever `quant` was.

    The gradient of alpha_logit is empty where there is none.
    """
    check_device(q)
    if q.numel() == 0:
        return *empty_grads(q, k, v), _new_grad_alpha(q, alpha_logit).zero_()
    if q.device.type == "cuda":
        rest: tuple[Any, ...] = (scale, branch, smooth_k, phi_input, layout)
        return _attn_bwd_cuda(grad_out, q, k, v, out_sparse, lse, lut, counts, alpha_logit, *rest)
    grad_q, grad_k, grad_v, grad_alpha = blockwise.attn_bwd(
        bnhd(grad_out, layout),
        bnhd(q, layout),
        bnhd(k, layout),
        bnhd(v, layout),
        bnhd(out_sparse, layout) if branch != "linear" else out_sparse,
        lse,
        lut,
        counts,
        alpha_logit,
        scale=scale,
        branch=branch,
        smooth_k=smooth_k,
        phi_input=phi_input,
    )
    if grad_alpha is None:
        grad_alpha = q.new_empty((0,))
    grads = (in_layout(g, layout) for g in (grad_q, grad_k, grad_v))
    return *grads, grad_alpha


attn_bwd = torch.library.custom_op(
    "sla2::attn_bwd",
    _attn_bwd,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out_sparse, Tensor lse, "
    "Tensor lut, Tensor counts, Tensor? alpha_logit, float scale, str branch, bool smooth_k, "
    "str phi_input, str layout) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_alpha_logit)",
)


@attn_bwd.register_fake
def _attn_bwd_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    alpha_logit = args[4]
    return *empty_grads(q, k, v), _new_grad_alpha(q, alpha_logit)


attn_bwd.register_autograd(no_second_order)
