"""The token grid in router files and recordings: alpha belongs to it, also where N is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import SMALL, Model, record
from safetensors import safe_open
from test_integrations_grid import Toy, ToyAdapter, full_attention
from test_router_io import refuses, rewrite, router, same_bits
from test_train_recorder import Dense
from test_train_recorder import rewrite as rewrite_sample
from torch import Tensor, nn

import sla2
from sla2 import SLA2Attention, load_router, save_router
from sla2.integrations import adapter, register_adapter
from sla2.train import QKVRecorder, fit_router

GRID, SWAPPED = (3, 10, 20), (3, 20, 10)
N = 600
UNKNOWN: dict[str, Any] = {"seq_len": N}
KNOWN: dict[str, Any] = {"seq_len": N, "grid": GRID}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapter, "_REGISTRY", list(adapter._REGISTRY))
    register_adapter(ToyAdapter)
    yield


def make_model(seed: int = 0, **options: Any) -> Model:
    """With routers and alphas of that seed."""
    model = Model(topk=0.4, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def saved_grids(path: Path) -> list[Any]:
    with safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["sla2.router"])
    assert header["version"] == 2
    return [layer["grid"] for layer in header["layers"].values()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "router.safetensors"


# ---- router files -------------------------------------------------------------------------------


def test_a_grid_is_checked_against_the_tokens() -> None:
    assert SLA2Attention(2, 16, seq_len=N, grid=list(GRID)).grid == GRID
    assert SLA2Attention(2, 16, seq_len=N).grid is None
    with pytest.raises(ValueError, match=r"grid=\(3, 10, 21\) has 630 tokens; seq_len is 600"):
        SLA2Attention(2, 16, seq_len=N, grid=(3, 10, 21))
    with pytest.raises(TypeError, match="grid must be three ints"):
        SLA2Attention(2, 16, seq_len=N, grid=(30, 20))


def test_the_file_has_the_grid(path: Path) -> None:
    for options, grid in ((KNOWN, list(GRID)), (UNKNOWN, None)):
        source = make_model(seed=1, **options)
        save_router(source, path)
        assert saved_grids(path) == [grid] * 2
        model = make_model(**options)
        assert load_router(model, path) == [] and same_bits(router(model), router(source))


@pytest.mark.parametrize("strict", [True, False])
def test_another_grid_of_as_many_tokens_loads_nothing(path: Path, strict: bool) -> None:
    save_router(make_model(seed=1, **KNOWN), path)
    refuses(
        make_model(seq_len=N, grid=SWAPPED),
        path,
        r"'blocks\.0\.attn1' has grid=\(3, 10, 20\) in the file, grid=\(3, 20, 10\) in the model; "
        "nothing was loaded.*order of the tokens",
        strict=strict,
    )


@pytest.mark.parametrize(("saved", "own"), [(KNOWN, UNKNOWN), (UNKNOWN, KNOWN)])
def test_an_unknown_grid_must_agree_in_tokens(
    path: Path, saved: dict[str, Any], own: dict[str, Any]
) -> None:
    source, model = make_model(seed=1, **saved), make_model(**own)
    save_router(source, path)
    assert load_router(model, path) == [] and same_bits(router(model), router(source))
    assert model.blocks[0].attn1.grid == own.get("grid")
    save_router(make_model(seed=1, seq_len=N + 1), path)
    refuses(model, path, "seq_len=601 in the file, seq_len=600 in the model")


def test_the_format_before_had_no_grid(path: Path) -> None:
    def downgrade(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        header["version"] = 1
        for settings in header["layers"].values():
            del settings["grid"]

    source = make_model(seed=1, **KNOWN)
    save_router(source, path)
    rewrite(path, downgrade)
    for grid in (None, GRID, SWAPPED):
        model = make_model(seq_len=N, grid=grid)
        assert load_router(model, path) == [] and same_bits(router(model), router(source))
    refuses(make_model(seq_len=N + 1), path, "seq_len=600 in the file, seq_len=601")
    rewrite(path, lambda header, _: header.update(version=2))
    refuses(make_model(**KNOWN), path, "damaged: .*settings of layer 'blocks.0.attn1'")


@pytest.mark.parametrize("grid", [[3, 10], [3, 10, 21], [3, -10, -20], "3x10x20", [3, 10, 20.0]])
def test_a_damaged_grid(path: Path, grid: Any) -> None:
    save_router(make_model(seed=1, **KNOWN), path)
    rewrite(path, lambda header, _: header["layers"]["blocks.1.attn1"].update(grid=grid))
    refuses(make_model(**KNOWN), path, "is damaged: .*grid")


# ---- apply --------------------------------------------------------------------------------------


def test_apply_refuses_a_router_of_another_grid(path: Path) -> None:
    source = Toy()
    sla2.apply(source, topk=0.2, grid=GRID)
    save_router(source, path)
    assert saved_grids(path) == [list(GRID)] * 2
    model = Toy()
    with pytest.raises(ValueError, match=r"grid=\(3, 10, 20\) in the file, grid=\(3, 20, 10\)"):
        sla2.apply(model, topk=0.2, grid=SWAPPED, router=path)
    assert all(layer.processor is full_attention for layer in model.layers)
    sla2.apply(model, topk=0.2, grid=SWAPPED, router="new")
    refuses(model, path, r"'layers\.0\.processor\.sla2' has grid=\(3, 10, 20\) in the file")
    sla2.apply(model, topk=0.2, grid=GRID, router=path, force=True)
    assert same_bits(router(model), router(source))


# ---- from recording to router file --------------------------------------------------------------


@torch.no_grad()
def record_calls(model: nn.Module, folder: Path, *grids: tuple[int, int, int]) -> Path:
    """A call at each of these grids."""
    with QKVRecorder(model, folder, append=True):
        for grid in grids:
            model(torch.randn(1, *grid, 16))
    return folder


def grids_of(folder: Path) -> set[str]:
    """As the metadata of the samples says."""
    found = set()
    for file in folder.iterdir():
        with safe_open(file, framework="pt") as stream:
            found.add(stream.metadata()["grid"])
    return found


def test_stage_1_carries_the_grid(tmp_path: Path) -> None:
    model = Toy()
    sla2.apply(model, topk=1.0, grid=GRID)
    samples = record_calls(model, tmp_path / "samples", GRID, GRID)
    assert grids_of(samples) == {"[3, 10, 20]"}
    paths = fit_router(samples, tmp_path / "fit", **{**SMALL, "topk": (0.2,), "steps": 1})
    assert saved_grids(paths[0.2]) == [list(GRID)] * 2
    with pytest.raises(ValueError, match=r"grid=\(3, 10, 20\) in the file, grid=\(3, 20, 10\)"):
        sla2.apply(Toy(), topk=0.2, grid=SWAPPED, router=paths[0.2])
    sla2.apply(Toy(), topk=0.2, grid=GRID, router=paths[0.2])
    settings = json.loads((tmp_path / "fit" / "settings.json").read_text())
    assert settings["layers"]["layers.0.processor.sla2"]["grid"] == list(GRID)


def test_the_grid_of_a_call_is_recorded(tmp_path: Path) -> None:
    """Under on_mismatch="interpolate" it is not the module's, and one alpha cannot learn both."""
    model = Toy()
    sla2.apply(model, topk=1.0, grid=GRID, on_mismatch="interpolate")
    samples = record_calls(model, tmp_path / "samples", SWAPPED)
    assert grids_of(samples) == {"[3, 20, 10]"}
    record_calls(model, samples, GRID)
    with pytest.raises(ValueError, match=r"agree in their grid.*\(3, 20, 10\).*\(3, 10, 20\)"):
        fit_router(samples, tmp_path / "fit", **SMALL)
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize(
    ("value", "stored"),
    [(GRID, "[3, 10, 20]"), ((3, 10, 21), "null"), ("rows", "null"), (7, "null")],
)
def test_other_modules_may_have_a_grid(tmp_path: Path, value: Any, stored: str) -> None:
    """Or mean something else by the name, which is no error."""
    module = Dense()
    module.grid = value
    with QKVRecorder(module, tmp_path, layers={"a": module}):
        module(*torch.randn(3, 1, N, 2, 8))
    assert grids_of(tmp_path) == {stored}


def test_samples_without_a_grid(tmp_path: Path) -> None:
    """Those of record(), and of recordings from before; some with and some without make one fit."""
    qkv = torch.randn(3, 1, N, 2, 16).unbind()
    folder = record(tmp_path / "samples", {"blocks.0.attn1": [qkv] * 2})
    assert grids_of(folder) == {"null"}
    rewrite_sample(folder / "blocks.0.attn1@000001.safetensors", grid=None)
    options = {**SMALL, "topk": (0.4,), "steps": 1}
    paths = fit_router(folder, tmp_path / "1", **options)
    assert saved_grids(paths[0.4]) == [None]
    rewrite_sample(folder / "blocks.0.attn1@000000.safetensors", grid="[3, 10, 20]")
    paths = fit_router(folder, tmp_path / "2", **options)
    assert saved_grids(paths[0.4]) == [list(GRID)]
    for damaged in ("[3, 10]", "[3, 10, 21]", "x"):
        rewrite_sample(folder / "blocks.0.attn1@000001.safetensors", grid=damaged)
        with pytest.raises(ValueError, match=r"@000001\.safetensors is damaged"):
            fit_router(folder, tmp_path / "3", **options)
