"""The examples of both stages, end to end: one process, an interruption, and two processes."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fit_cases import errors_line
from package_tools import REPOSITORY
from safetensors.torch import load_file

sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY / "examples"))

import run_folder
from quality.model import load_model, use_sla2

import sla2

TOPK = 0.2
GRID = ("--grid", "3", "8", "16", "--patch", "2")
SIZES = (*GRID, "--heads", "2", "--head-dim", "16", "--depth", "2")
SMALL = ("--device", "cpu", "--batch", "1")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fit_stage1, train_stage2 = load("fit_stage1"), load("train_stage2")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than these sizes gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """A base model and its routers, and calls of stage 2 on them."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "base" / "model.safetensors"
        self.router = folder / "stage1" / "fit" / f"router_{TOPK:g}.safetensors"
        self.other_model = folder / "other" / "model.safetensors"
        for seed, model in enumerate((self.model, self.other_model)):
            base = [*SMALL, *SIZES, "--steps", "2", "--seed", str(seed)]
            assert train_stage2.main([*base, "--output", str(model.parent)]) == 0
        self.stage1 = self.stage1_arguments(folder / "stage1")
        assert fit_stage1.main(self.stage1) == 0

    def stage1_arguments(self, output: Path, *more: str) -> list[str]:
        return [
            *("--device", "cpu", "--model", str(self.model), "--output", str(output)),
            *("--topk", "0.5", str(TOPK), "--samples", "2", "--steps", "2", *more),
        ]

    def arguments(self, output: Path, *more: str, steps: int = 4) -> list[str]:
        return [
            *(*SMALL, "--steps", str(steps), "--output", str(output), "--model", str(self.model)),
            *("--router", str(self.router), "--topk", str(TOPK), *more),
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("stages"))


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as stream:
        return [{**row, "seconds": ""} for row in csv.DictReader(stream)]


def result(output: Path) -> dict[str, Any]:
    return {
        f"{name}/{key}": x
        for name in ("model", "router")
        for key, x in load_file(output / f"{name}.safetensors").items()
    }


def test_both_stages(trained: Run, tmp_path: Path) -> None:
    assert train_stage2.main(trained.arguments(tmp_path)) == 0
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    before, after = load_file(trained.model), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name in ("blocks.1.to_qkv.weight", "embed.weight", "head.weight"):
        assert not torch.equal(before[name], after[name])
    old, new = load_file(trained.router), load_file(tmp_path / "router.safetensors")
    for name in old:
        assert torch.equal(old[name], new[name]) != name.endswith("alpha_offset"), name


def test_the_result_loads(trained: Run, tmp_path: Path) -> None:
    assert train_stage2.main(trained.arguments(tmp_path, steps=1)) == 0
    model = load_model(tmp_path / "model.safetensors", torch.device("cpu"))
    use_sla2(model, topk=TOPK, quant="int8_fp8")
    assert sla2.load_router(model, tmp_path / "router.safetensors") == []
    out = model(torch.randn(1, 3, *model.clip_size), torch.tensor([0.5]))
    assert bool(out.isfinite().all())


