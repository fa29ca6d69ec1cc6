"""Stage 1's fit: that it learns, its arithmetic, streaming, what it shows; calibration of alpha."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fit_cases import (
    FRACTIONS,
    PLAIN,
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

import sla2
from sla2 import SLA2Attention, load_router
from sla2.train import Sample, calibrate_alpha, fit, fit_router
from sla2.train.fit_data import ProblemLoader, draw_batch, scan_layers


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return record_two_layers(tmp_path / "samples")


# ---- that it learns -----------------------------------------------------------------------------

CLASSES, LONG = 4, 1024


def class_problem(seed: int) -> list[Tensor]:
    """Queries of a class need the keys of theirs, and only a learned router can tell which.

    Block means see a marker alone: class c is feature 8 + c in q, 12 + c in k, so that the identity
    scores nothing. The attention itself is on features 0 to 3 with random signs.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (0.1 * torch.randn(1, LONG, 1, D, generator=generator) for _ in range(3))
    sign_q, sign_k = 2.0 * torch.randint(0, 2, (2, LONG), generator=generator) - 1.0
    token = torch.arange(LONG)
    class_q, class_k = token // 128 % CLASSES, token // 64 % CLASSES
    q[0, token, 0, class_q] += 4 * sign_q
    k[0, token, 0, class_k] += 4 * sign_k
    v[0, token, 0, class_k] += sign_k
    q[0, token, 0, 8 + class_q] += 2
    k[0, token, 0, 12 + class_k] += 2
    return [x.bfloat16() for x in (q, k, v)]


def share_of_right_blocks(layer: SLA2Attention, qkv: list[Tensor]) -> float:
    """Of the key blocks of a query's own class, those that the hard router selects."""
    block_map = sla2.route(
        *qkv[:2], proj_q=layer.proj_q.detach(), proj_k=layer.proj_k.detach(), topk=1 / CLASSES
    )
    classes_q, classes_k = torch.arange(LONG // 128) % CLASSES, torch.arange(LONG // 64) % CLASSES
    right = classes_q[:, None] == classes_k
    return (block_map.to_dense()[0, 0] & right).sum().item() / right.sum().item()


def relative_error(layer: SLA2Attention, qkv: list[Tensor]) -> float:
    """Of the layer in hard mode against full attention."""
    heads_first = [x.float().transpose(1, 2) for x in qkv]
    full = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    return ((layer(*qkv).float() - full).norm() / full.norm()).item()


def test_it_learns_the_right_router(tmp_path: Path) -> None:
    folder = record(tmp_path / "samples", {"attention": [class_problem(s) for s in range(4)]})
    paths = fit_router(
        folder, tmp_path / "out", topk=(0.5, 0.25), steps=60, lr=0.06, batch=1, device="cpu",
        progress=False,
    )  # fmt: skip
    model = nn.Module()
    model.attention = SLA2Attention(1, D, seq_len=LONG, topk=0.25)
    held_out = class_problem(99)
    model.attention.calibrate_alpha(*held_out[:2])
    before = relative_error(model.attention, held_out)
    assert share_of_right_blocks(model.attention, held_out) <= 0.5
    load_router(model, paths[0.25])
    assert share_of_right_blocks(model.attention, held_out) >= 0.9
    assert relative_error(model.attention, held_out) <= 0.6 * before
    losses = [float(row["loss"]) for row in read_log(tmp_path / "out")]
    assert sum(losses[50:60]) <= 0.5 * sum(losses[:10])


# ---- the arithmetic -----------------------------------------------------------------------------


def test_numbers_are_those_of_plain_autograd(tmp_path: Path) -> None:
    """MSE, AdamW without decay, the order of the samples, alpha's start, and the warm start.

    The samples differ in batch size: every element counts the same.
    """
    problems = [random_samples(1, torch.float64, (batch, N, H, D))[0] for batch in (1, 2, 1)]
    folder = record(tmp_path / "samples", {"x": problems})
    fit_router(folder, tmp_path / "out", **SMALL, **PLAIN)
    rows = iter(read_log(tmp_path / "out"))
    layer = SLA2Attention(H, D, seq_len=N, topk=0.8)
    calibrate_alpha(layer, (Sample("x", None, *qkv) for qkv in problems))
    for topk in FRACTIONS:
        layer.topk = topk
        layer.set_stage(1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, eps=1e-15, weight_decay=0.0)
        for step in range(5):
            chosen = [problems[i] for i in draw_batch(f"0/x/{topk}", step, 2, 3)]
            full = [
                F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
                for qkv in chosen
            ]
            difference = torch.cat(
                [(layer(*qkv) - y).flatten() for qkv, y in zip(chosen, full, strict=True)]
            )
            loss = difference.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row = next(rows)
            assert (row["layer"], row["topk"], row["step"]) == ("x", str(topk), str(step + 1))
            assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-5)
            norm = torch.cat([y.flatten() for y in full]).norm()
            error = (difference.norm() / norm).item()
            assert float(row["relative_error"]) == pytest.approx(error, rel=1e-5)
            assert (row["lr"], row["tau"]) == ("0.001", "0.1") and float(row["seconds"]) > 0
        fitted = SLA2Attention(H, D, seq_len=N, topk=topk)
        load_router(fitted, tmp_path / "out" / "layers" / f"x@{topk}.safetensors")
        for name, value in layer.state_dict().items():
            assert value.abs().max() > 1e-3
            torch.testing.assert_close(fitted.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert next(rows, None) is None


def test_gradients_are_those_of_the_mean(tmp_path: Path) -> None:
    """Their scale too, to which AdamW is blind."""
    problems = random_samples(3, torch.float64)
    recorded = scan_layers(record(tmp_path, {"x": problems}), None)[0]
    loader = ProblemLoader(recorded, torch.device("cpu"), None, 1 << 30)
    layer = SLA2Attention(H, D, seq_len=N, topk=0.4)
    layer.set_stage(1)
    loss, _ = fit._backward(layer, loader, [2, 0])
    expected = torch.stack(
        [(layer(p.q, p.k, p.v) - p.target).square().mean() for p in (loader[2], loader[0])]
    ).mean()
    grads = torch.autograd.grad(expected, list(layer.parameters()))
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, grad)


