"""bench/quality: the whole study at toy size, also after stops, and the document it becomes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from package_tools import REPOSITORY
from torch import Tensor

import sla2

sys.path.insert(0, str(REPOSITORY / "bench"))

from quality import clips as clips_module
from quality import flow, report, run
from quality.clips import HELD_OUT, TRAIN, Clips
from quality.flow import HeldOut, draw_batch, evaluate, learning_rate, train
from quality.model import VideoDiT, load_model, use_sla2, write_model
from quality.results import (
    BadResults,
    Spread,
    differences,
    gather,
    layer_fits,
    outcomes,
    read_results,
    still_identity,
)
from quality.sla import SLAAttention, linear_attention
from quality.study import QUANT, SMOKE, VARIANTS, LayerFit, Study, sla2_layers

CPU = torch.device("cpu")
SIZE = (3, 16, 24)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than these sizes gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model() -> VideoDiT:
    return VideoDiT((2, 8, 16), patch=2, heads=2, head_dim=8, depth=2)


def train_small(model: VideoDiT, checkpoint: Path, *, steps: int) -> list[float]:
    return train(
        model,
        [{"params": list(model.parameters()), "lr": 3e-3}],
        Clips(TRAIN, model.clip_size, CPU),
        steps=steps,
        batch=4,
        dtype=torch.float32,
        seed=0,
        checkpoint=checkpoint,
        title=checkpoint.stem,
    )


# ---- the study ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy study that was stopped three times: after a part, by the clock, and killed."""
    output = tmp_path_factory.mktemp("study")
    start = ["--output", str(output), "--smoke"]
    assert run.main([*start, "--only", "base"]) == 0
    assert run.main([*start, "--minutes", "0"]) == 3
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(Study, "_refit_identity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.main(start)
    assert not (output / "stage1.json").exists()
    assert run.main([*start, "--only", "stage1", "full", "sla2:0"]) == 0
    assert not (output / "quality.json").exists()
    assert run.main(start) == 0
    return output


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_every_variant_has_every_seed(folder: Path) -> None:
    results = read_results(folder / "quality.json")
    for variant in VARIANTS:
        pieces = outcomes(results, variant.name)
        assert [piece["seed"] for piece in pieces] == list(range(SMOKE.seeds))
        for piece in pieces:
            assert set(piece["after"]) == set(piece["before"]) == set(variant.evaluated_in)
            assert piece["commit"] and piece["date"] and piece["torch"] == torch.__version__
            for quant in variant.evaluated_in:
                assert 0.0 < piece["after"][quant]["loss"] < 10.0
                assert len(piece["after"][quant]["layer_errors"]) == SMOKE.depth
        # Seeds start from one model and part ways.
        assert pieces[0]["before"] == pieces[1]["before"]
        assert pieces[0]["after"] != pieces[1]["after"]


def test_the_baseline_is_full_attention(folder: Path) -> None:
    results = read_results(folder / "quality.json")
    for piece in outcomes(results, "full"):
        assert piece["after"]["none"]["attention_error"] <= 1e-6
        assert piece["before"]["none"]["loss"] == results["base"]["loss"]
    for name in ("sla2", "sla", "topk-router"):
        quant = "none" if name == "sla" else QUANT
        assert outcomes(results, name)[0]["before"][quant]["attention_error"] > 1e-3


def test_finished_parts_are_kept(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*-0.json")}
    assert len(before) == len(VARIANTS)
    assert run.main(["--output", str(folder), "--smoke"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (folder / "stage1" / "samples").exists()


def test_other_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--output", str(folder), "--smoke", "--steps", "7"]) == 2
    assert "steps=2; now it is 7" in capsys.readouterr().err


def test_unknown_parts_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--output", str(folder), "--smoke", "--only", "sla2:9"]) == 2
    assert "--only sla2:9: there are base, fixed-alpha" in capsys.readouterr().err


def test_variants_are_what_they_say(folder: Path) -> None:
    study = Study(folder, SMOKE, CPU, None)
    built = {variant.name: study.build(variant) for variant in VARIANTS}
    fits = layer_fits(read_results(folder / "quality.json"))
    assert not list(sla2_layers(built["full"])) and not list(sla2_layers(built["sla"]))
    for name, topk in (("sla2-low", 0.15), ("sla2-mid", 0.10), ("sla2", 0.05)):
        unlearned = still_identity(fits, topk)
        for index, layer in enumerate(sla2_layers(built[name])):
            assert (layer.topk, layer.quant, layer.stage) == (topk, QUANT, 2)
            learned = f"blocks.{index}.attn" not in unlearned
            assert bool(layer.proj_q_delta.any()) == learned
            assert not layer.proj_q_delta.requires_grad
            assert bool(layer.alpha_offset.any()) and layer.alpha_offset.requires_grad
    for layer in sla2_layers(built["topk-router"]):
        assert not layer.proj_q_delta.any() and bool(layer.alpha_offset.any())
    for layer, same in zip(
        sla2_layers(built["fixed-alpha"]), sla2_layers(built["sla2"]), strict=True
    ):
        assert torch.equal(layer.proj_q_delta, same.proj_q_delta)
        assert not layer.alpha_offset.any() and not layer.alpha_offset.requires_grad
    names = [group["name"] for group in study._groups(built["fixed-alpha"])]
    assert names == ["model"]
    rates = [group["lr"] for group in study._groups(built["sla"])]
    assert rates == [SMOKE.lr, SMOKE.lr_extra]


def test_stage1_is_recorded_by_layer(folder: Path) -> None:
    results = read_results(folder / "quality.json")
    fits = layer_fits(results)
    names = [f"blocks.{index}.attn" for index in range(SMOKE.depth)]
    assert [(fit.layer, fit.topk) for fit in fits] == [(n, t) for n in names for t in SMOKE.topk]
    with (folder / "stage1" / "fit" / "report.csv").open(newline="") as stream:
        for fit, row in zip(fits, csv.DictReader(stream), strict=True):
            assert row == {name: str(getattr(fit, name)) for name in row}
    for fit in fits:
        if fit.topk == SMOKE.topk[0]:
            # The fit starts from the identity: both have the same refitted alpha.
            assert fit.error_identity == pytest.approx(fit.error_start, rel=1e-6)


def test_a_router_is_the_identity_until_a_fit_is_kept() -> None:
    kept = {
        "never": ("start", "start", "start"),
        "last": ("start", "start", "fitted"),
        "first": ("fitted", "start", "start"),
    }
    shares = (0.3, 0.2, 0.1)
    fits = [
        LayerFit(layer, topk, 0.5, 0.5, 0.5, which)
        for layer, choices in kept.items()
        for topk, which in zip(shares, choices, strict=True)
    ]
    found = [still_identity(fits, topk) for topk in shares]
    assert found == [["never", "last"], ["never", "last"], ["never"]]


# ---- the document -------------------------------------------------------------------------------


def test_the_document_is_current() -> None:
    assert run.main(["--report", "--check"]) == 0


def test_the_document_shows_the_results(folder: Path, tmp_path: Path) -> None:
    options = ["--report", "--results", str(folder / "quality.json")]
    options += ["--document", str(tmp_path / "quality.md")]
    assert run.main([*options, "--check"]) == 1
    assert run.main(options) == 0 and run.main([*options, "--check"]) == 0
    text = (tmp_path / "quality.md").read_text()
    results = read_results(folder / "quality.json")
    assert "Not measured" not in text and str(results["gpu"]) in text
    for variant in VARIANTS:
        assert f"| {variant.title} |" in text
    spread = Spread.of([p["after"][QUANT]["loss"] for p in outcomes(results, "sla2")])
    apart = report._signed(differences(results, ("sla2", QUANT), ("full", "none")))
    row = f"{spread.mean:.5f} ± {spread.deviation:.5f} | {apart}"
    assert row in text
    assert "### Stage 1 by layer" in text
    for fit in layer_fits(results):
        errors = f"{fit.error_identity:.4f} | {fit.error_start:.4f} | {fit.error_fitted:.4f}"
        assert f"| `{fit.layer}` | {report._sparsity(fit.topk)} | {errors} | {fit.kept} |" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


def test_without_results_the_document_says_so(tmp_path: Path) -> None:
    options = ["--report", "--results", str(tmp_path / "none.json")]
    assert run.main([*options, "--document", str(tmp_path / "quality.md")]) == 0
    text = (tmp_path / "quality.md").read_text()
    assert "Not measured." in text and "python bench/quality/run.py --output quality\n" in text


@pytest.mark.parametrize(
    ("found", "verdict"),
    [([-1.0, -2.0], "seen"), ([-1.0, 2.0], "undecided"), ([1.0, 2.0], "opposite")],
)
def test_verdicts(found: list[float], verdict: str) -> None:
    assert report._verdict(found) == verdict


def test_broken_results_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    results = json.loads((folder / "quality.json").read_text())
    short = {**results, "pieces": results["pieces"][1:]}
    layers = results["stage1"]["layers"]
    cases: list[Any] = ["no json", [], short, {"settings": {}}, {**results, "stage1": []}]
    cases += [
        {**results, "stage1": {"layers": other}}
        for other in (
            layers[1:],
            [*layers, layers[0]],
            [*layers[1:], {**layers[0], "kept": "neither"}],
            [*layers[1:], {**layers[0], "error_start": float("nan")}],
            [*layers[1:], {**layers[0], "error_start": None}],
            [*layers[1:], {"layer": "blocks.0.attn"}],
        )
    ]
    for broken in cases:
        path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        with pytest.raises(BadResults, match=r"quality\.json"):
            read_results(path)
        assert run.main(["--report", "--results", str(path), "--document", "unused"]) == 2


def test_results_name_the_command(folder: Path) -> None:
    study = Study(folder, SMOKE, CPU, None)
    assert json.loads(gather(study, "the command").read_text())["command"] == "the command"


# ---- clips --------------------------------------------------------------------------------------


def test_no_photograph_is_in_both_sets() -> None:
    assert not set(TRAIN) & set(HELD_OUT)
    assert all(path.is_file() for path in clips_module.photo_paths(TRAIN + HELD_OUT))


def test_clips_repeat_and_differ() -> None:
    clips = Clips(HELD_OUT, SIZE, CPU)
    first = clips.batch(4, 0, 1)
    assert first.shape == (4, 3, *SIZE) and first.abs().max() <= 1.0
    assert torch.equal(first, clips.batch(4, 0, 1))
    assert not torch.equal(first, clips.batch(4, 0, 2))
    assert torch.equal(first[:2], clips.batch(2, 0, 1))


def test_clips_move() -> None:
    clips = Clips(HELD_OUT, SIZE, CPU)
    batch = clips.batch(8, "motion")
    change = (batch[:, :, 1:] - batch[:, :, :-1]).abs().mean(dim=(1, 2, 3, 4))
    assert bool((change > 1e-3).all())


# ---- model and loss -----------------------------------------------------------------------------


def test_the_model_predicts_pixels_where_they_belong() -> None:
    """With blocks that do nothing, a patch of the output depends on the same patch alone."""
    model = small_model()
    torch.nn.init.normal_(model.head.weight)
    clip = torch.randn(1, 3, *model.clip_size)
    changed = clip.clone()
    changed[:, :, 1, 4:6, 2:4] += 1.0
    t = torch.tensor([0.3])
    different = (model(clip, t) != model(changed, t)).any(1)[0].nonzero()
    assert set(map(tuple, different.tolist())) == {(1, y, x) for y in (4, 5) for x in (2, 3)}


def test_models_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = small_model()
    torch.nn.init.normal_(model.head.weight)
    use_sla2(model, topk=0.5)
    write_model(tmp_path / "model.safetensors", model.config, model.state_dict())
    again = load_model(tmp_path / "model.safetensors", CPU)
    assert not list(sla2_layers(again))  # router and alpha are in router files
    use_sla2(again, topk=0.5)
    clip, t = torch.randn(1, 3, *model.clip_size), torch.tensor([0.3])
    assert torch.equal(model(clip, t), again(clip, t))


def test_training_lowers_the_held_out_loss(tmp_path: Path) -> None:
    model = small_model()
    unseen = Clips(HELD_OUT, model.clip_size, CPU)
    held_out = HeldOut(unseen, count=4, timesteps=2, batch=4)
    before = evaluate(model, held_out, torch.float32)["loss"]
    assert before == evaluate(model, held_out, torch.float32)["loss"]
    train_small(model, tmp_path / "model.checkpoint", steps=80)
    assert evaluate(model, held_out, torch.float32)["loss"] < 0.9 * before


def test_training_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_to_the_end(checkpoint: Path) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = small_model()
        losses = train_small(model, checkpoint, steps=7)
        return losses, model.state_dict()

    def stop(*key: Any) -> Any:
        if key[-1] == 5:
            raise KeyboardInterrupt
        return draw_batch(*key)

    monkeypatch.setattr(flow, "CHECKPOINT_EVERY", 2)
    losses, state = run_to_the_end(tmp_path / "whole.checkpoint")
    with monkeypatch.context() as context:
        context.setattr(flow, "draw_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            run_to_the_end(tmp_path / "parts.checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["parts.checkpoint"]
    torch.manual_seed(1)
    model = small_model()
    assert train_small(model, tmp_path / "parts.checkpoint", steps=7) == losses
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = small_model()
    torch.nn.init.constant_(model.head.bias, torch.nan)
    with pytest.raises(RuntimeError, match="broken: the loss of step 1 is nan"):
        train_small(model, tmp_path / "broken.checkpoint", steps=1)


def test_batches_are_rectified_flow() -> None:
    clips = Clips(TRAIN, SIZE, CPU)
    noised, t, velocity = draw_batch(clips, 4, 5)
    clean = clips.batch(4, 5)
    weight = t.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noised - weight * velocity, clean)
    assert torch.equal((4 * t).long(), torch.arange(4))  # spread over [0, 1]
    assert abs((velocity + clean).std().item() - 1.0) < 0.05


def test_the_rate_rises_and_falls() -> None:
    factors = [learning_rate(step, 400) for step in range(400)]
    assert factors[0] < 0.1 and max(factors) == 1.0 and 0.0 < factors[-1] < 1e-3
    assert learning_rate(0, 1) == 1.0


# ---- SLA ----------------------------------------------------------------------------------------


def qkv() -> list[Tensor]:
    return [torch.randn(2, 130, 2, 8, requires_grad=True) for _ in range(3)]


def test_sla_starts_as_its_sparse_branch() -> None:
    q, k, v = qkv()
    eye = torch.eye(8)
    attention = SLAAttention(8, topk=0.4, device=CPU)
    block_map = sla2.route(q.detach(), k.detach(), proj_q=eye, proj_k=eye, topk=0.4)
    out = attention(q, k, v)
    torch.testing.assert_close(out, sla2.block_sparse_attention(q, k, v, block_map))
    out.square().sum().backward()
    assert attention.proj.weight.grad is not None and bool(attention.proj.weight.grad.any())
    assert all(x.grad is not None and bool(x.grad.any()) for x in (q, k, v))


def test_linear_attention_is_that_of_all_tokens() -> None:
    q, k, v = qkv()
    weights = torch.einsum("bnhd,bmhd->bhnm", q.softmax(-1), k.softmax(-1))
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-5)
    wanted = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    torch.testing.assert_close(linear_attention(q, k, v), wanted)