def test_stage1_goes_on(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished fit is not fitted again: the same call gives the same files."""
    before = trained.router.read_bytes()
    assert fit_stage1.main(trained.stage1) == 0
    assert trained.router.read_bytes() == before
    assert errors_line(trained.router, TOPK) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--topk", "1.5"), "--topk: 1.5 is no share of the key blocks"),
        (("--topk", "0.2", "0.5"), "--topk: 0.2 0.5 must descend"),
        (("--topk", "0.2", "0.2"), "--topk: 0.2 0.2 must descend"),
        (("--samples", "0"), "--samples: 0 is less than 1"),
        (("--steps", "0"), "--steps: 0 is less than 1"),
        (("--quant", "int4"), "--quant: invalid choice: 'int4'"),
    ],
)
def test_stage1_is_checked_before_it_records(
    trained: Run,
    tmp_path: Path,
    wrong: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        fit_stage1.main(trained.stage1_arguments(tmp_path, *wrong))
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_interrupted_recording_begins_anew(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "stage1"
    with monkeypatch.context() as context:
        step = sla2.train.QKVRecorder.step

        def interrupted(recorder: Any, timestep: Any) -> None:
            if recorder.counts:
                raise KeyboardInterrupt
            step(recorder, timestep)

        context.setattr(sla2.train.QKVRecorder, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):  # of another model: nothing of it is kept
            fit_stage1.main(trained.stage1_arguments(output, "--model", str(trained.other_model)))
    assert not (output / "samples").exists() and len(list(output.glob("*/*.safetensors"))) == 2
    assert fit_stage1.main(trained.stage1_arguments(output)) == 0
    assert (output / "fit" / trained.router.name).read_bytes() == trained.router.read_bytes()
    assert len(list((output / "samples").iterdir())) == 4
    assert {path.name for path in output.iterdir()} == {"samples", "fit", "recording.json"}


def test_stage1_of_another_recording_is_refused(trained: Run) -> None:
    output, before = trained.router.parents[1], trained.router.read_bytes()
    for option, value in (("--model", str(trained.other_model)), ("--samples", "3")):
        with pytest.raises(ValueError, match=rf"begun with {option} .*another --output"):
            fit_stage1.main(trained.stage1_arguments(output, option, value))
    for option, value in (("topk", "0.4"), ("steps", "3")):
        with pytest.raises(ValueError, match=f"has {option}="):
            fit_stage1.main(trained.stage1_arguments(output, f"--{option}", value))
    assert trained.router.read_bytes() == before


def test_stage1_fits_other_shares_to_the_same_samples(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.router.parents[1], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "fit")
    monkeypatch.delattr(fit_stage1, "record")  # samples that are there are not recorded again
    assert fit_stage1.main(trained.stage1_arguments(tmp_path, "--topk", "0.4")) == 0
    assert (tmp_path / "fit" / "router_0.4.safetensors").exists()


def test_stage1_leaves_foreign_samples_alone(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "own.safetensors").touch()
    with pytest.raises(ValueError, match=r"lacks recording\.json: choose another --output"):
        fit_stage1.main(trained.stage1_arguments(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["samples", "own.safetensors"]


def test_fingerprints_are_of_the_content(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    small, large = bytes(range(256)) * 100, bytes(9_000_000)
    path = write("a/1.safetensors", small)
    before = run_folder.fingerprint(path), run_folder.fingerprint(path.parent)
    moved = write("b/1.safetensors", small)
    assert (run_folder.fingerprint(moved), run_folder.fingerprint(moved.parent)) == before
    changed = write("b/1.safetensors", small[:7777] + b"!" + small[7778:])
    assert run_folder.fingerprint(changed) != before[0]
    assert run_folder.fingerprint(write("b/1.safetensors", small[:-1])) != before[0]
    write("a/2.safetensors", small)
    assert run_folder.fingerprint(path.parent) != before[1]
    # Only pieces of a large file are read: both ends are among them.
    before_large = run_folder.fingerprint(write("c/1", large))
    for position in (0, len(large) - 1):
        other = large[:position] + b"!" + large[position + 1 :]
        assert run_folder.fingerprint(write("c/1", other)) != before_large
    assert run_folder.fingerprint(write("c/1", b"")) == run_folder.fingerprint(write("d/1", b""))
    with pytest.raises(FileNotFoundError):
        run_folder.fingerprint(tmp_path / "none")


def test_a_resumed_run_gives_the_same_bits(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_stage2.main(trained.arguments(whole)) == 0
    with monkeypatch.context() as context:
        context.setattr(train_stage2, "draw_batch", stop_at(3, train_stage2.draw_batch))
        with pytest.raises(KeyboardInterrupt):
            train_stage2.main(trained.arguments(parts, "--checkpoint-every", "2"))
    (checkpoint,) = parts.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-00000002" and len(rows(parts)) == 3
    assert train_stage2.main(trained.arguments(parts)) == 2  # a folder in use, without --resume
    assert train_stage2.main(trained.arguments(parts, "--resume")) == 0
    assert rows(parts) == rows(whole)
    wanted, found = result(whole), result(parts)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    # A finished run has nothing left to do.
    assert train_stage2.main(trained.arguments(parts, "--resume")) == 0
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--model", "another file"), ("--model", None), ("--router", None)),
        *(("--seed", "5"), ("--lr", "1"), ("--precision", "bfloat16")),
    ],
)
def test_another_run_is_not_resumed(
    begun: list[str], trained: Run, option: str, value: str | None
) -> None:
    arguments = list(begun)
    if option in begun:
        place = begun.index(option)
        del arguments[place : place + 2]
    if value is not None:
        arguments += [option, str(trained.other_model) if option == "--model" else value]
    output = Path(begun[begun.index("--output") + 1])
    before = sorted(path.name for path in output.iterdir()), rows(output)
    with pytest.raises(ValueError, match=rf"begun with {option} .*another --output"):
        train_stage2.main([*arguments, "--resume"])
    assert (sorted(path.name for path in output.iterdir()), rows(output)) == before


@pytest.fixture(scope="module")
def begun(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run of one step that is there."""
    arguments = trained.arguments(tmp_path_factory.mktemp("begun"), steps=1)
    assert train_stage2.main(arguments) == 0
    return arguments


def test_a_resumed_run_may_be_longer_and_elsewhere(trained: Run, tmp_path: Path) -> None:
    """Files are known by their content, wherever they are."""
    output, model, router = tmp_path / "run", tmp_path / "model", tmp_path / "router"
    assert train_stage2.main(trained.arguments(output, steps=1)) == 0
    model.write_bytes(trained.model.read_bytes())
    router.write_bytes(trained.router.read_bytes())
    moved = ("--model", str(model), "--router", str(router), "--checkpoint-every", "1")
    more = (*moved, "--batch", "2", "--resume")
    assert train_stage2.main(trained.arguments(output, *more, steps=2)) == 0
    assert len(rows(output)) == 2


def test_a_checkpoint_without_settings_is_not_resumed(trained: Run, tmp_path: Path) -> None:
    assert train_stage2.main(trained.arguments(tmp_path, steps=1)) == 0
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"lacks settings\.json: choose another --output"):
        train_stage2.main(trained.arguments(tmp_path, "--resume", steps=2))