def test_float16_gradients_do_not_underflow(tmp_path: Path) -> None:
    """Of the mean each would be near 2e-8, where float16 has only 0 and 6e-8."""
    ((q, k, v),) = random_samples(1, torch.float16)
    grads = []
    for dtype in (torch.float16, torch.float32):
        folder = record(tmp_path / str(dtype), {"x": [[x.to(dtype) for x in (q, k, 0.001 * v)]]})
        loader = ProblemLoader(scan_layers(folder, None)[0], torch.device("cpu"), None, 0)
        layer = SLA2Attention(H, D, seq_len=N, topk=0.4)
        layer.set_stage(1)
        fit._backward(layer, loader, [0])
        grads.append([parameter.grad for parameter in layer.parameters()])
    for actual, expected in zip(*grads, strict=True):
        assert (actual - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_epoch_is_a_permutation(batch: int) -> None:
    drawn = [i for step in range(30 // batch) for i in draw_batch("a", step, batch, 5)]
    epochs = [drawn[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert drawn != [i for step in range(30 // batch) for i in draw_batch("b", step, batch, 5)]


def test_options_reach_the_layers(samples: Path, tmp_path: Path) -> None:
    options = {"per_head_router": True, "per_head_alpha": False, "tau": 0.2, "quant": "int8_fp8"}
    paths = fit_router(samples, tmp_path / "out", **SMALL, layer_options=options)
    for topk in FRACTIONS:
        assert load_router(Model(topk=topk, **options), paths[topk]) == []


def test_modes_and_generators_of_the_caller_do_not_matter(samples: Path, tmp_path: Path) -> None:
    options = {**SMALL, "layers": ["blocks.0.attn1"], "steps": 2}
    fit_router(samples, tmp_path / "1", **options)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.float16):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        fit_router(samples, tmp_path / "2", **options)
        assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    fit_router(samples, tmp_path / "3", **options, seed=1)
    assert (
        contents(tmp_path / "1")["router_0.4.safetensors"]
        != (contents(tmp_path / "3")["router_0.4.safetensors"])
    )


# ---- streaming ----------------------------------------------------------------------------------


def test_the_cache_changes_nothing(samples: Path, tmp_path: Path) -> None:
    for cache in (0, 200_000, 1 << 30):
        fit_router(samples, tmp_path / str(cache), **SMALL, cache_bytes=cache)
    first = contents(tmp_path / "0")
    assert contents(tmp_path / "200000") == first == contents(tmp_path / str(1 << 30))


def test_the_cache_keeps_its_limit(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention is computed once of what fits, and every time of the rest."""
    computed: list[Tensor] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        computed.append(q)
        return q

    monkeypatch.setattr("sla2.train.fit_data.full_attention", counted)
    layer = scan_layers(samples, None)[0]
    size = 4 * N * H * D * 2
    for limit, expected in ((0, 9), (2 * size - 1, 7), (2 * size, 5), (3 * size, 3)):
        computed.clear()
        loader = ProblemLoader(layer, torch.device("cpu"), None, limit)
        for _ in range(3):
            assert [p.q.dtype for p in loader] == [torch.bfloat16] * 3
        assert len(computed) == expected


# ---- what is shown ------------------------------------------------------------------------------


def test_progress_bar(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    options = {**SMALL, "progress": True}
    fit_router(samples, tmp_path / "1", **options)
    shown = capsys.readouterr()
    assert "20/20" in shown.err and "blocks.1.attn1 topk 0.4 relative error 0." in shown.err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    fit_router(samples, tmp_path / "2", **options)
    after = capsys.readouterr()
    assert shown.out + after.out + after.err == ""


def test_tensorboard(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "out" / "tensorboard")

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            scalars.append((tag, value, step))

        def close(self) -> None:
            scalars.append(("closed", 0.0, 0))

    module: Any = types.ModuleType("tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    fit_router(samples, tmp_path / "out", **SMALL)
    assert scalars.pop()[0] == "closed" and len(scalars) == 80
    row = read_log(tmp_path / "out")[7]
    for name in ("loss", "relative_error", "lr", "tau"):
        assert (f"blocks.0.attn1/topk_0.4/{name}", float(row[name]), 3) in scalars


# ---- calibrate_alpha ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_calibrate_alpha_is_the_mean_mass(tmp_path: Path, layout: str) -> None:
    """Eq. 7, from dense probabilities; a sample of batch 2 counts twice."""
    layer = SLA2Attention(H, D, seq_len=N, topk=0.4, alpha_init=0.3, layout=layout)
    recorded, mass = [], []
    for seed, batch in enumerate((1, 2)):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = torch.randn(3, batch, N, H, D, generator=generator)
        recorded.append((q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / D**0.5
        block_map = sla2.route(q, k, proj_q=layer.proj_q, proj_k=layer.proj_k, topk=0.4).to_dense()
        tiles = block_map.repeat_interleave(128, 2)[:, :, :N].repeat_interleave(64, 3)[..., :N]
        mass += list((scores.softmax(-1) * tiles).sum(-1))
    folder = record(tmp_path / "samples", {"x": recorded})
    calibrate_alpha(layer, sla2.train.read_samples(folder, "x"))
    rows = torch.stack(mass).mean(0)
    blocks = torch.stack([x.mean(-1) for x in rows.split(128, -1)], -1)
    torch.testing.assert_close(layer.alpha_logit.sigmoid(), blocks, rtol=1e-4, atol=1e-5)
    assert layer.proj_q_delta.abs().max() == 0 and layer.alpha_offset.dtype == torch.float32


def test_calibrate_alpha_refuses(tmp_path: Path) -> None:
    layer = SLA2Attention(H, D, seq_len=N, topk=0.4)
    good = Sample("x", None, *random_samples(1)[0])
    bad = Sample("x", None, *random_samples(1)[0])
    bad.q[0, 5, 1] = torch.nan
    other: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "no samples to calibrate"),
        ([good, good._replace(layer="y")], ValueError, "layers 'x' and 'y'"),
        ([good, bad], ValueError, "NaN or infinity in sample 1"),
        ([good, Sample("x", None, *random_samples(1, shape=(1, 9, H, D))[0])], ValueError, "N=9"),
    ]
    for given, error, match in other:
        with pytest.raises(error, match=match):
            calibrate_alpha(layer, given)
        assert layer.alpha_offset.abs().max() == 0
    with pytest.raises(TypeError, match="must be a SLA2Attention; got Identity"):
        calibrate_alpha(nn.Identity(), [good])  # type: ignore[arg-type]
    calibrate_alpha(layer, [good], dtype=torch.float32)
    assert layer.alpha_offset.abs().max() > 0
