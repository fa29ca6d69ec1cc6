"""Rotary position embedding of q and k, as diffusers has it.

`rotate_pairs` is what the adapters of `sla2.integrations` use. On CUDA it is one kernel, the
operator `sla2::rotary`: PyTorch's separate operations move nine times its bytes and, once
attention is fast, take a tenth of a denoising step. The bits are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import Grads
from .checks import has_tangent
from .constants import HEAD_DIMS
from .ops import _DTYPES, _extension, _kernel_input, _operand, empty_like


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the neighbouring features (2i, 2i + 1), in x's dtype.

    x: (B, N, H, D). cos, sin: broadcast against x, each pair's value twice. The arithmetic is in
    the wider of the dtypes, one rounding to x's at the end. Differentiable in x, and in cos and
    sin where they require grad; in forward mode in all three.

    The kernel takes bfloat16 or float16 x with D 64 or 128 and float32 cos and sin without
    gradients; all else, what has a tangent of forward mode, and what `torch.compile` traces and
    fuses, is PyTorch's operations.
    """
    if _kernel_takes(x, cos, sin) and not torch.compiler.is_compiling():
        rotated: Tensor = torch.ops.sla2.rotary(x, cos, sin, False)
        return rotated
    return _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = (even * cos - odd * sin, even * sin + odd * cos)
    return torch.stack([part.type_as(x) for part in rotated], -1).flatten(-2)


def _kernel_takes(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and x.dtype in _DTYPES
        and x.dim() == 4
        and x.shape[-1] in HEAD_DIMS
        and all(angle.dtype == torch.float32 and not angle.requires_grad for angle in (cos, sin))
        and not any(map(has_tangent, (x, cos, sin)))
    )


def _rotary_cuda(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = empty_like(x)
    with torch.cuda.device(x.device):
        # Copies stay referenced until the launch; the allocator orders their reuse on this stream.
        x, cos, sin = (_kernel_input(y) for y in (x, cos.expand(x.shape), sin.expand(x.shape)))
        _extension().rotary(
            shape=(*x.shape, _DTYPES[x.dtype]),
            x=_operand(x),
            cos=_operand(cos),
            sin=_operand(sin),
            out=_operand(out),
            inverse=inverse,
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
    return out


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`rotate_pairs`, or with `inverse` by the opposite angles, which is also its gradient."""
    if x.device.type == "cuda":
        return _rotary_cuda(x, cos, sin, inverse)
    return _rotate(x, cos, -sin if inverse else sin)


rotary = torch.library.custom_op(
    "sla2::rotary",
    _rotary,
    mutates_args=(),
    schema="(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
)


@rotary.register_fake
def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, inverse = inputs
    ctx.save_for_backward(cos, sin)
    ctx.inverse = inverse


def _backward(ctx: Any, grad: Tensor) -> Grads:
    cos, sin = ctx.saved_tensors
    return torch.ops.sla2.rotary(grad, cos, sin, not ctx.inverse), None, None, None


rotary.register_autograd(_backward, setup_context=_setup)
