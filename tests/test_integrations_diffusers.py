"""What diffusers, accelerate and PEFT do to models keeps working on one with SLA2."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip(
    "diffusers", minversion="0.35.2", reason="needs diffusers >= 0.35.2: pip install '.[diffusers]'"
)

from test_integrations_models import (
    FAMILIES,
    GRID,
    TEXT,
    TOPK,
    Family,
    applied,
    make_wan,
    randomise,
    run,
    self_attention,
    wan_inputs,
)

import sla2
from sla2.integrations.processor import GridAttention


@pytest.fixture(params=["wan", "ltx"])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def routers(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the SLA2 parameters."""
    return {k: x.clone() for k, x in model.state_dict().items() if ".sla2." in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


# ---- LoRA ---------------------------------------------------------------------------------------


def lora_config(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    return peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        init_lora_weights=False, **options,
    )  # fmt: skip


def test_lora_trains_saves_and_loads(family: Family, tmp_path: Path) -> None:
    """docs/diffusers.md: the adapter in diffusers' file, router and alpha in sla2's."""
    model, inputs = applied(family), family.inputs()
    before = routers(model)
    model.add_adapter(lora_config())
    sla2.set_stage(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "lora_" not in name} == {"alpha_offset"}
    assert any("attn1.to_q.lora_A" in name for name in trained)
    groups = sla2.param_groups(model, lr_model=1e-2, lr_alpha=1e-1)
    assert [group["name"] for group in groups] == ["alpha", "model"]
    optimiser = torch.optim.AdamW(groups)
    assert set(gradients(model, inputs)) == trained
    optimiser.step()
    assert not any(torch.equal(before[k], x) for k, x in routers(model).items() if "alpha" in k)
    out = run(model, inputs)

    model.save_lora_adapter(tmp_path)
    sla2.save_router(model, tmp_path / "router.safetensors")
    loaded = family.make()
    sla2.apply(loaded, topk=TOPK, grid=GRID, router=tmp_path / "router.safetensors")
    name = "pytorch_lora_weights.safetensors"
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name=name)
    assert torch.equal(run(loaded, inputs), out)
    loaded.disable_adapters()
    with sla2.dense(loaded):
        assert torch.equal(run(loaded, inputs), run(family.make(), inputs))


def test_lora_with_modules_to_save_trains(family: Family) -> None:
    """PEFT then keeps copies of its own; what it does not use stays frozen."""
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    model.add_adapter(lora_config(modules_to_save=["sla2"]))
    model.disable_adapters()
    assert torch.equal(run(model, inputs), expected)
    model.enable_adapters()
    sla2.set_stage(model, 2)
    sla2.set_topk(model, 0.5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("original_module" in name for name in trained)
    grads = gradients(model, inputs)
    assert set(grads) == trained
    assert any("modules_to_save.default.alpha_offset" in name for name in grads)


# ---- where parameters live ----------------------------------------------------------------------


def test_model_offload(family: Family) -> None:
    """`enable_model_cpu_offload` moves the whole model around each call."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    assert torch.equal(run(model, inputs), expected)
    hook.offload()
    assert torch.equal(run(model, inputs), expected)
    with pytest.raises(ValueError, match="this call has the grid"):
        run(model, family.inputs((2, 6, 8)))
    moved = {p.device.type for p in copy.deepcopy(model).to("meta").parameters()}
    assert moved == {"meta"}


def test_sequential_offload(family: Family) -> None:
    """`enable_sequential_cpu_offload` takes every module's parameters away between calls."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in self_attention(model)[0][1].processor.parameters())
    assert torch.equal(run(model, inputs), expected)
    late = family.make()
    accelerate.cpu_offload(late, execution_device="cpu")
    with pytest.raises(RuntimeError, match=r"call sla2\.apply first"):
        sla2.apply(late, grid=GRID)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind: str) -> None:
    """On the GPU alone: diffusers asks for an accelerator. head_dim 64, as the kernels need."""
    model = make_wan(attention_head_dim=64).to(torch.bfloat16)
    sla2.apply(model, topk=TOPK, grid=GRID)
    randomise(model)
    gpu = {k: x.cuda() for k, x in wan_inputs().items()}
    inputs = {k: x.bfloat16() if k.endswith("states") else x for k, x in gpu.items()}
    expected = run(copy.deepcopy(model).cuda(), inputs)
    assert same(routers(copy.deepcopy(model).cuda().cpu()), routers(model))
    model.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type=kind,
        **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
    )  # fmt: skip
    assert torch.equal(run(model, inputs), expected)
    assert torch.equal(run(model, inputs), expected)


def test_parameters_stay_float32(family: Family) -> None:
    """In 16 bit the router would choose other blocks."""
    model = applied(family)
    before, dtype = routers(model), model.dtype
    assert dtype == family.make().dtype
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and same(routers(model), before)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert same(routers(model), before)
    inputs = {k: x.bfloat16() if k.endswith("states") else x for k, x in family.inputs().items()}
    assert bool(run(model, inputs).isfinite().all()) and same(routers(model), before)


