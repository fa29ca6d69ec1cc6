"""Stage 1's fit: interruptions, files that stay whole, steps that are not finite, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import (
    FRACTIONS,
    SMALL,
    D,
    H,
    Model,
    N,
    contents,
    random_samples,
    read_log,
    record,
    record_two_layers,
)
from torch import Tensor, nn

from sla2 import SLA2Attention, load_router
from sla2.train import fit, fit_folder, fit_router
from sla2.train.fit_data import ProblemLoader
from sla2.train.fit_log import FitLog, Row
from sla2.train.samples import fingerprint, list_files


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return record_two_layers(tmp_path / "samples")


# ---- interruptions ------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit_router(record_two_layers(folder / "samples"), folder / "out", **SMALL)
    return contents(folder / "out")


# 2 layers x 2 topk x 5 steps, a checkpoint after steps 2 and 4 of each run.
@pytest.mark.parametrize("row", [0, 1, 2, 3, 4, 5, 8, 14, 19])
def test_resume_is_bit_equal(
    samples: Path, tmp_path: Path, uninterrupted: dict[str, Any], row: int
) -> None:
    """Interrupted when a row is written: before a checkpoint, after one, between runs."""
    output, written = tmp_path / "out", 0
    add = FitLog.add

    def failing(self: FitLog, value: Row) -> None:
        nonlocal written
        add(self, value)
        written += 1
        if written == row + 1:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(FitLog, "add", failing)
        fit_router(samples, output, **SMALL)
    assert len(read_log(output)) == row + 1
    fit_router(samples, output, **SMALL, resume=True)
    assert contents(output) == uninterrupted


@pytest.mark.parametrize("call", [1, 2, 3, 6, 9, 12, 13])
def test_a_file_is_whole_or_as_before(
    samples: Path, tmp_path: Path, uninterrupted: dict[str, Any], call: int
) -> None:
    """Each of the writes of a fit fails half way; the next call goes on from the one before."""
    output, calls = tmp_path / "out", 0
    write_bytes = Path.write_bytes

    def failing(self: Path, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == call:
            write_bytes(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", failing)
        fit_router(samples, output, **SMALL)
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]
    fit_router(samples, output, **SMALL, resume=True)
    assert contents(output) == uninterrupted


def test_a_crash_before_the_checkpoint_is_deleted(
    samples: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    output = tmp_path / "out"

    checkpoint, whole = output / "checkpoint.safetensors", fit_folder.FitFolder.finish

    def finish(self: fit_folder.FitFolder, *args: Any) -> None:
        before = checkpoint.read_bytes()
        whole(self, *args)
        checkpoint.write_bytes(before)
        raise Interrupted

    for finished in (1, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(fit_folder.FitFolder, "finish", finish)
            fit_router(samples, output, **SMALL, resume=True)
        assert checkpoint.exists()
        assert len(list((output / "layers").glob("*.trained.*"))) == finished
    fit_router(samples, output, **SMALL, resume=True)
    assert contents(output) == uninterrupted


def test_a_finished_fit_resumes_to_itself(
    samples: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """resume=True also starts one; the second call computes nothing."""
    for _ in range(2):
        paths = fit_router(samples, tmp_path / "out", **SMALL, resume=True)
        assert contents(tmp_path / "out") == uninterrupted
    assert paths == {k: tmp_path / "out" / f"router_{k}.safetensors" for k in FRACTIONS}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "layers", "log.csv", "report.csv", "router_0.4.safetensors", "router_0.8.safetensors",
        "settings.json",
    ]  # fmt: skip
    assert load_router(Model(topk=0.8), paths[0.8]) == []
    with pytest.raises(ValueError, match=r"has topk=0.8 in the file, topk=0.4 in the model"):
        load_router(Model(topk=0.4), paths[0.8])
    with pytest.raises(ValueError, match="has seq_len=300 in the file, seq_len=301"):
        load_router(Model(topk=0.8, seq_len=301), paths[0.8])


def test_a_damaged_checkpoint_is_named(samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(fit_folder.FitFolder, "finish", lambda *_: (_ for _ in ()).throw(Interrupted))
        fit_router(samples, output, **SMALL)
    checkpoint = output / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], (output / "settings.json").read_bytes()):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged.*Delete it"):
            fit_router(samples, output, **SMALL, resume=True)
    checkpoint.unlink()
    fit_router(samples, output, **SMALL, resume=True)


def test_resume_refuses_other_settings(samples: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    fit_router(samples, output, **{**SMALL, "steps": 1})
    before = contents(output)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"has steps=1, this call steps=2", {"steps": 2}),
        (r"topk=\[0.8, 0.4\], this call topk=\[0.8, 0.5\]", {"topk": (0.8, 0.5)}),
        ("lr=0.001, this call lr=0.01", {"lr": 0.01}),
        ("seed=0, this call seed=1", {"seed": 1}),
        ("schedule='cosine', this call schedule='constant'", {"schedule": "constant"}),
        ("warmup=10, this call warmup=11", {"warmup": 11}),
        (r"tau=\[.*\], this call tau=None", {"tau": None}),
        ("decay=0.01, this call decay=0.1", {"decay": 0.1}),
        ("refit_alpha=True, this call refit_alpha=False", {"refit_alpha": False}),
        ("keep_better=True, this call keep_better=False", {"keep_better": False}),
        ("batch=2, this call batch=3", {"batch": 3}),
        ("dtype=None, this call dtype='torch.float16'", {"dtype": torch.float16}),
        ("calibrate=True, this call calibrate=False", {"calibrate": False}),
        (r"layer_options=\{\}, this .*=\{'tau': 0.2\}", {"layer_options": {"tau": 0.2}}),
        (r"layers=\['blocks.0.* this .*=\['blocks.0.attn1'\]", {"layers": ["blocks.0.attn1"]}),
    ]  # fmt: skip
    for match, change in cases:
        with pytest.raises(ValueError, match=match):
            fit_router(samples, output, **{**SMALL, "steps": 1, **change}, resume=True)
    other = record(tmp_path / "more", {"blocks.0.attn1": random_samples(4),
                                       "blocks.1.attn1": random_samples()})  # fmt: skip
    match = r"has samples of layer 'blocks.0.attn1'=\['0', '1', '2'\], this .*'2', '3'\]"
    with pytest.raises(ValueError, match=match):
        fit_router(other, output, **{**SMALL, "steps": 1}, resume=True)
    with pytest.raises(FileExistsError, match="already holds a fit.*resume=True"):
        fit_router(samples, output, **{**SMALL, "steps": 1})
    (output / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        fit_router(samples, output, **{**SMALL, "steps": 1}, resume=True)
    with pytest.raises(FileExistsError, match="not empty and holds no fit"):
        fit_router(samples, samples, **SMALL, resume=True)
    assert {**contents(output), "settings.json": None} == {**before, "settings.json": None}


def test_resume_refuses_other_samples(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """As many, under the same names and priorities; those it began with are taken again."""
    samples, output = tmp_path / "samples", tmp_path / "out"

    def record_again(**changed: list[list[Tensor]]) -> None:
        shutil.rmtree(samples, ignore_errors=True)
        names = {"blocks.0.attn1": "a", "blocks.1.attn1": "b"}
        layers = {name: changed.get(key, random_samples()) for name, key in names.items()}
        record(samples, layers, seed=5)

    record_again()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(fit_folder.FitFolder, "finish", lambda *_: (_ for _ in ()).throw(Interrupted))
        fit_router(samples, output, **SMALL)
    before = contents(output)
    others = random_samples()
    others[1][2][0, 150, 1, 3] += 1
    record_again(b=others)
    match = "has fingerprint of sample 1 of layer 'blocks.1.attn1'='.*', this call .*resume=True"
    with pytest.raises(ValueError, match=match):
        fit_router(samples, output, **SMALL, resume=True)
    record_again(a=random_samples(shape=(2, N, H, D)))
    with pytest.raises(ValueError, match="fingerprint of sample 0 of layer 'blocks.0.attn1'"):
        fit_router(samples, output, **SMALL, resume=True)
    assert contents(output) == before
    record_again()
    fit_router(samples, output, **SMALL, resume=True)
    assert contents(output) == uninterrupted


def test_fingerprints_of_large_samples(tmp_path: Path) -> None:
    """A little is read of each tensor, whatever their size; only tensors count."""
    base = list(torch.arange(3 << 17).view(3, 1, 1 << 12, 2, 16).to(torch.float32).unbind())
    cases = [base, base, *([x + 1 if i == j else x for i, x in enumerate(base)] for j in range(3))]
    folder = record(tmp_path, {"a": cases})
    first, same, *others = (fingerprint(file) for file in list_files(folder))
    assert same == first and len({first, *others}) == 4


# ---- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the loss", "the gradient of proj_k_delta"])
def test_a_step_that_is_not_finite(
    samples: Path, tmp_path: Path, uninterrupted: dict[str, Any], what: str
) -> None:
    """It is named, and the state before it is on disk: without the fault the fit goes on."""
    output, calls = tmp_path / "out", 0
    backward = fit._backward

    def failing(
        module: SLA2Attention, loader: ProblemLoader, chosen: list[int]
    ) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        loss, error = backward(module, loader, chosen)
        if calls == 14:
            if what == "the loss":
                return torch.nan, error
            module.proj_k_delta.grad[1, 2] = torch.inf
        return loss, error

    match = (
        rf"layer 'blocks.1.attn1', topk=0.8, step 4: {what} is not finite .* on samples "
        r"blocks\.1\.attn1@00000\d\.safetensors, blocks"
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=match):
        patch.setattr(fit, "_backward", failing)
        fit_router(samples, output, **SMALL)
    calls = 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=match):
        patch.setattr(fit, "_backward", failing)
        calls = 13  # resumed at the bad step itself
        fit_router(samples, output, **SMALL, resume=True)
    fit_router(samples, output, **SMALL, resume=True)
    assert contents(output) == uninterrupted


@pytest.mark.parametrize("tensor", [0, 2])
def test_nan_in_a_sample(tmp_path: Path, tensor: int) -> None:
    problems = random_samples()
    problems[1][tensor][0, 200, 1, 3] = torch.nan
    folder = record(tmp_path / "samples", {"fine": random_samples(), "x": problems})
    match = r"layer 'x', before step 1: .* in sample 1" if tensor == 0 else (
        r"layer 'x', topk=0.8, step [12]: the loss is not finite \(loss nan\).*x@000001"
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=match):
        fit_router(folder, tmp_path / "out", **SMALL)
    for topk in FRACTIONS:
        layer = SLA2Attention(H, D, seq_len=N, topk=topk)
        load_router(layer, tmp_path / "out" / "layers" / f"fine@{topk}.safetensors")
        assert all(bool(x.isfinite().all()) for x in layer.state_dict().values())


# ---- errors before the start --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"topk": (0.4, 0.8)}, ValueError, r"topk=\(0.4, 0.8\) must descend"),
        ({"topk": (0.4, 0.4)}, ValueError, "must descend"),
        ({"topk": ()}, ValueError, "topk is empty"),
        ({"topk": (1,)}, TypeError, "must hold floats.*got 1"),
        ({"topk": 0.05}, TypeError, "must be a sequence of floats"),
        ({"topk": (1.5, 0.5)}, ValueError, "topk=1.5 is out of range"),
        ({"steps": 0}, ValueError, "steps=0 is less than 1"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"batch": 4}, ValueError, "batch=4 is more than the 3 samples of layer 'blocks.0.attn1'"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes=-1 is less than 0"),
        ({"checkpoint_every": True}, TypeError, "checkpoint_every must be an int"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"lr": 0.0}, ValueError, "lr=0.0 is out of range"),
        ({"lr": "1e-3"}, TypeError, "lr must be a float"),
        ({"schedule": "linear"}, ValueError, "schedule='linear'"),
        ({"warmup": -1}, ValueError, "warmup=-1 is less than 0"),
        ({"tau": 0.1}, TypeError, "tau must be two floats"),
        ({"tau": (0.1, 0.01, 0.001)}, TypeError, "tau must be two floats"),
        ({"tau": (0.1, 0.0)}, ValueError, "tau=0.0 is out of range"),
        ({"decay": -0.1}, ValueError, "decay=-0.1 is out of range"),
        ({"decay": 1.0}, ValueError, "decay=1.0 is out of range"),
        ({"decay": "1"}, TypeError, "decay must be a float"),
        ({"keep_better": None}, TypeError, "keep_better must be True or False"),
        ({"resume": 1}, TypeError, "resume must be True or False"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be a torch.dtype"),
        ({"dtype": torch.int8}, ValueError, r"'blocks.0.attn1' \(torch.int8\) on cpu"),
        ({"device": "meta"}, ValueError, "sla2 runs on 'cpu' and on NVIDIA GPUs"),
        ({"layers": "blocks.0.attn1"}, TypeError, "did you mean"),
        ({"layers": ["a"]}, ValueError, r"no samples of layers \['a'\], only: blocks.0.attn1"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layer_options": {"tau": -1.0}}, ValueError, "tau=-1.0 is out of range"),
        ({"layer_options": ["tau"]}, TypeError, r"layer_options must be a mapping.* got \['tau'\]"),
        ({"layer_options": {"temperature": 1}}, TypeError, "'temperature'.*: allowed .* tau, rout"),
        *(
            (
                {"layer_options": {name: 1}},
                TypeError,
                f"'{name}', which fit_router sets itself: all",
            )
            for name in ("num_heads", "head_dim", "seq_len", "grid", "topk", "layout", "device")
        ),
        *(
            ({"layer_options": {name: value}}, TypeError, f"'{name}'.*: a bool, int, float or str")
            for name, value in (
                ("alpha_init", torch.tensor(0.5)),
                ("per_head_router", torch.tensor(True)),
                ("tau", None),
                ("quant", ["none"]),
            )
        ),
    ],
    ids=str,
)
def test_arguments(
    samples: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        fit_router(samples, tmp_path / "out", **{**SMALL, **change})
    assert not (tmp_path / "out").exists()


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    def refused(name: str, layers: dict[str, Any], match: str) -> None:
        folder = record(tmp_path / name, layers)
        with pytest.raises(ValueError, match=match):
            fit_router(folder, tmp_path / "out", **SMALL)
        assert not (tmp_path / "out").exists()

    usual = random_samples()
    refused("none", {}, "none holds no samples")
    longer = random_samples(1, shape=(1, N + 1, H, D))
    refused("grid", {"x": usual + longer}, r"x@000003.safetensors has torch.bfloat16 \(1, 301, 2")
    refused("dtype", {"x": usual + random_samples(1, torch.float16)}, "has torch.float16")
    refused("empty", {"x": random_samples(shape=(0, N, H, D))}, r"is empty: q has shape \(0,")
    for name in ("..", "a..b", "forward", "a.", "a.b.training"):
        refused(f"name {name}", {name: usual}, "not named like a module")
    folder = record(tmp_path / "damaged", {"x": usual})
    damaged = folder / "x@000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(ValueError, match="x@000002.safetensors is damaged"):
        fit_router(folder, tmp_path / "out", **SMALL)
    with pytest.raises(FileNotFoundError, match="absent"):
        fit_router(tmp_path / "absent", tmp_path / "out", **SMALL)


def test_layers_of_different_grids(tmp_path: Path) -> None:
    """Each layer has its own shape; a layer inside another keeps its name."""
    layers = {"a": random_samples(), "a.b": random_samples(shape=(1, 70, 1, 8))}
    paths = fit_router(record(tmp_path / "samples", layers), tmp_path / "out", **SMALL)
    model = nn.Module()
    model.a = SLA2Attention(H, D, seq_len=N, topk=0.4)
    model.a.b = SLA2Attention(1, 8, seq_len=70, topk=0.4)
    assert load_router(model, paths[0.4]) == []
