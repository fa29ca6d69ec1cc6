"""The rotary embedding on the CPU, and what reaches its kernel."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sla2 import rotary


def test_pairs_turn_by_their_angles() -> None:
    phases = torch.rand(1, 7, 1, 4, dtype=torch.float64)
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(
        torch.ones_like(phases), phases
    )
    cos, sin = (angle.repeat_interleave(2, -1) for angle in (phases.cos(), phases.sin()))
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotary.rotate_pairs(x, cos, sin), expected)
    torch.testing.assert_close(torch.ops.sla2.rotary(x, cos, sin, False), expected)
    torch.testing.assert_close(torch.ops.sla2.rotary(expected, cos, sin, True), x)


def test_operator() -> None:
    x = torch.randn(1, 5, 2, 64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 5, 1, 64).unbind()
    torch.library.opcheck(rotary.rotary, (x, cos, sin, False))


def test_rounding_is_once_to_the_dtype_of_x() -> None:
    x = torch.randn(1, 50, 2, 64).bfloat16()
    cos, sin = torch.randn(2, 1, 50, 1, 64).unbind()
    out = rotary.rotate_pairs(x, cos, sin)
    even = x[..., 0::2].float() * cos[..., 0::2] - x[..., 1::2].float() * sin[..., 1::2]
    assert out.dtype == torch.bfloat16 and torch.equal(out[..., 0::2], even.bfloat16())


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"head_dim": 80}, False),
        ({"angle_dtype": torch.float64}, False),
        ({"requires_grad": True}, False),
    ],
)
def test_what_the_kernel_takes(changes: dict[str, Any], taken: bool) -> None:
    given = {"dtype": torch.bfloat16, "device": "cuda", "head_dim": 64}
    given |= {"angle_dtype": torch.float32, "requires_grad": False} | changes
    shape = (1, 5, 2, given["head_dim"])
    x: Any = SimpleNamespace(
        device=torch.device(given["device"]), dtype=given["dtype"], shape=shape, dim=lambda: 4
    )
    angle = torch.zeros(1, 5, 1, given["head_dim"], dtype=given["angle_dtype"])
    angle.requires_grad_(given["requires_grad"])
    assert rotary._kernel_takes(x, angle, angle) == taken


def test_what_is_compiled_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor fuses it with what stands beside; an operator would be in its way."""
    taken: list[bool] = []
    monkeypatch.setattr(rotary, "_kernel_takes", lambda *args: True)
    operator = SimpleNamespace(rotary=lambda x, *args: taken.append(True) or x)
    monkeypatch.setattr(torch.ops, "sla2", operator, raising=False)
    x, cos, sin = torch.randn(3, 1, 5, 1, 64).unbind()
    rotary.rotate_pairs(x, cos, sin)
    assert taken == [True]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(rotary.rotate_pairs(x, cos, sin), rotary._rotate(x, cos, sin))
    assert taken == [True]


def test_arguments_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides as they are, zeros where angles are shared, whatever holds x."""
    calls: list[dict[str, Any]] = []
    extension = SimpleNamespace(rotary=lambda **given: calls.append(given))
    monkeypatch.setattr(rotary, "_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    q, k = torch.randn(2, 30, 2, 3, 64).bfloat16().unbind(2)  # neighbours in memory
    cos, sin = torch.randn(2, 1, 30, 1, 64).unbind()
    out = rotary._rotary_cuda(k, cos, sin, True)
    (call,) = calls
    assert call["shape"] == (2, 30, 3, 64, 0) and call["stream"] == 77 and call["inverse"]
    assert call["x"] == (k.data_ptr(), 30 * 384, 384, 64)
    assert call["out"] == (out.data_ptr(), 30 * 192, 192, 64)
    assert call["cos"] == (cos.data_ptr(), 0, 64, 0) and call["sin"] == (sin.data_ptr(), 0, 64, 0)
