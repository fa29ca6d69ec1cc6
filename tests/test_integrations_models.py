"""sla2.apply on tiny random models of diffusers: what is replaced, what stays, what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sla2

diffusers = pytest.importorskip(
    "diffusers", minversion="0.35.2", reason="needs diffusers >= 0.35.2: pip install '.[diffusers]'"
)

from sla2.integrations.processor import GridAttention, SLA2Processor  # noqa: E402

GRID = (3, 10, 12)  # N = 360: a tail in both kinds of blocks
TOPK = 0.3
TEXT = 24


def make_wan(image: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16,
        "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 48, "num_layers": 3,
    }  # fmt: skip
    if image:
        settings |= {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 32}
    return diffusers.WanTransformer3DModel(**{**settings, **options}).eval()


def wan_inputs(grid: tuple[int, int, int] = GRID, image: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(2)
    frames, rows, columns = grid
    inputs = {
        "hidden_states": torch.randn(2, 36 if image else 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 512, TEXT),
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(2, 7, 20)
    return inputs


def make_ltx() -> nn.Module:
    torch.manual_seed(1)
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=3, caption_channels=TEXT,
    ).eval()  # fmt: skip


def ltx_inputs(grid: tuple[int, int, int] = GRID) -> dict[str, Any]:
    torch.manual_seed(2)
    frames, rows, columns = grid
    return {
        "hidden_states": torch.randn(2, frames * rows * columns, 8),
        "encoder_hidden_states": torch.randn(2, 20, TEXT),
        "timestep": torch.tensor([3, 500]),
        "encoder_attention_mask": torch.ones(2, 20),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


class Family(NamedTuple):
    make: Callable[[], Any]
    inputs: Callable[..., dict[str, Any]]
    pixels: tuple[int, int, int]
    """num_frames, height, width of GRID."""
    layers: str
    """Name of the self-attention layer of a block."""


FAMILIES = {
    "wan": Family(make_wan, wan_inputs, (9, 160, 192), "blocks.{}.attn1"),
    "wan-i2v": Family(
        lambda: make_wan(image=True),
        lambda grid=GRID: wan_inputs(grid, image=True),
        (9, 160, 192),
        "blocks.{}.attn1",
    ),
    "ltx": Family(make_ltx, ltx_inputs, (17, 320, 384), "transformer_blocks.{}.attn1"),
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def randomise(model: nn.Module) -> nn.Module:
    """Gives every router and alpha values that matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GridAttention):
                for parameter in module.parameters():
                    parameter.normal_(std=0.3)
    return model


def applied(family: Family, **options: Any) -> Any:
    model = family.make()
    sla2.apply(model, **{"topk": TOPK, "grid": GRID, **options})
    return randomise(model)


def self_attention(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if name.endswith("attn1")]


# ---- what runs ----------------------------------------------------------------------------------


