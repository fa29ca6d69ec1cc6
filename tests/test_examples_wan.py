"""examples/wan and bench/bench_wan.py on a tiny Wan with random weights, on the CPU."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fit_cases import errors_line
from package_tools import REPOSITORY
from PIL import Image
from safetensors.torch import load_file

diffusers = pytest.importorskip(
    "diffusers", minversion="0.35.2", reason="needs diffusers >= 0.35.2: pip install '.[diffusers]'"
)
pytest.importorskip("transformers", reason="the pipeline needs transformers")

EXAMPLES = REPOSITORY / "examples" / "wan"
sys.path[:0] = [str(EXAMPLES), str(REPOSITORY / "bench")]

import bench_wan  # noqa: E402
import encode_videos  # noqa: E402
import finetune  # noqa: E402
import generate  # noqa: E402
import record_and_fit  # noqa: E402
import wan_models  # noqa: E402

import sla2  # noqa: E402

TOPK = 0.34  # 2 of 6 blocks
GRID = (3, 10, 12)
TINY = ("--size", "tiny", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than these sizes gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stage1_arguments(output: Path) -> list[str]:
    own = ("--samples", "2", "--steps", "2", "--inference-steps", "2", "--no-progress")
    return [*TINY, *own, "--topk", "0.5", str(TOPK), "--output", str(output)]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stage1")
    assert record_and_fit.main(stage1_arguments(output)) == 0
    return output / "fit" / f"router_{TOPK:g}.safetensors"


def tune(router: Path, output: Path, *more: str, steps: int = 3) -> list[str]:
    own = ["--router", str(router), "--topk", str(TOPK), "--steps", str(steps)]
    return [*TINY, *own, "--lr", "1e-3", "--warmup", "1", "--output", str(output), *more]


def losses(output: Path) -> list[float]:
    with (output / "log.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def result(output: Path) -> dict[str, torch.Tensor]:
    weights = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    return weights | load_file(output / "router.safetensors")


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "billions", "tokens"), [("1.3b", 1.419, 32760), ("14b", 14.288, 75600)]
)
def test_sizes_are_those_of_wan(size: str, billions: float, tokens: int) -> None:
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**wan_models.SIZES[size].transformer)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    options = bench_wan.parse(["--size", size])
    report = sla2.apply(model, topk=0.03, **wan_models.video_size(options))
    assert report.grid == bench_wan.sla2_grid(options)
    assert np.prod(report.grid) == tokens


def test_random_weights_have_the_dtypes_of_loaded_ones(tmp_path: Path) -> None:
    size, cpu = wan_models.SIZES["tiny"], torch.device("cpu")
    model = wan_models.random_transformer(size, cpu, torch.bfloat16)
    wan_models.random_transformer(size, cpu, torch.float32).save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    wanted = {name: (x.dtype, x.shape) for name, x in loaded.named_parameters()}
    assert {name: (x.dtype, x.shape) for name, x in model.named_parameters()} == wanted
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16, torch.float32}


# ---- stage 1 ------------------------------------------------------------------------------------


def test_stage1_fits_every_layer_and_goes_on(
    router: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {key.rpartition(".")[0] for key in load_file(router)}
    assert names == {f"blocks.{i}.attn1.processor.sla2" for i in range(2)}
    before = router.read_bytes()
    assert record_and_fit.main(stage1_arguments(router.parents[1])) == 0
    assert router.read_bytes() == before
    assert errors_line(router, TOPK) in capsys.readouterr().out


def test_stage1_tells_the_space_that_samples_take(router: Path) -> None:
    options = record_and_fit.parse(stage1_arguments(router.parents[1]))
    expected = record_and_fit.bytes_on_disk(options, torch.device("cpu"))
    files = list((router.parents[1] / "samples").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) == pytest.approx(expected, rel=0.01)


def test_stage1_is_checked_before_it_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        record_and_fit.main([*stage1_arguments(tmp_path), "--topk", "1.5"])
    assert "--topk: 1.5 is no share of the key blocks" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt"):
        record_and_fit.main([*stage1_arguments(tmp_path / "run"), "--prompts", str(prompts)])
    assert not list(tmp_path.rglob("samples*"))


def test_an_interrupted_recording_begins_anew(
    router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_inputs = record_and_fit.prompt_inputs

    def interrupted(*arguments: Any) -> Any:
        if arguments[1] == record_and_fit.PROMPTS[1]:
            raise KeyboardInterrupt
        return prompt_inputs(*arguments)

    with monkeypatch.context() as context:
        context.setattr(record_and_fit, "prompt_inputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record_and_fit.main(stage1_arguments(tmp_path))
    assert list(tmp_path.glob("*/*.safetensors"))
    assert record_and_fit.main(stage1_arguments(tmp_path)) == 0
    assert (tmp_path / "fit" / router.name).read_bytes() == router.read_bytes()


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", "5"), ("--samples", "3"), ("--inference-steps", "3")]
)
def test_stage1_of_another_recording_is_refused(router: Path, option: str, value: str) -> None:
    before = router.read_bytes()
    with pytest.raises(ValueError, match=rf"begun with {option} .*another --output"):
        record_and_fit.main([*stage1_arguments(router.parents[1]), option, value])
    assert router.read_bytes() == before


def test_a_folder_of_weights_is_known_by_its_content(tmp_path: Path) -> None:
    """As --model: its place is no part of what a run was begun with."""
    size, cpu = wan_models.SIZES["tiny"], torch.device("cpu")
    model = wan_models.random_transformer(size, cpu, torch.float32)
    arguments = [*TINY, "--output", "x", "--model"]
    settings = []
    for name, delta in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        with torch.no_grad():
            model.proj_out.weight += delta
        model.save_pretrained(tmp_path / name / "transformer")
        options = record_and_fit.parse([*arguments, str(tmp_path / name)])
        loaded = wan_models.load_transformer(options, cpu, torch.float32)
        assert torch.equal(loaded.proj_out.weight, model.proj_out.weight)
        settings.append(record_and_fit.settings_of(options, ("output",)))
    assert settings[0] == settings[1] != settings[2]


# ---- stage 2 ------------------------------------------------------------------------------------


def test_the_tuned_model_loads(router: Path, tmp_path: Path) -> None:
    assert finetune.main(tune(router, tmp_path, "--batch", "1", steps=2)) == 0
    assert len(losses(tmp_path)) == 2
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    report = sla2.apply(
        model, topk=TOPK, quant="int8_fp8", grid=GRID, router=tmp_path / "router.safetensors"
    )
    assert len(report.replaced) == 2
    old, new = load_file(router), load_file(tmp_path / "router.safetensors")
    for name in old:
        assert torch.equal(old[name], new[name]) != name.endswith("alpha_offset"), name
    start = wan_models.random_transformer(
        wan_models.SIZES["tiny"], torch.device("cpu"), torch.float32
    )
    for (name, before), after in zip(start.named_parameters(), model.parameters(), strict=False):
        if name in ("blocks.1.attn1.to_q.weight", "patch_embedding.weight"):
            assert not torch.equal(before, after), name


def test_a_resumed_run_gives_the_same_bits(
    router: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune.main(tune(router, whole, "--batch", "1")) == 0
    draw = finetune.Data.sample

    def interrupted(self: Any, index: int) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return draw(self, index)

    with monkeypatch.context() as context:
        context.setattr(finetune.Data, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune.main(tune(router, parts, "--batch", "1", "--checkpoint-every", "1"))
    assert finetune.main(tune(router, parts)) == 2  # a folder in use, without --resume
    assert finetune.main(tune(router, parts, "--batch", "1", "--resume")) == 0
    assert losses(parts) == losses(whole)
    wanted, found = result(whole), result(parts)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_another_run_is_not_resumed(router: Path, tmp_path: Path) -> None:
    assert finetune.main(tune(router, tmp_path, "--batch", "1", steps=1)) == 0
    config = tmp_path / "transformer" / "config.json"
    config.unlink()
    for option, value in (("--lr", "1"), ("--seed", "5"), ("--topk", "0.5"), ("--warmup", "3")):
        with pytest.raises(ValueError, match=rf"begun with {option} .*another --output"):
            finetune.main(tune(router, tmp_path, option, value, "--resume"))
    arguments = tune(router, tmp_path, "--resume")
    arguments = [x for x in arguments if x not in ("--router", str(router))]
    with pytest.raises(ValueError, match=r"begun with --router '.*', this call has None"):
        finetune.main(arguments)
    assert not config.exists() and len(losses(tmp_path)) == 1  # nothing was written


def test_two_processes_train_what_one_does(router: Path, tmp_path: Path) -> None:
    """Sharded, each with one video of a step, against one process with both."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert finetune.main(tune(router, one, "--batch", "2", steps=2)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "finetune.py")]
    path = os.pathsep.join([str(Path(sla2.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *tune(router, two, "--batch", "1", steps=2)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    config = json.loads((two / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel"
    wanted, found = result(one), result(two)
    assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        # AdamW's first steps are of the size of the rate (1e-3), whatever the gradient's.
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-3)
    # One process goes on from the sharded checkpoint.
    assert finetune.main(tune(router, two, "--batch", "2", "--resume")) == 0
    assert len(losses(two)) == 3


def test_encoded_videos_are_trained_on(
    router: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clips, latents = tmp_path / "clips", tmp_path / "latents"
    clips.mkdir()
    arguments = [*TINY, "--videos", str(clips), "--output", str(latents)]
    assert encode_videos.main(arguments) == 2
    lengths = {"a": 12, "b": 9, "short": 5}
    for name in lengths:
        (clips / f"{name}.mp4").touch()
    assert encode_videos.main(arguments) == 2
    assert "no .txt beside a.mp4, b.mp4, short.mp4" in capsys.readouterr().err
    for name in lengths:
        (clips / f"{name}.txt").write_text("a caption\n")

    def decoded(path: str) -> list[Image.Image]:
        count = lengths[Path(path).stem]
        pixels = np.random.default_rng(count).integers(0, 256, (100, 150, 3), dtype=np.uint8)
        return [Image.fromarray(pixels)] * count

    monkeypatch.setattr(encode_videos, "load_video", decoded)
    assert encode_videos.main(arguments) == 0
    assert "short.mp4: 5 frames" in capsys.readouterr().err
    stored = load_file(latents / "a.safetensors")
    assert stored["latents"].shape == (16, 3, 20, 24) and stored["latents"].isfinite().all()
    assert stored["prompt_embeds"].shape == (512, 32)
    assert {path.stem for path in latents.iterdir()} == {"a", "b", "empty_prompt"}

    data = ("--data", str(latents), "--drop-prompt", "0.5", "--batch", "2")
    assert finetune.main(tune(router, tmp_path / "run", *data, steps=2)) == 0
    # Every video once in an epoch.
    options = finetune.parse(tune(router, tmp_path / "run", *data))
    cpu = torch.device("cpu")
    reader = finetune.Data(options, cpu)
    files = [load_file(latents / f"{name}.safetensors")["latents"].float() for name in "ab"]
    seen = set()
    for sample in (reader.sample(0), reader.sample(1)):
        clean = (sample.noised - sample.timestep / finetune.TIMESTEPS * sample.velocity)[0]
        seen |= {i for i, x in enumerate(files) if torch.allclose(clean, x, atol=1e-4)}
    assert seen == {0, 1}
    with pytest.raises(ValueError, match="encode the videos with the same size"):
        finetune.Data(
            finetune.parse([*TINY, *data, "--height", "128", "--output", "x"]), cpu
        ).sample(0)


def test_real_weights_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse(["--output", "run"])
    assert "--data is needed" in capsys.readouterr().err


# ---- generation ---------------------------------------------------------------------------------


def test_generates_with_the_router(
    router: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written: dict[str, Any] = {}

    def export(frames: Any, path: str, fps: int) -> None:
        written[Path(path).stem] = frames

    monkeypatch.setattr(generate, "export_to_video", export)
    monkeypatch.setattr(generate, "find_spec", lambda name: name)
    for name, more in {
        "sla2": ("--router", str(router), "--topk", str(TOPK)),
        "dense": ("--dense",),
    }.items():
        output = ("--output", str(tmp_path / "videos" / f"{name}.mp4"))
        assert generate.main([*TINY, "--inference-steps", "2", *more, *output]) == 0
    assert written["sla2"].shape == written["dense"].shape == (9, 160, 192, 3)
    difference = np.abs(written["sla2"] - written["dense"]).mean()
    assert 0 < difference < 0.1  # the same noise and weights
    assert "9 frames in" in capsys.readouterr().out


def test_writes_mp4(router: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="an mp4 needs imageio-ffmpeg")
    target = tmp_path / "video.mp4"
    arguments = [*TINY, "--inference-steps", "1", "--router", str(router), "--topk", str(TOPK)]
    assert generate.main([*arguments, "--output", str(target)]) == 0
    assert target.read_bytes()[4:8] == b"ftyp"


def test_a_missing_encoder_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    assert generate.main([*TINY, "--output", str(tmp_path / "video.mp4")]) == 2
    assert "pip install imageio imageio-ffmpeg" in capsys.readouterr().err


# ---- bench_wan ----------------------------------------------------------------------------------


def test_compile_options_choose_rows() -> None:
    def compiled(*options: str) -> list[bool]:
        rows = bench_wan.variants(bench_wan.parse([*options, "--attention", "dense-flash"]))
        return [row.compiled for row in rows]

    assert compiled() == [False]
    assert compiled("--compile") == [False, True]
    assert compiled("--compile-only") == [True]


def test_bench_times_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--iters", "1", "--warmup", "0", "--topk", "0.5", str(TOPK)]
    assert bench_wan.main([*arguments, "--output", str(tmp_path)]) == 0
    assert "left out dense-cudnn" in capsys.readouterr().err  # there is none for a CPU
    rows = json.loads((tmp_path / "wan_tiny.json").read_text())
    seen = [(row["attention"], row["kept"], row["quant"]) for row in rows]
    sparse = [("sla2", kept, "int8_fp8") for kept in (0.5, TOPK)]
    assert seen == [("dense-flash", 1.0, "none"), *sparse]
    for row in rows:
        assert (row["B"], row["H"], row["N"], row["D"]) == (1, 2, 360, 128)
        parts = row["profile"]
        named = ("self_attention_ms", "cross_attention_ms", "other_ms")
        assert all(parts[name] > 0 for name in named)
        assert sum(parts[name] for name in named) == pytest.approx(parts["all_ms"])


def test_bench_restores_the_model() -> None:
    model = wan_models.random_transformer(
        wan_models.SIZES["tiny"], torch.device("cpu"), torch.bfloat16
    )
    options: argparse.Namespace = bench_wan.parse([*TINY])
    step = bench_wan.make_step(model, options, torch.device("cpu"), torch.bfloat16)
    before = step()
    variant = bench_wan.Variant("sla2", TOPK, False)
    bench_wan.prepare(model, variant, options)
    assert not torch.equal(step(), before)
    bench_wan.restore(model, variant)
    assert torch.equal(step(), before)


def test_every_script_is_in_the_documentation() -> None:
    text = (REPOSITORY / "docs" / "diffusers.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/wan/{path.name}" in text or path.name == "wan_models.py"
