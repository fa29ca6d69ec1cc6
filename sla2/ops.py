"""SLA2 as PyTorch operators, `torch.ops.sla2.*`: routing and the hard forward pass.

`sla2.ops_bwd` has their gradients, `sla2.ops_soft` stage 1 and `sla2.rotary` the models' rotary
embedding. These four are the only callers of the compiled module `_C`.

Each operator is functional: it writes no input, its outputs are new contiguous tensors, and its
fake gives their shapes from symbolic sizes, so `torch.compile`, CUDA graphs, selective
checkpointing and export see one opaque node. q, k, v, the output and their gradients are in
`layout`, "BNHD" or "BHND".

Devices: the CPU runs `sla2.blockwise`, CUDA the kernels; of the soft mode block means and router
scores are PyTorch's on either.

The kernels read 16 bytes at a time. A CUDA tensor whose address, or batch, token or head stride, is
not a multiple of 16 bytes is copied first; any other strides, zero included, are used as they are.

A call takes the kernels "sm90" where they can serve it, else "portable"; `kernel_path` (or the
environment variable SLA2_PATH, read once at import) forces one set, for tests and benchmarks.
The soft mode is portable whatever it says.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from . import autograd, blockwise
from .checks import check_choice, check_pinned_range, num_q_blocks

_PATHS = {"auto": 0, "portable": 1, "sm90": 2}
_DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_QUANTS = {"none": 0, "int8_fp16": 1, "int8_fp8": 2}
_BRANCHES = {"both": 0, "sparse": 1, "linear": 2}

_ALIGNMENT = 16  # bytes of the kernels' loads


def _initial_path() -> str:
    name = os.environ.get("SLA2_PATH", "auto")
    check_choice("environment variable SLA2_PATH", name, tuple(_PATHS))
    return name


_DEFAULT_PATH = _initial_path()
_path: ContextVar[str] = ContextVar("sla2_kernel_path", default=_DEFAULT_PATH)
current_path = _path.get  # the name of what kernel_path has chosen


@contextlib.contextmanager
def kernel_path(name: str) -> Iterator[None]:
    """Forces the kernels "portable" or "sm90" on this thread's calls in the block; "auto" chooses.

    A call that forced ones cannot serve raises RuntimeError. Gradients that autograd computes on a
    thread of its own keep that thread's choice. Raises ValueError for another name.
    """
    check_choice("kernel path", name, tuple(_PATHS))
    token = _path.set(name)
    try:
        yield
    finally:
        _path.reset(token)


# ---- helpers ------------------------------------------------------------------------------------


def bnhd(x: Tensor, layout: str) -> Tensor:
    return x if layout == "BNHD" else x.transpose(1, 2)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """A (B, N, H, D) result as a contiguous tensor in `layout`."""
    return bnhd(x, layout).contiguous()


def sizes(q: Tensor, layout: str) -> tuple[int, int, int, int]:
    """B, N, H, D."""
    a, b, c, d = q.shape
    return (a, b, c, d) if layout == "BNHD" else (a, c, b, d)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def new_lse(q: Tensor, layout: str) -> Tensor:
    b, n, h, _ = sizes(q, layout)
    return q.new_empty((b, h, n), dtype=lse_dtype(q))


def _new_lists(q: Tensor, layout: str, num_kv_blocks: int) -> tuple[Tensor, Tensor]:
    b, n, h, _ = sizes(q, layout)
    t_m = num_q_blocks(n)
    lut = q.new_empty((b, h, t_m, num_kv_blocks), dtype=torch.uint16)
    return lut, q.new_empty((b, h, t_m), dtype=torch.int32)


def _saved_sparse(q: Tensor, branch: str, save_for_backward: bool) -> Tensor:
    """O_s, kept only where the backward pass could not take it from `out`."""
    return empty_like(q) if save_for_backward and branch == "both" else q.new_empty((0,))


def empty_grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(q), empty_like(k), empty_like(v)


# ---- the compiled module ------------------------------------------------------------------------


@functools.cache
def _extension() -> Any:
    try:
        from . import _C
    except ImportError as error:
        raise RuntimeError(
            f"the compiled part of sla2 is not usable ({error}); `python -m sla2 env` and "
            "sla2.why_not() tell why and what to install"
        ) from error
    return _C


def check_device(q: Tensor) -> None:
    if q.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"sla2 has no implementation for {q.device}; allowed: cpu, cuda")


def _kernel_input(x: Tensor) -> Tensor:
    """(B, N, H, D) `x`, copied if the kernels' 16-byte loads could not read it in place."""
    unit = _ALIGNMENT // x.element_size()
    # The stride of a dimension with one entry is never used.
    strides = (s for s, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1)
    if x.stride(3) == 1 and not x.data_ptr() % _ALIGNMENT and not any(s % unit for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    sb, sn, sh, _ = x.stride()
    return x.data_ptr(), sb, sn, sh


def _router_operand(
    proj_q: Tensor, proj_k: Tensor, pinned_kv: Tensor | None, num_kv_blocks: int
) -> tuple[int, int, int, int, int, int]:
    stride_head = proj_q.stride(0) if proj_q.dim() == 3 else 0
    pinned, count = (0, 0) if pinned_kv is None else (pinned_kv.data_ptr(), pinned_kv.shape[0])
    return proj_q.data_ptr(), proj_k.data_ptr(), stride_head, pinned, count, num_kv_blocks


def _alpha_operand(alpha_logit: Tensor | None, seqlen: int) -> tuple[int, int, bool] | None:
    if alpha_logit is None:
        return None
    width = alpha_logit.shape[-1]
    stride_head = width if alpha_logit.dim() == 2 else 0
    return alpha_logit.data_ptr(), stride_head, width != num_q_blocks(seqlen)


def list_operand(lut: Tensor | None, counts: Tensor | None) -> tuple[int, int, int]:
    if lut is None or counts is None:
        return 0, 0, 0
    return lut.data_ptr(), counts.data_ptr(), lut.shape[3]


def _router_tensors(
    proj_q: Tensor, proj_k: Tensor, pinned_kv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if pinned_kv is not None:
        pinned_kv = pinned_kv.to(torch.int32).contiguous()
    return proj_q.contiguous(), proj_k.contiguous(), pinned_kv


def _route_cuda(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    smooth_k: bool,
    layout: str,
) -> tuple[Tensor, Tensor]:
    ext = _extension()
    lut, counts = _new_lists(q, layout, num_kv_blocks)
    b, n, h, d = sizes(q, layout)
    with torch.cuda.device(q.device):
        # Copies stay referenced until the launch; the allocator orders their reuse on this stream.
        q, k = _kernel_input(bnhd(q, layout)), _kernel_input(bnhd(k, layout))
        proj_q, proj_k, pinned_kv = _router_tensors(proj_q, proj_k, pinned_kv)
        shape = (b, n, h, d, _DTYPES[q.dtype])
        path = _PATHS[_path.get()]
        size = ext.route_workspace(shape=shape, path=path, max_kv_blocks=num_kv_blocks)
        workspace = q.new_empty((size,), dtype=torch.uint8)
        ext.route(
            shape=shape,
            path=path,
            smooth_k=smooth_k,
            q=_operand(q),
            k=_operand(k),
            router=_router_operand(proj_q, proj_k, pinned_kv, num_kv_blocks),
            lists=(lut.data_ptr(), counts.data_ptr(), num_kv_blocks),
            scores=0,
            workspace=(workspace.data_ptr(), size),
            stream=torch.cuda.current_stream(q.device).cuda_stream,
        )
    return lut, counts


def _attn_fwd_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut: Tensor | None,
    counts: Tensor | None,
    alpha_logit: Tensor | None,
    router: tuple[Tensor, Tensor, Tensor | None] | None,
    scale: float,
    quant: str,
    branch: str,
    smooth_k: bool,
    phi_input: str,
    layout: str,
    save_for_backward: bool,
    soft_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass by kernels. With `router`, `lut` and `counts` are written, else read; with
    `soft_map`, (B, H, T_m, T_n) contiguous float32, there are none and the kernels are portable."""
    ext = _extension()
    b, n, h, d = sizes(q, layout)
    lists = list_operand(lut, counts)
    num_kv_blocks = lists[2]
    with torch.cuda.device(q.device):
        out, lse = empty_like(q), new_lse(q, layout)
        out_sparse = _saved_sparse(q, branch, save_for_backward)
        # Copies stay referenced until the launch; the allocator orders their reuse on this stream.
        q, k, v = (_kernel_input(bnhd(x, layout)) for x in (q, k, v))
        if alpha_logit is not None:
            alpha_logit = alpha_logit.contiguous()
        if router is not None:
            router = _router_tensors(*router)
        shape = (b, n, h, d, _DTYPES[q.dtype])
        options = (
            _QUANTS[quant],
            _BRANCHES[branch],
            _PATHS["portable" if soft_map is not None else _path.get()],
            phi_input == "raw",
            smooth_k,
            scale,
        )
        size = ext.attn_fwd_workspace(
            shape=shape,
            options=options,
            routed=router is not None,
            soft=soft_map is not None,
            max_kv_blocks=num_kv_blocks,
        )
        workspace = q.new_empty((size,), dtype=torch.uint8)
        ext.attn_fwd(
            shape=shape,
            options=options,
            q=_operand(q),
            k=_operand(k),
            v=_operand(v),
            out=_operand(bnhd(out, layout)),
            out_sparse=_operand(bnhd(out_sparse, layout)) if out_sparse.numel() else None,
            lse=lse.data_ptr(),
            alpha=_alpha_operand(alpha_logit, n),
            router=None if router is None else _router_operand(*router, num_kv_blocks),
            lists=lists,
            soft_map=0 if soft_map is None else soft_map.data_ptr(),
            workspace=(workspace.data_ptr(), size),
            stream=torch.cuda.current_stream(q.device).cuda_stream,
        )
    return out, lse, out_sparse


# ---- operators ----------------------------------------------------------------------------------
#
# `save_for_backward` is known to the caller (does any input require grad?), not to an operator's
# body.


def _route(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    smooth_k: bool,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """The hard block map: lut (B, H, T_m, K) uint16 ascending, counts (B, H, T_m) int32, all K."""
    check_device(q)
    if q.numel() == 0:
        lut, counts = _new_lists(q, layout, num_kv_blocks)
        return lut.zero_(), counts.fill_(num_kv_blocks)
    if q.device.type == "cuda":
        return _route_cuda(q, k, proj_q, proj_k, pinned_kv, num_kv_blocks, smooth_k, layout)
    check_pinned_range(pinned_kv, sizes(q, layout)[1])
    # torch.matmul picks its algorithm by requires_grad; eager and compiled should agree.
    proj_q, proj_k = proj_q.detach(), proj_k.detach()
    q, k = bnhd(q, layout), bnhd(k, layout)
    return blockwise.route(q, k, proj_q, proj_k, pinned_kv, num_kv_blocks, smooth_k=smooth_k)


def _attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut: Tensor,
    counts: Tensor,
    alpha_logit: Tensor | None,
    scale: float,
    quant: str,
    branch: str,
    smooth_k: bool,
    phi_input: str,
    layout: str,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over given block lists; branch "both" (needs alpha_logit), "sparse" or "linear".

    Returns out, lse (B, H, N) and out_sparse, empty unless the backward pass needs it besides out.
    """
    check_device(q)
    if q.numel() == 0:
        return empty_like(q), new_lse(q, layout), _saved_sparse(q, branch, save_for_backward)
    if q.device.type == "cuda":
        lut, counts = lut.contiguous(), counts.contiguous()
        rest: tuple[Any, ...] = (
            scale,
            quant,
            branch,
            smooth_k,
            phi_input,
            layout,
            save_for_backward,
        )
        return _attn_fwd_cuda(q, k, v, lut, counts, alpha_logit, None, *rest)
    out, lse, out_sparse = blockwise.attn_fwd(
        bnhd(q, layout),
        bnhd(k, layout),
        bnhd(v, layout),
        lut,
        counts,
        alpha_logit,
        scale=scale,
        quant=quant,
        branch=branch,
        smooth_k=smooth_k,
        phi_input=phi_input,
    )
    if save_for_backward and branch == "both":
        out_sparse = in_layout(out_sparse, layout)
    else:
        out_sparse = q.new_empty((0,))
    return in_layout(out, layout), lse, out_sparse


def _route_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    proj_q: Tensor,
    proj_k: Tensor,
    alpha_logit: Tensor,
    pinned_kv: Tensor | None,
    num_kv_blocks: int,
    scale: float,
    quant: str,
    smooth_k: bool,
    phi_input: str,
    layout: str,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`route` and `attn_fwd` of both branches in one call: the whole operation in hard mode."""
    rest: tuple[Any, ...] = (scale, quant, "both", smooth_k, phi_input, layout, save_for_backward)
    if q.device.type == "cuda" and q.numel() > 0:
        lut, counts = _new_lists(q, layout, num_kv_blocks)
        router = (proj_q, proj_k, pinned_kv)
        fwd = _attn_fwd_cuda(q, k, v, lut, counts, alpha_logit, router, *rest)
    else:
        lut, counts = _route(q, k, proj_q, proj_k, pinned_kv, num_kv_blocks, smooth_k, layout)
        fwd = _attn_fwd(q, k, v, lut, counts, alpha_logit, *rest)
    return *fwd, lut, counts


# ---- registration -------------------------------------------------------------------------------

_QKV = "Tensor q, Tensor k, Tensor v"
_ROUTER = "Tensor? pinned_kv, SymInt num_kv_blocks"

route = torch.library.custom_op(
    "sla2::route",
    _route,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor proj_q, Tensor proj_k, {_ROUTER}, bool smooth_k, "
    "str layout) -> (Tensor lut, Tensor counts)",
)
attn_fwd = torch.library.custom_op(
    "sla2::attn_fwd",
    _attn_fwd,
    mutates_args=(),
    schema=f"({_QKV}, Tensor lut, Tensor counts, Tensor? alpha_logit, float scale, str quant, "
    "str branch, bool smooth_k, str phi_input, str layout, bool save_for_backward) "
    "-> (Tensor out, Tensor lse, Tensor out_sparse)",
)
route_attn_fwd = torch.library.custom_op(
    "sla2::route_attn_fwd",
    _route_attn_fwd,
    mutates_args=(),
    schema=f"({_QKV}, Tensor proj_q, Tensor proj_k, Tensor alpha_logit, {_ROUTER}, float scale, "
    "str quant, bool smooth_k, str phi_input, str layout, bool save_for_backward) "
    "-> (Tensor out, Tensor lse, Tensor out_sparse, Tensor lut, Tensor counts)",
)


@route.register_fake
def _route_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    num_kv_blocks, layout = args[4], args[6]
    return _new_lists(q, layout, num_kv_blocks)


@attn_fwd.register_fake
def _attn_fwd_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    branch, layout, save_for_backward = args[7], args[10], args[11]
    return empty_like(q), new_lse(q, layout), _saved_sparse(q, branch, save_for_backward)


@route_attn_fwd.register_fake
def _route_attn_fwd_fake(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    num_kv_blocks, layout, save_for_backward = args[6], args[11], args[12]
    out_sparse = _saved_sparse(q, "both", save_for_backward)
    lists = _new_lists(q, layout, num_kv_blocks)
    return empty_like(q), new_lse(q, layout), out_sparse, *lists


attn_fwd.register_autograd(autograd.attn_backward, setup_context=autograd.attn_setup)
route_attn_fwd.register_autograd(
    autograd.route_attn_backward, setup_context=autograd.route_attn_setup
)
