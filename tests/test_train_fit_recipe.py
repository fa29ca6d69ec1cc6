"""Stage 1's fit: schedules, alpha and error in hard mode, and which router is kept."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fit_cases import FRACTIONS, PLAIN, SMALL, D, H, N, random_samples, read_log, record
from torch import Tensor

from sla2 import SLA2Attention, load_router
from sla2.train import fit, fit_router, read_report
from sla2.train.fit_data import Problem, ProblemLoader, draw_batch, full_attention
from sla2.train.hard_mode import HardMode
from sla2.train.schedule import Schedule


def relative_error(layer: SLA2Attention, problems: list[list[Tensor]]) -> float:
    """In hard mode, against full attention."""
    layer.set_stage(2)
    error = energy = 0.0
    for q, k, v in problems:
        full = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        full = full.transpose(1, 2)
        error += (layer(q, k, v) - full).square().sum().item()
        energy += full.square().sum().item()
    return math.sqrt(error / energy)


# ---- schedules ----------------------------------------------------------------------------------


def test_schedule_is_a_function_of_the_step() -> None:
    schedule = Schedule(100, 1e-3, 10, "cosine", (0.1, 0.01))
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 11) and rates[10] == 1e-3 == max(rates)
    assert rates[55] == pytest.approx(0.5e-3) and 0 < rates[99] < 1e-6
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    taus = [schedule.tau_at(step) for step in range(100)]
    assert (taus[0], taus[-1]) == (0.1, 0.01)
    ratios = [after / before for before, after in zip(taus, taus[1:], strict=False)]
    assert ratios == pytest.approx([0.1 ** (1 / 99)] * 99)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_schedule_of_a_few_steps(steps: int) -> None:
    """The rate is never 0, and the warm-up leaves steps at the full rate."""
    schedule = Schedule(steps, 1.0, 10, "cosine", (0.1, 0.01))
    rates = [schedule.lr_at(step) for step in range(steps)]
    assert min(rates) > 0 and max(rates) == 1.0
    assert schedule.tau_at(steps - 1) == 0.01
    plain = Schedule(steps, 0.5, 0, "constant", (0.1, 0.1))
    assert {plain.lr_at(step) for step in range(steps)} == {0.5}
    assert {plain.tau_at(step) for step in range(steps)} == {0.1}


def test_the_steps_take_rate_temperature_and_decay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the log says; without a gradient, decay moves the projections and nothing else."""
    used = []
    backward = fit._backward

    def watched(
        module: SLA2Attention, loader: ProblemLoader, chosen: list[int]
    ) -> tuple[float, float]:
        used.append(module.tau)
        values = backward(module, loader, chosen)
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        if len(used) == 1:
            with torch.no_grad():
                module.proj_q_delta.fill_(0.5)
        deltas.append(module.proj_q_delta[0, 0].item())
        offsets.append(module.alpha_offset.clone())
        return values

    deltas: list[float] = []
    offsets: list[Tensor] = []
    monkeypatch.setattr(fit, "_backward", watched)
    folder = record(tmp_path / "samples", {"x": random_samples()})
    options = {**SMALL, "topk": (0.4,), "warmup": 2, "decay": 0.1}
    fit_router(folder, tmp_path / "out", **options)
    schedule = Schedule(5, 1e-3, 2, "cosine", (0.1, 0.01))
    assert used == [schedule.tau_at(step) for step in range(5)]
    rows = read_log(tmp_path / "out")
    assert [float(row["tau"]) for row in rows] == used
    assert [float(row["lr"]) for row in rows] == [schedule.lr_at(step) for step in range(5)]
    shares = [schedule.lr_at(step) / 1e-3 * 0.1 for step in range(4)]
    for before, after, share in zip(deltas, deltas[1:], shares, strict=False):
        assert after == pytest.approx(before * (1 - share), rel=1e-5)
    assert all(torch.equal(offset, offsets[0]) for offset in offsets)


# ---- hard mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"per_head_alpha": False}, {"alpha_per_token": True}, {"smooth_k": False},
     {"phi_input": "raw"}],
    ids=str,
)  # fmt: skip
def test_hard_mode(options: dict[str, Any]) -> None:
    """The error is that of the layer's output, and no other alpha has a smaller one."""
    torch.manual_seed(0)
    samples = random_samples(2, torch.float64)
    layer = SLA2Attention(H, D, seq_len=N, topk=0.4, **options)
    with torch.no_grad():
        layer.proj_q_delta.normal_(std=0.3)
    problems = [Problem(q, k, v, full_attention(q, k, v)) for q, k, v in samples]
    hard = HardMode(layer, problems)
    assert hard.error() == pytest.approx(relative_error(layer, samples), rel=1e-5)
    hard.set_best_alpha()
    best = hard.error()
    assert best == pytest.approx(relative_error(layer, samples), rel=1e-5)
    alpha = layer.alpha_logit.sigmoid()
    assert alpha.min() >= 0.0099 and alpha.max() <= 0.9901
    free = (alpha > 0.011) & (alpha < 0.989)
    assert free.any()
    for change in (-0.05, 0.05):
        with torch.no_grad():
            layer.alpha_offset += change * free
        assert relative_error(layer, samples) > best
        with torch.no_grad():
            layer.alpha_offset -= change * free


def test_hard_mode_where_alpha_does_not_matter() -> None:
    """Full attention of v = 0 is 0, and so is SLA2: alpha stays."""
    q, k, v = random_samples(1, torch.float32)[0]
    layer = SLA2Attention(H, D, seq_len=N, topk=0.4)
    hard = HardMode(layer, [Problem(q, k, 0 * v, full_attention(q, k, 0 * v))])
    hard.set_best_alpha()
    assert not layer.alpha_offset.any() and hard.error() == 0.0


