"""The arguments of sla2.apply: grids and what a call with another one does, choices, errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip(
    "diffusers", minversion="0.35.2", reason="needs diffusers >= 0.35.2: pip install '.[diffusers]'"
)

from test_integrations_models import (
    FAMILIES,
    GRID,
    TOPK,
    Family,
    applied,
    ltx_inputs,
    make_ltx,
    make_wan,
    run,
    self_attention,
    wan_inputs,
)

import sla2
from sla2.integrations.processor import SLA2Processor


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


# ---- grids --------------------------------------------------------------------------------------


def test_the_grid_of_a_video(family: Family) -> None:
    model, (frames, height, width) = family.make(), family.pixels
    report = sla2.apply(model, topk=TOPK, num_frames=frames, height=height, width=width)
    assert report.grid == GRID
    run(model, family.inputs())


def test_the_grids_of_the_published_models() -> None:
    from sla2.integrations.wan import WanAdapter

    adapter = WanAdapter()
    for frames, height, width, grid in (
        (81, 480, 832, (21, 30, 52)),
        (81, 720, 1280, (21, 45, 80)),
        (1, 480, 832, (1, 30, 52)),
    ):
        assert adapter.video_grid(make_wan(), frames, height, width) == grid
    small = make_wan(in_channels=48, out_channels=48)  # Wan2.2 TI2V-5B has its own autoencoder
    assert adapter.video_grid(small, 121, 704, 1280) == (31, 22, 40)
    with pytest.raises(ValueError, match="no autoencoder with 7 latent channels"):
        adapter.video_grid(make_wan(out_channels=7), 81, 480, 832)


OTHERS = {"transposed": (3, 12, 10), "smaller": (2, 6, 8), "larger": (4, 10, 13)}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_grid_is_an_error(family: Family, other: tuple[int, int, int]) -> None:
    """Also with the same number of tokens, whose order differs."""
    model = applied(family)
    with pytest.raises(ValueError) as caught:
        run(model, family.inputs(other))
    for words in (str(other), str(GRID), "N=360", "(1)", "sla2.apply", "calibrated", "interpolate"):
        assert words in str(caught.value)
    run(model, family.inputs())


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_grid_runs_dense(family: Family, other: tuple[int, int, int]) -> None:
    plain = run(family.make(), family.inputs(other))
    model = applied(family, on_mismatch="dense")
    sparse = run(model, family.inputs())
    assert torch.equal(run(model, family.inputs(other)), plain)
    assert torch.equal(run(model, family.inputs()), sparse)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_grid_interpolates_alpha(
    family: Family, other: tuple[int, int, int], stage: int
) -> None:
    """The same as a model made for that grid, with the interpolated logits."""
    from sla2.integrations.grid import resize_alpha

    model = applied(family, on_mismatch="interpolate")
    twin = applied(family, grid=other)
    for (_, attn), (_, made) in zip(self_attention(model), self_attention(twin), strict=True):
        alpha = resize_alpha(attn.processor.sla2.alpha_offset.detach(), GRID, other)
        with torch.no_grad():
            for name in ("proj_q_delta", "proj_k_delta"):
                getattr(made.processor.sla2, name).copy_(getattr(attn.processor.sla2, name))
            made.processor.sla2.alpha_offset.copy_(alpha)
    for each in (model, twin):
        sla2.set_stage(each, stage)
    out = run(model, family.inputs(other))
    torch.testing.assert_close(out, run(twin, family.inputs(other)), atol=1e-5, rtol=1e-5)
    model(**family.inputs(other), return_dict=False)[0].sum().backward()
    assert all(bool(a.processor.sla2.alpha_offset.grad.any()) for _, a in self_attention(model))


def test_few_tokens_run_dense(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    model = applied(family, min_tokens=200)
    small = family.inputs((1, 10, 12))
    with caplog.at_level(logging.INFO, "sla2"):
        assert torch.equal(run(model, small), run(family.make(), small))
        run(model, small)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "grid (1, 10, 12) has 120 tokens, fewer than min_tokens=200"
    ]
    assert not torch.equal(run(model, family.inputs()), run(family.make(), family.inputs()))
    model = family.make()
    report = sla2.apply(model, topk=TOPK, grid=GRID, min_tokens=361)
    assert report.runs_dense and "every call runs dense" in repr(report)
    assert torch.equal(run(model, family.inputs()), run(family.make(), family.inputs()))


def test_ltx_with_coordinates() -> None:
    """Pipelines with conditioning frames: tokens beyond the grid, in an order of their own."""
    inputs = ltx_inputs()
    inputs["video_coords"] = torch.rand(2, 3, 360)
    for options in ({}, {"on_mismatch": "interpolate"}):
        with pytest.raises(ValueError, match=r"cannot be told.*sla2\.dense"):
            run(applied(FAMILIES["ltx"], **options), inputs)
    plain = run(make_ltx(), inputs)
    assert torch.equal(run(applied(FAMILIES["ltx"], on_mismatch="dense"), inputs), plain)
    model = applied(FAMILIES["ltx"])
    with sla2.dense(model):
        assert torch.equal(run(model, inputs), plain)


# ---- choices and errors -------------------------------------------------------------------------


def test_dense_blocks(family: Family) -> None:
    model = family.make()
    report = sla2.apply(model, topk=TOPK, grid=GRID, dense_blocks=(0, 2))
    assert report.replaced == (family.layers.format(1),)
    assert report.dense == (family.layers.format(0), family.layers.format(2))
    assert "dense     2 layers" in repr(report)
    kinds = [isinstance(attn.processor, SLA2Processor) for _, attn in self_attention(model)]
    assert kinds == [False, True, False]
    run(model, family.inputs())


def test_the_report_reads_well() -> None:
    text = repr(sla2.apply(make_wan(), topk=TOPK, grid=GRID))
    assert text.splitlines() == [
        "SLA2 in WanTransformer3DModel (adapter Wan), topk=0.3, quant=none",
        "  grid      (3, 10, 12): N=360, T_m=3, T_n=6",
        "  replaced  3 layers: blocks.0.attn1 to blocks.2.attn1",
        "  dense     0 layers",
        "  skipped   3 layers: blocks.0.attn2 to blocks.2.attn2",
        "  added     1554 parameters, 0.01 MiB in float32",
    ]


def test_layer_options() -> None:
    model = make_wan()
    sla2.apply(model, grid=GRID, layer_options={"per_head_router": True, "alpha_init": 0.5})
    layer = model.blocks[0].attn1.processor.sla2
    assert layer.proj_q_delta.shape == (2, 16, 16) and layer.alpha_init == 0.5


def test_a_second_apply_is_an_error(family: Family) -> None:
    model = applied(family)
    expected = run(model, family.inputs())
    with pytest.raises(RuntimeError, match=r"applied .* already \(3 layers\).*force=True"):
        sla2.apply(model, grid=GRID)
    assert torch.equal(run(model, family.inputs()), expected)
    report = sla2.apply(model, grid=GRID, topk=0.5, force=True)
    assert report.topk == 0.5 and len(model._forward_pre_hooks) == 1


def test_processors_that_somebody_replaced() -> None:
    model, inputs = make_wan(), wan_inputs()
    plain = run(model, inputs)
    sla2.apply(model, grid=GRID)
    model.set_attn_processor(type(model.blocks[0].attn2.processor)())
    assert torch.equal(run(model, inputs), plain)
    assert sla2.remove(model) == 0 and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grid": None}, ValueError, "alpha belongs to one token grid"),
        ({"grid": None, "num_frames": 9}, ValueError, "all of num_frames, height and width"),
        ({"num_frames": 9}, ValueError, "not both"),
        ({"grid": (3, 10)}, TypeError, "three ints"),
        ({"grid": (3, 10, 0)}, ValueError, "positive"),
        ({"topk": 1}, TypeError, "topk must be a float"),
        ({"topk": 2.0}, ValueError, r"topk=2\.0"),
        ({"quant": "int4"}, ValueError, "quant='int4'"),
        ({"on_mismatch": "ignore"}, ValueError, "on_mismatch='ignore'"),
        ({"min_tokens": 0.5}, TypeError, "min_tokens must be an int"),
        ({"dense_blocks": (3,)}, ValueError, r"dense_blocks has 3: the 3 blocks are 0\.\.2"),
        ({"dense_blocks": ("0",)}, TypeError, "dense_blocks must hold ints"),
        ({"dense_blocks": range(3)}, ValueError, "nothing to replace.*3 of them in dense_blocks"),
        ({"layer_options": {"tau": -1.0}}, ValueError, "tau"),
        ({"layer_options": {"layout": "BHND"}}, TypeError, "'layout', which apply sets itself"),
        (
            {"layer_options": {"topk": 0.1}},
            TypeError,
            "'topk', which apply sets itself: allowed are",
        ),
        ({"layer_options": {"tua": 0.1}}, TypeError, "'tua', which is no option: allowed are"),
        ({"layer_options": 3}, TypeError, "layer_options must be a mapping"),
        ({"router": "no such file"}, FileNotFoundError, "no such file"),
        ({"dropout": 0.1}, TypeError, "unexpected keyword argument 'dropout'"),
    ],
)
def test_wrong_arguments_change_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, inputs = make_wan(), wan_inputs()
    plain, keys = run(model, inputs), set(model.state_dict())
    with pytest.raises(error, match=message):
        sla2.apply(model, **{"grid": GRID, **options})
    assert torch.equal(run(model, inputs), plain) and set(model.state_dict()) == keys
    assert not model._forward_pre_hooks


def test_what_is_no_model_it_knows() -> None:
    import diffusers

    class Pipeline:
        transformer = transformer_2 = None

    with pytest.raises(TypeError, match="Pipeline: pass its transformer and its transformer_2"):
        sla2.apply(Pipeline(), grid=GRID)  # type: ignore[arg-type]
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8
    )
    with pytest.raises(TypeError, match=r"no adapter for DiT.*Wan.*Attention classes seen: .+"):
        sla2.apply(model, grid=GRID)


def test_cross_attention_and_masks_are_refused(family: Family) -> None:
    name, attn = self_attention(applied(family))[0]
    x = torch.randn(1, 360, 32)
    for inputs in ((x, x, None), (x, None, torch.ones(1, 360))):
        with pytest.raises(ValueError, match="self-attention without a mask"):
            attn.processor(attn, *inputs), name
