"""Router files and parameter groups: round trips, every mismatch, damage, wrappers, sharding."""

from __future__ import annotations

import builtins
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sla2
from sla2 import SLA2Attention, load_router, param_groups, save_router

H, D, N = 2, 16, 300
KEYS = ("proj_q_delta", "proj_k_delta", "alpha_offset")


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.to_q = nn.Linear(H * D, H * D)
        self.norm = nn.LayerNorm(H * D)
        self.attention = SLA2Attention(H, D, **{"seq_len": N, "topk": 0.5, **options})


class Model(nn.Module):
    def __init__(self, blocks: int = 2, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(blocks))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.3, generator=generator)


def router(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all router and alpha parameters."""
    return {k: v.clone() for k, v in model.state_dict().items() if k.rpartition(".")[2] in KEYS}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "router.safetensors"


def refuses(model: nn.Module, path: Path, match: str, **options: Any) -> None:
    """The error says `match`, and the model is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        load_router(model, path, **options)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Applies `change` to header and tensors of a router file."""
    with safetensors.safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["sla2.router"])
    tensors = safetensors.torch.load(path.read_bytes())
    change(header, tensors)
    safetensors.torch.save_file(tensors, path, {"sla2.router": json.dumps(header)})


# ---- round trip ---------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"per_head_router": True, "quant": "int8_fp8", "topk": 0.03},
    {"per_head_alpha": False, "tau": 0.3, "smooth_k": False, "alpha_init": 0.123456789},
    {"alpha_per_token": True, "phi_input": "raw", "router_score": "softmax"},
    {"seq_len": 1, "alpha_per_token": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(options: dict[str, Any], dtype: torch.dtype, path: Path) -> None:
    """Every bit, -0.0 too; parameters keep identity, dtype and requires_grad; the rest is kept."""
    source = Model(seed=1, **options).to(dtype)
    with torch.no_grad():
        source.blocks[0].attention.alpha_offset.view(-1)[0] = -0.0
    save_router(source, path)
    model = Model(seed=2, **options).to(dtype)
    identity = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    backbone = model.blocks[1].to_q.weight.clone()
    assert load_router(model, path) == []
    assert same_bits(router(model), router(source))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == identity
    assert all(value.dtype == torch.float32 for value in router(model).values())
    assert torch.equal(model.blocks[1].to_q.weight, backbone) and backbone.dtype == dtype


def test_a_single_layer(path: Path) -> None:
    source, model = Model(1, seed=1).blocks[0].attention, Model(1, seed=2).blocks[0].attention
    save_router(source, str(path))
    load_router(model, str(path))
    q, k, v = torch.randn(3, 1, N, H, D)
    assert torch.equal(model(q, k, v), source(q, k, v))
    refuses(Model(1), path, "the model has layer 'blocks.0.attention', the file has not")


def test_the_file(path: Path) -> None:
    """No pickle, the state_dict's names, settings to read, and the same bytes every time."""
    model = Model(seed=1)
    save_router(model, path)
    first = path.read_bytes()
    save_router(model, path)
    assert path.read_bytes() == first and os.listdir(path.parent) == [path.name]
    assert same_bits(safetensors.torch.load(first), router(model))
    with safetensors.safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["sla2.router"])
    assert header["version"] == 2 and header["sla2_version"] == sla2.__version__
    layer = header["layers"]["blocks.1.attention"]
    assert layer["topk"] == 0.5 and layer["seq_len"] == N and layer["block_q"] == 128


def test_the_file_has_ordinary_permissions(path: Path) -> None:
    (path.parent / "other").write_bytes(b"")
    save_router(Model(), path)
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_a_link_stays_a_link(path: Path) -> None:
    link = path.with_name("latest")
    link.symlink_to(path)
    save_router(Model(), link)
    assert link.is_symlink() and path.is_file()


# ---- which layers -------------------------------------------------------------------------------


def test_a_shared_layer_is_saved_once(path: Path) -> None:
    shared = Model(seed=1)
    shared.blocks[1].attention = shared.blocks[0].attention
    save_router(shared, path)
    assert set(safetensors.torch.load(path.read_bytes())) == {
        f"blocks.0.attention.{key}" for key in KEYS
    }
    again = Model(seed=2)
    again.blocks[1].attention = again.blocks[0].attention
    load_router(again, path)
    assert same_bits(router(again), router(shared))
    refuses(Model(), path, "the model has layer 'blocks.1.attention', the file has not")