# Every block is listed: of several key blocks, and of a single one whatever the fraction.
ALL_LISTED = [(N, 1.0), (64, 0.4), (40, 1.0)]


@pytest.mark.parametrize(("tokens", "topk"), ALL_LISTED)
def test_hard_mode_where_every_block_is_listed(tokens: int, topk: float) -> None:
    """SLA2 is full attention there, whatever alpha is: no error, and alpha stays."""
    samples = random_samples(2, torch.float32, (1, tokens, H, D))
    layer = SLA2Attention(H, D, seq_len=tokens, topk=topk)
    hard = HardMode(layer, [Problem(q, k, v, full_attention(q, k, v)) for q, k, v in samples])
    assert relative_error(layer, samples) < 1e-6
    assert hard.error() < 1e-6
    hard.set_best_alpha()
    assert not layer.alpha_offset.any()


@pytest.mark.parametrize("options", [{}, {"refit_alpha": False, "calibrate": False}], ids=str)
@pytest.mark.parametrize(("tokens", "topk"), ALL_LISTED)
def test_reported_errors_where_every_block_is_listed(
    tokens: int, topk: float, options: dict[str, Any], tmp_path: Path
) -> None:
    """As small as the written router's."""
    problems = random_samples(2, torch.float32, (1, tokens, H, D))
    folder = record(tmp_path / "samples", {"x": problems})
    paths = fit_router(folder, tmp_path / "out", **{**SMALL, "topk": (topk,)}, **options)
    layer = SLA2Attention(H, D, seq_len=tokens, topk=topk)
    load_router(layer, tmp_path / "out" / "layers" / f"x@{topk}.safetensors")
    assert set(paths) == {topk} and relative_error(layer, problems) < 1e-6
    (row,) = read_report(tmp_path / "out")
    assert max(row.error_start, row.error_fitted) < 1e-6


# ---- which router is kept -----------------------------------------------------------------------


def test_never_worse_than_the_start(tmp_path: Path) -> None:
    """In hard mode over the samples, at every topk, and the report says so."""
    problems = random_samples(4, torch.float32)
    folder = record(tmp_path / "samples", {"x": problems})
    paths = fit_router(folder, tmp_path / "out", **{**SMALL, "steps": 20, "lr": 0.01})
    for topk, row in zip(FRACTIONS, read_report(tmp_path / "out"), strict=True):
        assert (row.layer, row.topk) == ("x", topk)
        layer = SLA2Attention(H, D, seq_len=N, topk=topk)
        load_router(layer, tmp_path / "out" / "layers" / f"x@{topk}.safetensors")
        written = relative_error(layer, problems)
        errors = {"start": row.error_start, "fitted": row.error_fitted}
        assert written == pytest.approx(errors[row.kept], rel=1e-4)
        assert written == pytest.approx(min(errors.values()), rel=1e-4)
        identity = SLA2Attention(H, D, seq_len=N, topk=topk)
        for q, k, _ in problems[:1]:
            identity.calibrate_alpha(q, k)
        assert written <= relative_error(identity, problems)
    assert set(paths) == set(FRACTIONS)


@pytest.mark.parametrize("keep_better", [True, False])
def test_a_worse_router_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep_better: bool
) -> None:
    """The next topk starts from what is kept, with alpha as it was before it was refitted."""
    folder = record(tmp_path / "samples", {"x": random_samples()})
    errors = iter((0.2, 0.3, 0.3, 0.2))
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, logger="sla2"):
        patch.setattr(HardMode, "error", lambda _: next(errors))
        fit_router(folder, tmp_path / "out", **SMALL, keep_better=keep_better)
    (warning,) = caplog.messages
    kept = "start" if keep_better else "fitted"
    assert "layer 'x', topk=0.8:" in warning and "error is 0.3000" in warning
    assert ("the start is kept" in warning) == keep_better
    assert [row.kept for row in read_report(tmp_path / "out")] == [kept, "fitted"]
    first = SLA2Attention(H, D, seq_len=N, topk=0.8)
    trained = SLA2Attention(H, D, seq_len=N, topk=0.8)
    layers = tmp_path / "out" / "layers"
    load_router(first, layers / "x@0.8.safetensors")
    load_router(trained, layers / "x@0.8.trained.safetensors")
    assert bool(first.proj_q_delta.any()) != keep_better
    assert torch.equal(first.proj_q_delta, trained.proj_q_delta)
    assert not torch.equal(first.alpha_offset, trained.alpha_offset)


def test_without_any_of_it_alpha_is_the_trained_one(tmp_path: Path) -> None:
    folder = record(tmp_path / "samples", {"x": random_samples()})
    fit_router(folder, tmp_path / "out", **SMALL, **PLAIN)
    layers = tmp_path / "out" / "layers"
    for topk in FRACTIONS:
        plain, trained = (
            (layers / f"x@{topk}{kind}.safetensors").read_bytes() for kind in ("", ".trained")
        )
        assert plain == trained


def test_errors_that_are_not_finite(tmp_path: Path) -> None:
    """NaN in a sample that no step has drawn."""
    problems = random_samples(3, torch.float32)
    (drawn,) = draw_batch("0/x/0.4", 0, 1, 3)
    problems[(drawn + 1) % 3][2][0, 7, 0, 0] = torch.nan
    folder = record(tmp_path / "bad", {"x": problems})
    options = {**SMALL, "topk": (0.4,), "steps": 1, "batch": 1}
    with pytest.raises(RuntimeError, match=r"'x', topk=0.4, after the last step.* not finite"):
        fit_router(folder, tmp_path / "out", **options)


def test_a_folder_without_a_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report\.csv"):
        read_report(tmp_path)
