"""The rotary embedding's kernel against PyTorch's own operations, bit by bit."""

from __future__ import annotations

import pytest
import torch
from gpu_tools import DEVICE, GPU, Guarded, current_stream, same_bits
from torch import Tensor

from sla2 import ops, rotary

pytestmark = GPU

DTYPES = (torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def angles(*shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines and sines; those that the operation leaves unread are not a number."""
    phases = 6 * random(*shape, seed=seed)
    cos, sin = phases.cos(), phases.sin()
    cos[..., 1::2] = torch.nan
    sin[..., 0::2] = torch.nan
    return cos, sin


def poison(x: Tensor) -> None:
    """What the allocator gives next in x's size holds NaN."""
    torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("batch", "seqlen", "heads"), [(1, 1, 1), (2, 77, 3), (1, 1000, 12), (3, 129, 5), (1, 640, 40)]
)
@pytest.mark.parametrize("shared", ["all", "heads", "nothing"])
def test_bits(
    dtype: torch.dtype, head_dim: int, batch: int, seqlen: int, heads: int, shared: str
) -> None:
    x = random(batch, seqlen, heads, head_dim, dtype=dtype)
    sizes = {"all": (1, seqlen, 1), "heads": (batch, seqlen, 1), "nothing": (batch, seqlen, heads)}
    cos, sin = angles(*sizes[shared], head_dim)
    kept = x.clone()
    poison(x)
    out = rotary.rotate_pairs(x, cos, sin)
    assert out.is_contiguous() and same_bits(out, rotary._rotate(x, cos, sin))
    assert same_bits(x, kept)
    poison(x)
    back = torch.ops.sla2.rotary(x, cos, sin, True)
    assert same_bits(back, rotary._rotate(x, cos, -sin))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(2, 33, 5, 64), (1, 47, 6, 128)])
def test_nothing_else_is_written(shape: tuple[int, ...], in_place: bool) -> None:
    if DEVICE.type == "cpu":
        pytest.skip("the CPU has no kernel")
    given = random(*shape, dtype=torch.float16)
    cos, sin = angles(1, shape[1], 1, shape[3])
    x = Guarded(given.shape, given.dtype, 0xFF)
    x.tensor.copy_(given)
    out = x if in_place else Guarded(given.shape, given.dtype, 0xFF)
    ops._extension().rotary(
        shape=(*given.shape, 1),
        x=ops._operand(x.tensor),
        cos=ops._operand(cos.expand(given.shape)),
        sin=ops._operand(sin.expand(given.shape)),
        out=ops._operand(out.tensor),
        inverse=False,
        stream=current_stream(),
    )
    assert same_bits(out.tensor, rotary._rotate(given, cos, sin))
    out.check("out")
    assert in_place or same_bits(x.tensor, given)


def test_one_kernel_does_it() -> None:
    """Otherwise equal bits would say nothing."""
    if DEVICE.type == "cpu":
        pytest.skip("the CPU has no kernel")
    x, (cos, sin) = random(1, 300, 4, 128, dtype=torch.bfloat16), angles(1, 300, 1, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        rotary.rotate_pairs(x, cos, sin)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if "kernel" in event.name]
    assert len(kernels) == 1 and "sla2::" in kernels[0] and "rotary_kernel" in kernels[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_misaligned_views(dtype: torch.dtype) -> None:
    fused = random(2, 50, 3, 4, 64, dtype=dtype)  # q, k and v in one
    wide = random(2, 4, 50, 64, dtype=dtype).transpose(1, 2)
    odd = random(2 * 50 * 4 * 64 + 1, dtype=dtype)[1:].view(2, 50, 4, 64)
    cos, sin = angles(1, 50, 1, 64)
    both = torch.stack([cos, sin], -2)
    views = (both[..., 0, :], both[..., 1, :])
    unaligned = tuple(random(50 * 64 + 1)[1:].view(1, 50, 1, 64).copy_(a) for a in (cos, sin))
    for x in (fused[:, :, 1], wide, odd, fused[:, :, :, 2][:, :, :1]):
        expected = rotary._rotate(x, cos, sin)
        for pair in ((cos, sin), views, unaligned):
            assert same_bits(rotary.rotate_pairs(x, *pair), expected)


def test_special_values_stay_with_their_pairs() -> None:
    x = random(1, 200, 2, 64, dtype=torch.bfloat16)
    cos, sin = angles(1, 200, 1, 64)
    x[0, 3, 1, 10], x[0, 100, 0, 33], x[0, 199, 1, 63] = torch.nan, torch.inf, -0.0
    out, expected = rotary.rotate_pairs(x, cos, sin), rotary._rotate(x, cos, sin)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert int((~out.isfinite()).sum()) == 4


def test_gradient_is_the_inverse_rotation() -> None:
    x = random(2, 70, 3, 64, dtype=torch.bfloat16).requires_grad_()
    cos, sin = angles(1, 70, 1, 64)
    grad = random(2, 70, 3, 64, dtype=torch.bfloat16, seed=5)
    (got,) = torch.autograd.grad(torch.ops.sla2.rotary(x, cos, sin, False), x, grad)
    assert same_bits(got, rotary._rotate(grad, cos, -sin))
    exact = x.detach().double().requires_grad_()
    rotated = rotary._rotate(exact, cos.double(), sin.double())
    (expected,) = torch.autograd.grad(rotated, exact, grad.double())
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5)


def test_angles_that_require_grad_get_theirs() -> None:
    x = random(1, 20, 2, 64, dtype=torch.bfloat16)
    phases = random(1, 20, 1, 32).repeat_interleave(2, -1).requires_grad_()
    rotary.rotate_pairs(x, phases.cos(), phases.sin()).float().square().sum().backward()
    assert phases.grad is not None and bool(phases.grad.isfinite().all())


@pytest.mark.parametrize("size", [(0, 5, 2, 64), (2, 0, 2, 64)])
def test_nothing_in_nothing_out(size: tuple[int, ...]) -> None:
    x = random(*size, dtype=torch.float16)
    assert rotary.rotate_pairs(x, *angles(1, size[1], 1, 64)).shape == size


def test_other_shapes_are_pytorch() -> None:
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 32)):
        x = random(1, 20, 2, head_dim, dtype=dtype)
        cos, sin = angles(1, 20, 1, head_dim)
        assert same_bits(rotary.rotate_pairs(x, cos, sin), rotary._rotate(x, cos, sin))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the kernel's operator")
def test_operator_and_graph() -> None:
    x = random(1, 90, 4, 64, dtype=torch.bfloat16).requires_grad_()
    cos, sin = angles(1, 90, 1, 64)
    torch.library.opcheck(rotary.rotary, (x, cos.nan_to_num(), sin.nan_to_num(), False))
    torch.ops.sla2.rotary(x, cos, sin, False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=side):
        out = torch.ops.sla2.rotary(x, cos, sin, False)
    out.fill_(torch.nan)
    graph.replay()
    assert same_bits(out, rotary._rotate(x.detach(), cos, sin))