def test_settings_belong_to_the_checkpoint(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended before its first checkpoint binds the next one to nothing."""
    with monkeypatch.context() as context:
        context.setattr(train_stage2, "draw_batch", stop_at(0, train_stage2.draw_batch))
        with pytest.raises(KeyboardInterrupt):
            train_stage2.main(trained.arguments(tmp_path, "--seed", "5"))
    for steps in (1, 2):
        assert train_stage2.main(trained.arguments(tmp_path, "--resume", steps=steps)) == 0


def stop_at(step: int, draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(clips: Any, count: int, seed: int, index: int, rank: int) -> Any:
        if index == step:
            raise KeyboardInterrupt
        return draw(clips, count, seed, index, rank)

    return drawn


def test_a_router_of_another_share_is_named(trained: Run, tmp_path: Path) -> None:
    arguments = trained.arguments(tmp_path)
    arguments[arguments.index("--topk") + 1] = "0.5"
    with pytest.raises(ValueError, match=r"topk=0\.2 in the file, topk=0\.5 in the model"):
        train_stage2.main(arguments)


def test_a_loss_that_is_not_finite_stops_the_run(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*key: Any) -> Any:
        batch = draw(*key)
        return batch._replace(noised=batch.noised * torch.nan)

    draw = train_stage2.draw_batch
    monkeypatch.setattr(train_stage2, "draw_batch", broken)
    with pytest.raises(RuntimeError, match="step 1: loss and gradient norm are"):
        train_stage2.main(trained.arguments(tmp_path))
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("checkpoint-*"))


def test_two_processes(trained: Run, tmp_path: Path) -> None:
    """Replicated and sharded training see the same batches and give the same model."""
    results = {}
    for parallel in ("ddp", "fsdp"):
        output = tmp_path / parallel
        arguments = trained.arguments(output, "--parallel", parallel, steps=2)
        launch(arguments)
        assert [row["step"] for row in rows(output)] == ["1", "2"]
        results[parallel] = result(output)
    assert results["ddp"].keys() == results["fsdp"].keys()
    for name, x in results["ddp"].items():
        assert x.dtype == torch.float32
        # Sums of two gradients do not depend on their order, but the norm that clips them does.
        torch.testing.assert_close(results["fsdp"][name], x, rtol=1e-5, atol=1e-6)
    # Another number of processes goes on from a sharded checkpoint.
    resumed = trained.arguments(tmp_path / "fsdp", "--resume", steps=3)
    assert train_stage2.main(resumed) == 0
    assert len(rows(tmp_path / "fsdp")) == 3


def test_sharded_in_16_bit(trained: Run, tmp_path: Path) -> None:
    """FSDP2's own 16-bit policy: what is written is float32, and the router keeps every bit."""
    more = ("--parallel", "fsdp", "--precision", "bfloat16")
    launch(trained.arguments(tmp_path, *more, steps=2))
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]
    written, router = result(tmp_path), load_file(trained.router)
    assert {x.dtype for x in written.values()} == {torch.float32}
    assert all(bool(x.isfinite().all()) for x in written.values())
    for name, x in router.items():
        kept = torch.equal(written[f"router/{name}"], x)
        assert kept != name.endswith("alpha_offset"), name


def launch(arguments: list[str]) -> None:
    """The example in two processes, as torchrun starts it."""
    script = REPOSITORY / "examples" / "train_stage2.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(sla2.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