def test_a_copy_is_a_model_of_its_own(path: Path) -> None:
    model = Model(seed=1)
    average = copy.deepcopy(model)
    save_router(Model(seed=2), path)
    load_router(average, path)
    assert same_bits(router(average), router(Model(seed=2)))
    assert same_bits(router(model), router(Model(seed=1)))


def test_wrappers_are_no_part_of_a_name(path: Path) -> None:
    save_router(Model(seed=1), path)
    plain = path.read_bytes()
    wrapped = Model(seed=1)
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0])
    wrapped = torch.compile(nn.DataParallel(wrapped))
    save_router(wrapped, path)
    assert path.read_bytes() == plain
    save_router(Model(seed=2), path)
    load_router(wrapped, path)
    assert torch.equal(
        wrapped.module.blocks[0].attention.alpha_offset,
        Model(seed=2).blocks[0].attention.alpha_offset,
    )


def test_models_without_layers(path: Path) -> None:
    for call in (save_router, load_router):
        with pytest.raises(ValueError, match="Linear has no SLA2Attention"):
            call(nn.Linear(2, 2), path)
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got dict"):
            call({}, path)
    with pytest.raises(ValueError, match="Linear has no SLA2Attention"):
        param_groups(nn.Linear(2, 2))
    assert not path.exists()


def test_parameters_without_values(path: Path) -> None:
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention' is on the meta device"):
        save_router(empty, path)
    assert not path.exists()
    save_router(Model(), path)
    with pytest.raises(ValueError, match="meta device and has no values.*to_empty"):
        load_router(empty, path)
    sharded = Model()
    sharded.blocks[1].attention.alpha_offset.data = torch.empty(0, 3)
    for call in (save_router, load_router):
        with pytest.raises(ValueError, match=r"shape \(0, 3\) instead of \(2, 3\).*ZeRO-3"):
            call(sharded, path)


def test_parameters_in_16_bit(path: Path) -> None:
    save_router(Model(), path)
    old = path.read_bytes()
    model = Model()
    half = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(half, assign=True)
    for call in (save_router, load_router):
        with pytest.raises(TypeError, match=r"torch\.float16 and must be torch\.float32"):
            call(model, path)
    assert path.read_bytes() == old


# ---- what does not fit --------------------------------------------------------------------------

# (options of the file, options of the model, the setting that is named, whether it can be tuned)
MISMATCHES: list[tuple[dict[str, Any], dict[str, Any], str, bool]] = [
    ({"topk": 0.05}, {"topk": 0.03}, "topk=0.05 in the file, topk=0.03", True),
    ({"quant": "int8_fp8"}, {}, "quant='int8_fp8' in the file, quant='none'", True),
    ({"tau": 0.2}, {}, "tau=0.2 in the file, tau=0.1", True),
    ({"router_score": "raw"}, {}, "router_score='raw' in the file, router_score='scaled'", True),
    ({"smooth_k": False}, {}, "smooth_k=False in the file, smooth_k=True", True),
    ({"phi_input": "raw"}, {}, "phi_input='raw' in the file, phi_input='smoothed'", True),
    ({"alpha_init": 0.5}, {}, r"alpha_init=0\.5 in the file, alpha_init=0\.85", False),
    ({"seq_len": 301}, {}, "seq_len=301 in the file, seq_len=300", False),
    ({"per_head_router": True}, {}, "per_head_router=True in the file", False),
    ({}, {"per_head_alpha": False}, "per_head_alpha=True in the file", False),
    ({}, {"alpha_per_token": True}, "alpha_per_token=False in the file", False),
]


@pytest.mark.parametrize(("saved", "own", "message", "tunable"), MISMATCHES)
def test_settings_that_differ(
    saved: dict[str, Any], own: dict[str, Any], message: str, tunable: bool, path: Path
) -> None:
    source = Model(seed=1, **saved)
    save_router(source, path)
    model = Model(seed=2, **own)
    refuses(model, path, rf"'blocks\.0\.attention' has {message}.*nothing was loaded")
    if not tunable:
        refuses(model, path, message, strict=False)
        return
    passed = load_router(model, path, strict=False)
    assert len(passed) == 2 and "'blocks.1.attention'" in passed[1]
    assert same_bits(router(model), router(source))
    assert all(getattr(model.blocks[0].attention, key) == value for key, value in own.items())