def test_half_precision_model_gets_float32_parameters(family: Family) -> None:
    model = family.make().to(torch.bfloat16)
    sla2.apply(model, topk=TOPK, grid=GRID)
    assert {x.dtype for x in routers(model).values()} == {torch.float32}


def test_ema(family: Family) -> None:
    from diffusers.training_utils import EMAModel

    model, inputs = applied(family), family.inputs()
    ema = EMAModel(copy.deepcopy(model).parameters(), decay=0.5)
    start = run(model, inputs)
    for _ in range(2):  # the first one copies
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        ema.step(model.parameters())
    out = run(model, inputs)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert not torch.equal(run(model, inputs), out) and not torch.equal(run(model, inputs), start)
    ema.restore(model.parameters())
    assert torch.equal(run(model, inputs), out)


# ---- how the model runs -------------------------------------------------------------------------


def test_fused_projections(family: Family) -> None:
    """Fused before or after: the same function, on strided v."""
    inputs = family.inputs()
    expected = run(applied(family), inputs)
    after = applied(family)
    after.fuse_qkv_projections()
    before = family.make()
    before.fuse_qkv_projections()
    sla2.apply(before, topk=TOPK, grid=GRID)
    for model in (after, randomise(before)):
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
        model.unfuse_qkv_projections()
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_checkpointing(family: Family, stage: int) -> None:
    model = applied(family).train()
    sla2.set_stage(model, stage)
    expected = gradients(model, family.inputs())
    model.enable_gradient_checkpointing()
    assert same(gradients(model, family.inputs()), expected)
    with sla2.dense(model):
        dense = gradients(model, family.inputs())
    model.disable_gradient_checkpointing()
    with sla2.dense(model):
        assert same(gradients(model, family.inputs()), dense)


def test_checkpointing_across_the_end_of_dense_is_an_error(family: Family) -> None:
    """The second forward would run SLA2: torch sees that other tensors are saved."""
    model = applied(family).train()
    model.enable_gradient_checkpointing()
    with sla2.dense(model):
        out = model(**family.inputs(), return_dict=False)[0].sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        out.backward()


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks(family: Family) -> None:
    """One graph a block, backward included, and new graphs only where something changed."""
    inputs = family.inputs()
    model = applied(family, on_mismatch="interpolate")
    other = family.inputs((2, 6, 8))
    expected, grads = run(model, inputs), gradients(model, inputs)
    expected_other = run(model, other)
    with sla2.dense(model):
        expected_dense = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(run(model, inputs), expected)
    assert same(gradients(model, inputs), grads)
    with sla2.dense(model):
        assert torch.equal(run(model, inputs), expected_dense)
    assert torch.equal(run(model, other), expected_other)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(model, inputs), expected)
        assert torch.equal(run(model, other), expected_other)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_model(family: Family) -> None:
    """The whole model, with what of the library's own code the compiler does not take."""
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="this call has the grid"):
        run(compiled, family.inputs((2, 6, 8)))
    with sla2.dense(compiled):
        dense = run(compiled, inputs)
    torch.testing.assert_close(dense, run(family.make(), inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="has to be unwrapped first"):
        sla2.apply(compiled, grid=GRID)
    assert sla2.remove(compiled) == 3


def test_a_pipeline_with_dense_steps() -> None:
    """docs/diffusers.md: the callback ends the dense part."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), make_wan())
    pipe.set_progress_bar_config(disable=True)
    prompts = torch.randn(2, 1, 512, TEXT)
    video = {"num_frames": 9, "height": 160, "width": 192}

    def generate(**options: Any) -> Tensor:
        return pipe(
            prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], num_inference_steps=3,
            output_type="latent", generator=torch.Generator().manual_seed(0), **video, **options,
        ).frames  # fmt: skip

    plain = generate()
    sla2.apply(pipe.transformer, topk=TOPK, **video)
    assert not torch.equal(generate(), plain)
    calls: list[int] = []
    layer = pipe.transformer.blocks[0].attn1.processor.sla2
    layer.register_forward_hook(lambda *_: calls.append(1))
    with contextlib.ExitStack() as stack:
        stack.enter_context(sla2.dense(pipe.transformer))

        def after_step(pipe: Any, step: int, timestep: Tensor, inputs: Any) -> Any:
            if step == 1:
                stack.close()
            return inputs

        generate(callback_on_step_end=after_step)
    assert len(calls) == 2  # the last step, with and without the prompt
    with sla2.dense(pipe.transformer):
        assert torch.equal(generate(), plain)


def test_attention_backend_is_that_of_dense_calls(family: Family) -> None:
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    model.set_attention_backend("_native_math")
    processor = self_attention(model)[0][1].processor
    assert processor._attention_backend is not None
    assert processor.original._attention_backend is processor._attention_backend
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    model.set_attention_backend("native")  # newer diffusers also notes it for the whole process
    model.reset_attention_backend()
    assert processor._attention_backend is None
    assert torch.equal(run(model, inputs), expected)


def test_context_parallelism_is_refused(family: Family) -> None:
    attn = self_attention(applied(family))[0][1]
    attn.processor._parallel_config = None
    with pytest.raises(RuntimeError, match=r"context parallelism.*ring attention.*sla2\.remove"):
        attn.processor._parallel_config = object()
    model = family.make()
    self_attention(model)[1][1].processor._parallel_config = object()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1 runs under diffusers' context"):
        sla2.apply(model, grid=GRID)
    assert not routers(model)


# ---- saving and loading -------------------------------------------------------------------------


def save_and_load(model: Any, folder: Path) -> Any:
    """What a user does without thinking of SLA2; diffusers only logs a warning."""
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return type(model).from_pretrained(folder)


@pytest.mark.parametrize("sharded", [False, True], ids=["", "sharded"])
def test_a_checkpoint_with_sla2_is_not_lost_silently(
    family: Family, tmp_path: Path, sharded: bool
) -> None:
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    if sharded:
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = (
        save_and_load(model, tmp_path) if not sharded else type(model).from_pretrained(tmp_path)
    )
    assert not routers(loaded)  # dropped by diffusers
    with pytest.raises(ValueError) as caught:
        sla2.apply(loaded, topk=TOPK, grid=GRID)
    for words in (str(tmp_path), "from_pretrained has dropped", "save_router", "router='new'"):
        assert words in str(caught.value)
    assert not routers(loaded) and not loaded._forward_pre_hooks
    sla2.apply(loaded, topk=TOPK, grid=GRID, router=tmp_path)
    assert same(routers(loaded), routers(model))
    assert torch.equal(run(loaded, inputs), expected)
    sla2.apply(loaded, topk=TOPK, grid=GRID, router="new", force=True)
    assert not any(bool(x.any()) for x in routers(loaded).values())


def test_a_checkpoint_with_nan_is_refused(tmp_path: Path) -> None:
    model = applied(FAMILIES["wan"])
    name = next(name for name in routers(model) if name.endswith("alpha_offset"))
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0] = torch.nan
    loaded = save_and_load(model, tmp_path)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has NaN or infinity in 1 of"):
        sla2.apply(loaded, topk=TOPK, grid=GRID, router=tmp_path)
    assert not routers(loaded)


def test_a_checkpoint_in_a_subfolder(tmp_path: Path) -> None:
    """As a pipeline saves it: from_pretrained then notes the pipeline's folder."""
    model = applied(FAMILIES["wan"])
    model.save_pretrained(tmp_path / "transformer")
    loaded = type(model).from_pretrained(tmp_path, subfolder="transformer")
    with pytest.raises(ValueError, match="from_pretrained has dropped"):
        sla2.apply(loaded, grid=GRID)


def test_saving_without_sla2(family: Family, tmp_path: Path) -> None:
    """The recommended way: two files, the model's own without a trace of SLA2."""
    model, inputs = applied(family), family.inputs()
    expected = run(model, inputs)
    sla2.save_router(model, tmp_path / "router.safetensors")
    sla2.remove(model)
    loaded = save_and_load(model, tmp_path / "model")
    sla2.apply(loaded, topk=TOPK, grid=GRID, router=tmp_path / "router.safetensors")
    assert torch.equal(run(loaded, inputs), expected)


def test_a_state_dict_loads_into_a_model_with_sla2(family: Family) -> None:
    model = applied(family)
    fresh = family.make()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*processor\.sla2"):
        fresh.load_state_dict(model.state_dict())
    sla2.apply(fresh, topk=TOPK, grid=GRID)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, family.inputs()), run(model, family.inputs()))


