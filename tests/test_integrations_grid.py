"""Token grids, alpha carried between them, and the registry of adapters; without diffusers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla2
from sla2.checks import Grid, check_grid, num_tokens
from sla2.integrations import Adapter, adapter, register_adapter
from sla2.integrations.grid import latent_grid, resize_alpha

OLD, NEW = (5, 9, 11), (4, 13, 7)


def test_importing_sla2_imports_no_model_library() -> None:
    code = (
        "import sys, sla2; sla2.apply; "
        "print(sorted({'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(Path(sla2.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.strip() == "[]", done.stderr


# ---- sizes --------------------------------------------------------------------------------------


def test_grids() -> None:
    assert check_grid([3, 4, 5]) == (3, 4, 5) and num_tokens((3, 4, 5)) == 60
    for grid in ((3, 4), (3, 4, 5, 6), "345", 3, (3, 4, 5.0), (3, 4, True)):
        with pytest.raises(TypeError, match="three ints"):
            check_grid(grid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive"):
        check_grid((3, -4, 5))


def test_latent_grids() -> None:
    wan, patch = (4, 8, 8), (1, 2, 2)
    assert latent_grid((81, 720, 1280), wan, patch) == (21, 45, 80)
    assert latent_grid((1, 16, 16), wan, patch) == (1, 1, 1)
    assert latent_grid((13, 64, 96), wan, (2, 1, 2)) == (2, 8, 6)
    for video, message in (
        ((80, 480, 832), "num_frames=80.*multiple of 4"),
        ((0, 480, 832), "num_frames=0"),
        ((81, 481, 832), "height=481 must be a multiple of 16"),
        ((81, 480, 840), "width=840 must be a multiple of 16"),
        ((81, 0, 832), "height=0"),
    ):
        with pytest.raises(ValueError, match=message):
            latent_grid(video, wan, patch)
    with pytest.raises(ValueError, match="21 latent frames, which patches of 2"):
        latent_grid((81, 480, 832), wan, (2, 2, 2))
    with pytest.raises(TypeError, match="height must be an int"):
        latent_grid((81, 480.0, 832), wan, patch)  # type: ignore[arg-type]


# ---- alpha --------------------------------------------------------------------------------------


def blocks(grid: Grid) -> int:
    return -(-num_tokens(grid) // 128)


def test_alpha_per_token_is_interpolated_in_space_and_time() -> None:
    alpha = torch.randn(3, num_tokens(OLD))
    expected = nn.functional.interpolate(
        alpha.view(1, 3, *OLD), size=NEW, mode="trilinear", align_corners=False
    )
    torch.testing.assert_close(resize_alpha(alpha, OLD, NEW), expected.view(3, -1))


@pytest.mark.parametrize("heads", [(), (3,)], ids=["shared", "per head"])
def test_alpha_per_block(heads: tuple[int, ...]) -> None:
    """The mean over the tokens of the new block; short blocks by their true length."""
    alpha = torch.randn(*heads, blocks(OLD))
    tokens = alpha.repeat_interleave(128, -1)[..., : num_tokens(OLD)].reshape(-1, num_tokens(OLD))
    fine = resize_alpha(tokens, OLD, NEW)
    expected = torch.stack([part.mean(1) for part in fine.split(128, 1)], 1)
    out = resize_alpha(alpha, OLD, NEW)
    assert out.shape == (*heads, blocks(NEW)) and out.dtype == torch.float32
    torch.testing.assert_close(out.reshape(-1, blocks(NEW)), expected)


@pytest.mark.parametrize("new", [OLD, NEW, (1, 1, 1), (10, 18, 22)], ids=str)
def test_constants_stay_and_ranges_do_not_grow(new: Grid) -> None:
    assert torch.allclose(
        resize_alpha(torch.full((2, blocks(OLD)), 1.7), OLD, new), torch.tensor(1.7)
    )
    alpha = torch.randn(2, blocks(OLD))
    out = resize_alpha(alpha, OLD, new)
    assert out.min() >= alpha.min() - 1e-5 and out.max() <= alpha.max() + 1e-5
    if new == OLD:
        torch.testing.assert_close(out, alpha)


def test_alpha_has_a_gradient_and_ignores_autocast() -> None:
    alpha = torch.randn(2, blocks(OLD), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = resize_alpha(alpha, OLD, NEW)
    assert out.dtype == torch.float32 and torch.equal(out, resize_alpha(alpha, OLD, NEW))
    out.sum().backward()
    assert bool((alpha.grad > 0).all())


# ---- adapters -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """What an adapter asks of an attention layer, with the least around it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(16, 48)
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout(0.0)])
        self.processor: Any = full_attention

    def set_processor(self, processor: Any) -> None:
        self._modules.pop("processor", None)
        self.processor = processor

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x, None, None, None)


def full_attention(attn: Attention, x: Tensor, *_: Any) -> Tensor:
    q, k, v = (y.unflatten(2, (2, 8)).transpose(1, 2) for y in attn.to_qkv(x).chunk(3, -1))
    out = nn.functional.scaled_dot_product_attention(q, k, v)
    return attn.to_out[0](out.transpose(1, 2).flatten(2, 3))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, video: Tensor) -> Tensor:
        x = video.flatten(1, 3)
        for layer in self.layers:
            x = x + layer(x)
        return x.view_as(video)


class ToyAdapter(Adapter):
    name = "Toy"

    def handles(self, model: nn.Module) -> bool:
        return isinstance(model, Toy)

    def self_attention(self, model: Any) -> dict[str, Any]:
        return {f"layers.{i}": layer for i, layer in enumerate(model.layers)}

    def heads(self, attn: Any) -> tuple[int, int]:
        return 2, 8

    def video_grid(self, model: Any, num_frames: int, height: int, width: int) -> Grid:
        return num_frames, height, width

    def call_grid(self, model: Any, args: tuple[Any, ...], kwargs: Any) -> Grid:
        return args[0].shape[1:4]

    def project(self, attn: Any, hidden_states: Tensor, rotary_emb: Any) -> Any:
        return (y.unflatten(2, (2, 8)) for y in attn.to_qkv(hidden_states).chunk(3, -1))


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapter, "_REGISTRY", list(adapter._REGISTRY))
    yield


@pytest.mark.usefixtures("_registry")
@torch.no_grad()
def test_another_model_is_one_class() -> None:
    model, video = Toy(), torch.randn(1, 3, 10, 12, 16)
    plain = model(video)
    with pytest.raises(TypeError, match=r"no adapter for Toy.*register_adapter"):
        sla2.apply(model, grid=(3, 10, 12))
    assert register_adapter(ToyAdapter) is ToyAdapter
    report = sla2.apply(model, topk=1.0, num_frames=3, height=10, width=12)
    assert report.adapter == "Toy" and report.replaced == ("layers.0", "layers.1")
    torch.testing.assert_close(model(video), plain, atol=1e-5, rtol=1e-5)
    sla2.set_topk(model, 0.2)
    assert not torch.allclose(model(video), plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\(3, 12, 10\)"):
        model(video.transpose(2, 3))
    with sla2.dense(model):
        assert torch.equal(model(video), plain)
    sla2.remove(model)
    assert torch.equal(model(video), plain)
    model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="nothing to replace in Toy: 0 self-attention layers"):
        sla2.apply(model, grid=(3, 10, 12))


def test_only_adapters_are_registered() -> None:
    with pytest.raises(TypeError, match="a subclass of Adapter"):
        register_adapter(Toy)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="abstract"):
        register_adapter(type("Half", (Adapter,), {"name": "Half"}))