@pytest.mark.parametrize("key", ["num_heads", "head_dim", "block_q", "block_k"])
def test_sizes_that_differ(key: str, path: Path) -> None:
    sizes = {"num_heads": H, "head_dim": D, "block_q": 128, "block_k": 64}
    model = SLA2Attention(sizes["num_heads"], sizes["head_dim"], seq_len=N)
    if key.startswith("block"):
        save_router(model, path)
        rewrite(path, lambda header, _: header["layers"][""].update({key: 32}))
        message = f"{key}=32 in the file, {key}={sizes[key]}"
    else:
        other = {**sizes, key: 3}
        save_router(SLA2Attention(other["num_heads"], other["head_dim"], seq_len=N), path)
        message = f"{key}=3 in the file, {key}={sizes[key]}"
    refuses(model, path, f"layer without a name .* has {message}")
    refuses(model, path, message, strict=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", KEYS)
def test_values_that_are_not_finite(value: float, key: str, path: Path) -> None:
    """Neither written nor loaded; a model that has some may be given others."""
    save_router(Model(seed=1), path)
    old, model = path.read_bytes(), Model(seed=2)
    with torch.no_grad():
        getattr(model.blocks[1].attention, key).view(-1)[0] = value
    message = rf"{key} of layer 'blocks\.1\.attention' has NaN or infinity in 1 of its \d+ values"
    with pytest.raises(ValueError, match=message):
        save_router(model, path)
    assert path.read_bytes() == old
    load_router(model, path)
    assert same_bits(router(model), router(Model(seed=1)))
    rewrite(path, lambda _, tensors: tensors[f"blocks.1.attention.{key}"].view(-1)[0].fill_(value))
    refuses(Model(seed=2), path, f"{message}; nothing was loaded", strict=False)


def test_the_first_difference_is_named(path: Path) -> None:
    save_router(Model(seed=1), path)
    model = Model(seed=2)
    model.blocks[1].attention.quant = "int8_fp8"
    model.blocks[1].attention.topk = 0.25
    refuses(model, path, r"'blocks\.1\.attention' has topk=0\.5 in the file, topk=0\.25")


def test_a_late_difference_stops_everything_without_strict_too(path: Path) -> None:
    source = Model(seed=1)
    source.blocks[1].attention.alpha_init = 0.5
    save_router(source, path)
    refuses(Model(seed=2, topk=0.25), path, "alpha_init=0.5 in the file", strict=False)


def test_other_layers(path: Path) -> None:
    source, model = Model(3, seed=1), Model(2, seed=2)
    save_router(source, path)
    refuses(model, path, r"the file has layer 'blocks\.2\.attention', the model has not")
    (passed,) = load_router(model, path, strict=False)
    assert "'blocks.2.attention'" in passed
    assert same_bits(router(model), {k: v for k, v in router(source).items() if "s.2" not in k})
    save_router(Model(1, seed=3), path)
    refuses(model, path, r"the model has layer 'blocks\.1\.attention', the file has not")
    (passed,) = load_router(model, path, strict=False)
    assert "'blocks.1.attention'" in passed
    refuses(model.blocks[0], path, "no layer in common", strict=False)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["safetensors.torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(
    step: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_router(Model(seed=1), path)
    old = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="no space left"):
        save_router(Model(seed=2), path)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_truncated_file(length: int, path: Path) -> None:
    save_router(Model(), path)
    path.write_bytes(path.read_bytes()[:length])
    refuses(Model(seed=2), path, "is no safetensors file, or is cut short")


def test_foreign_files(path: Path) -> None:
    model = Model()
    with pytest.raises(FileNotFoundError):
        load_router(model, path)
    torch.save(model.state_dict(), path)
    refuses(model, path, "is no safetensors file")
    safetensors.torch.save_file(router(model), path)
    refuses(model, path, r"no router file of sla2\.save_router.*it has none")
    safetensors.torch.save_file(router(model), path, {"format": "pt"})
    refuses(model, path, r"no router file of sla2\.save_router.*it has 'format'")


def drop(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["blocks.1.attention.alpha_offset"]


def add(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.attention.gate"] = torch.zeros(1)


def halve(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = "blocks.1.attention.alpha_offset"
    tensors[name] = tensors[name].half()


def reshape(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.attention.alpha_offset"] = torch.zeros(2, 4)


DAMAGE: list[tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = [
    (drop, r"damaged: it lacks tensor 'blocks\.1\.attention\.alpha_offset'"),
    (add, r"damaged: it has an unknown tensor 'blocks\.1\.attention\.gate'"),
    (halve, r"damaged: alpha_offset of .* is torch\.float16"),
    (reshape, r"damaged: alpha_offset of .* shape \(2, 4\); .* \(2, 3\)"),
    (lambda header, _: header.pop("version"), "damaged: .*version"),
    (lambda header, _: header.update(version=3, sla2_version="9.1"), "version 3, .* by sla2 9.1"),
    (lambda header, _: header.update(layers={}), "damaged: .*no layers"),
    (lambda header, _: header["layers"]["blocks.0.attention"].pop("tau"), "damaged: .*settings of"),
    (lambda header, _: header["layers"]["blocks.0.attention"].update(seq_len="9"), "seq_len='9'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_a_damaged_file(change: Any, message: str, path: Path) -> None:
    save_router(Model(), path)
    rewrite(path, change)
    refuses(Model(seed=2), path, message)
    refuses(Model(seed=2), path, message, strict=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "5"])
def test_a_damaged_header(text: str, path: Path) -> None:
    safetensors.torch.save_file(router(Model()), path, {"sla2.router": text})
    refuses(Model(seed=2), path, r"damaged: entry 'sla2\.router'")


def test_without_safetensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fail(name: str, *rest: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    for call in (save_router, load_router):
        with pytest.raises(ImportError, match="pip install 'safetensors"):
            call(Model(), path)
    assert len(param_groups(Model())) == 2


# ---- FSDP2 --------------------------------------------------------------------------------------


def shard_and_load(rank: int, folder: Path) -> None:
    """One of two processes: loads full.safetensors, saves what it has as its own file."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = Model(seed=2, seq_len=1, per_head_alpha=False)  # alpha of one entry: rank 1 has none
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block.attention, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_router(model, folder / "full.safetensors")
    alpha = model.blocks[0].attention.alpha_offset
    assert isinstance(alpha, DTensor) and alpha.to_local().numel() == 1 - rank
    save_router(model, folder / f"rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fully_shard(tmp_path: Path) -> None:
    save_router(Model(seed=1, seq_len=1, per_head_alpha=False), tmp_path / "full.safetensors")
    torch.multiprocessing.spawn(shard_and_load, (tmp_path,), nprocs=2)
    saved = (tmp_path / "full.safetensors").read_bytes()
    for rank in range(2):
        assert (tmp_path / f"rank{rank}.safetensors").read_bytes() == saved


# ---- parameter groups ---------------------------------------------------------------------------


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


def test_groups_of_stage_1() -> None:
    model = Model()
    for block in model.blocks:
        block.to_q.requires_grad_(False)
        block.norm.requires_grad_(False)
        block.attention.set_stage(1)
    groups = by_name(param_groups(model))
    assert set(groups) == {"router", "alpha"}
    assert len(groups["router"]["params"]) == 4 and len(groups["alpha"]["params"]) == 2
    assert {(g["lr"], g["weight_decay"]) for g in groups.values()} == {(1e-3, 0.0)}


def test_groups_of_stage_2() -> None:
    groups = by_name(param_groups(Model()))
    assert set(groups) == {"alpha", "model"}  # the router is frozen
    assert (groups["alpha"]["lr"], groups["alpha"]["weight_decay"]) == (1e-5, 0.0)
    assert (groups["model"]["lr"], groups["model"]["weight_decay"]) == (1e-5, 0.01)


def test_groups_are_a_partition() -> None:
    """Each trainable parameter once, shared ones too, and torch.optim takes the groups."""
    model = Model(3)
    model.blocks[1].attention = model.blocks[0].attention
    model.blocks[2].to_q.weight = model.blocks[0].to_q.weight
    model.blocks[2].norm.bias.requires_grad_(False)
    for block in model.blocks:
        block.attention.set_stage(1)
    groups = param_groups(model, lr_router=3e-3, lr_alpha=2e-3, lr_model=0.0, weight_decay=0.5)
    members = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(members) == len(set(members)) and set(members) == trainable
    optimiser = torch.optim.AdamW(groups)
    used = [(g["name"], g["lr"], g["weight_decay"]) for g in optimiser.param_groups]
    assert used == [("router", 3e-3, 0.0), ("alpha", 2e-3, 0.0), ("model", 0.0, 0.5)]


@pytest.mark.parametrize("name", ["lr_router", "lr_alpha", "lr_model", "weight_decay"])
def test_rates_out_of_range(name: str) -> None:
    for value in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name}=.* is out of range"):
            param_groups(Model(), **{name: value})
    with pytest.raises(TypeError, match=f"{name} must be a float; got str"):
        param_groups(Model(), **{name: "1e-3"})