def test_routers_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = applied(FAMILIES["wan"])
    model.save_pretrained(tmp_path / "model")
    sla2.save_router(model, tmp_path / "router.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        sla2.save_router(model, tmp_path / "two" / f"{name}.safetensors")
    for path, options, message in (
        ("model", {"grid": (3, 10, 14)}, r"alpha_offset has shape \(2, 3\).*needs \(2, 4\).*N=420"),
        ("router.safetensors", {"topk": 0.5}, r"topk=0\.3 in the file, topk=0\.5 in the model"),
        ("router.safetensors", {"dense_blocks": (0,)}, "blocks.0.attn1.processor.sla2"),
        ("other.safetensors", {}, "no router file, and no checkpoint"),
        ("empty", {}, "no router file, and no checkpoint"),
        ("two", {}, "2 router files: pass one of a.safetensors, b.safetensors"),
    ):
        fresh = make_wan()
        with pytest.raises(ValueError, match=message):
            sla2.apply(fresh, **{"grid": GRID, "topk": TOPK, "router": tmp_path / path, **options})
        assert not routers(fresh) and not fresh._forward_pre_hooks
    more = make_wan(num_layers=4)
    with pytest.raises(ValueError, match=r"blocks\.3\.attn1\.processor\.sla2\.\w+ is missing"):
        sla2.apply(more, grid=GRID, topk=TOPK, router=tmp_path / "model")


def test_on_the_meta_device(family: Family) -> None:
    """A model that is to be loaded later."""
    with torch.device("meta"):
        model = family.make()
    sla2.apply(model, topk=TOPK, grid=GRID)
    layer = self_attention(model)[0][1].processor.sla2
    assert isinstance(layer, GridAttention) and all(p.is_meta for p in layer.parameters())