def test_every_self_attention_is_replaced_and_nothing_else(family: Family) -> None:
    model, inputs = family.make(), family.inputs()
    before = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    plain = run(model, inputs)
    names = set(dict(model.named_parameters()))
    report = sla2.apply(model, topk=TOPK, grid=GRID)
    expected = tuple(family.layers.format(i) for i in range(3))
    assert report.replaced == expected and report.dense == ()
    assert report.skipped == tuple(name.replace("attn1", "attn2") for name in expected)
    after = {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}
    for name, processor in after.items():
        assert isinstance(processor, SLA2Processor) == (name in expected)
        assert processor is before[name] or name in expected  # cross-attention: the same object
    added = set(dict(model.named_parameters())) - names
    parameters = ("proj_q_delta", "proj_k_delta", "alpha_offset")
    assert added == {f"{name}.processor.sla2.{p}" for name in expected for p in parameters}
    assert added <= set(model.state_dict())
    assert report.parameters == 3 * (2 * 16 * 16 + 2 * 3) and report.bytes == 4 * report.parameters
    out = run(model, inputs)
    assert bool(out.isfinite().all()) and not torch.equal(out, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_around_attention_the_bits_are_those_of_diffusers(
    family: Family, dtype: torch.dtype, fused: bool
) -> None:
    """With diffusers' own attention in the middle, the output is bit-equal to the original's: the
    projections, norms, rotary embedding and the way back are the same."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    class Full(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: None) -> Tensor:
            return dispatch_attention_fn(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)

    model = family.make().to(dtype)
    inputs = {k: x.to(dtype) if k.endswith("states") else x for k, x in family.inputs().items()}
    if "encoder_hidden_states_image" in inputs:
        inputs["encoder_hidden_states_image"] = inputs["encoder_hidden_states_image"].to(dtype)
    if fused:
        model.fuse_qkv_projections()
    plain = run(model, inputs)
    sla2.apply(model, topk=TOPK, grid=GRID)
    assert run(model, inputs).dtype == plain.dtype
    for _, attn in self_attention(model):
        attn.processor.sla2 = Full()
    assert torch.equal(run(model, inputs), plain)


def test_a_layer_computes_sla2(family: Family) -> None:
    model = applied(family)
    seen: list[tuple[Tensor, Tensor]] = []
    name, attn = self_attention(model)[1]
    layer = attn.processor.sla2
    layer.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    run(model, family.inputs())
    (((q, k, v), out),) = seen
    assert q.shape == (2, 360, 2, 16)
    expected = sla2.sla2_attention(
        q, k, v, proj_q=layer.proj_q.detach(), proj_k=layer.proj_k.detach(),
        alpha_logit=layer.alpha_logit.detach(), topk=TOPK,
    )  # fmt: skip
    assert torch.equal(out, expected), name


def test_every_block_kept_is_dense_attention(family: Family) -> None:
    model, inputs = family.make(), family.inputs()
    plain = run(model, inputs)
    sla2.apply(model, topk=1.0, grid=GRID)
    torch.testing.assert_close(run(model, inputs), plain, atol=1e-5, rtol=1e-5)


def test_dense_and_remove_give_the_original_bits(family: Family) -> None:
    model, inputs = family.make(), family.inputs()
    plain, keys = run(model, inputs), set(model.state_dict())
    sla2.apply(model, topk=TOPK, grid=GRID)
    randomise(model)
    sparse = run(model, inputs)
    with sla2.dense(model):
        assert torch.equal(run(model, inputs), plain)
        with sla2.dense(model):
            pass
        assert torch.equal(run(model, inputs), plain)
        other = family.inputs((2, 6, 8))  # any grid: the model is the original one here
        dense_other = run(model, other)
    assert torch.equal(run(model, inputs), sparse)
    with pytest.raises(RuntimeError, match="stop"), sla2.dense(model):
        raise RuntimeError("stop")
    assert torch.equal(run(model, inputs), sparse)
    assert sla2.remove(model) == 3
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(run(model, other), dense_other)
    assert set(model.state_dict()) == keys and not model._forward_pre_hooks
    for function in (sla2.remove, lambda m: sla2.dense(m).__enter__()):
        with pytest.raises(ValueError, match="SLA2 is not applied"):
            function(model)


def test_topk_stage_and_quant(family: Family) -> None:
    model, inputs = applied(family, quant="int8_fp16"), family.inputs()
    layers = [attn.processor.sla2 for _, attn in self_attention(model)]
    assert {layer.quant for layer in layers} == {"int8_fp16"}
    first = run(model, inputs)
    sla2.set_topk(model, 0.8)
    assert {layer.topk for layer in layers} == {0.8}
    assert not torch.equal(run(model, inputs), first)
    with pytest.raises(TypeError, match="topk must be a float"):
        sla2.set_topk(model, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"topk=1\.5"):
        sla2.set_topk(model, 1.5)
    assert {layer.topk for layer in layers} == {0.8}
    sla2.set_stage(model, 1)
    assert all(layer.stage == 1 and layer.proj_q_delta.requires_grad for layer in layers)
    assert not torch.equal(run(model, inputs), first)
    sla2.set_stage(model, 2)
    assert not any(layer.proj_q_delta.requires_grad for layer in layers)
    for function in (lambda: sla2.set_stage(make_wan(), 2), lambda: sla2.set_topk(make_wan(), 0.1)):
        with pytest.raises(ValueError, match="has no SLA2Attention"):
            function()


def test_gradients_reach_the_model_and_alpha(family: Family) -> None:
    model = applied(family)
    for stage in (1, 2):
        sla2.set_stage(model, stage)
        model.zero_grad()
        model(**family.inputs(), return_dict=False)[0].square().mean().backward()
        for _, attn in self_attention(model):
            layer = attn.processor.sla2
            assert bool(attn.to_q.weight.grad.any()) and bool(layer.alpha_offset.grad.any())
            if stage == 1:
                assert bool(layer.proj_q_delta.grad.any())
            else:
                assert layer.proj_q_delta.grad is None


def test_recording_full_attention(family: Family, tmp_path: Any) -> None:
    """Stage 1's recipe: every block kept while recording, then the share wanted."""
    from sla2.train import QKVRecorder, fit_router

    model = family.make()
    sla2.apply(model, topk=1.0, grid=GRID)
    with QKVRecorder(model, tmp_path / "samples") as recorder:
        run(model, family.inputs())
    assert set(recorder.counts) == {f"{family.layers.format(i)}.processor.sla2" for i in range(3)}
    paths = fit_router(
        tmp_path / "samples", tmp_path / "fit", topk=(TOPK,), steps=1, device="cpu", progress=False
    )
    sla2.set_topk(model, TOPK)
    sla2.load_router(model, paths[TOPK])
    fresh = family.make()
    sla2.apply(fresh, topk=TOPK, grid=GRID, router=paths[TOPK])
    assert torch.equal(run(fresh, family.inputs()), run(model, family.inputs()))


def test_a_deep_copy_is_independent(family: Family) -> None:
    """EMA keeps a deep copy: it has its own parameters, decisions and hook."""
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), expected)
    with torch.no_grad():
        for _, attn in self_attention(model):
            attn.processor.sla2.alpha_offset.add_(1.0)
    with sla2.dense(model):
        assert torch.equal(run(twin, inputs), expected)
    with pytest.raises(ValueError, match="this call has the grid"):
        run(twin, family.inputs((2, 6, 8)))
    plain = run(family.make(), inputs)
    assert sla2.remove(twin) == 3 and not twin._forward_pre_hooks
    assert torch.equal(run(twin, inputs), plain)
    assert not torch.equal(run(model, inputs), plain) and len(model._forward_pre_hooks) == 1
