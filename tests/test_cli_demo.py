"""The demo command, its clip and its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sla2.cli import clip, main, tokens

CPU = torch.device("cpu")


DEMO = ["demo", "--device", "cpu", "--grid", "3x8x10", "--topk", "0.5"]


def test_demo_compares_with_full_attention_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*DEMO, "--head", "1", "--output", str(tmp_path / "demo")]) == 0
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["demo.json", "demo.png"]
    summary = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert (summary["frames"], summary["tokens"], summary["heads"]) == (9, 240, 2)
    assert (summary["kv_blocks_kept"], summary["kv_blocks"], summary["sparsity"]) == (2, 4, 0.5)
    results = {result["name"]: result for result in summary["results"]}
    assert results["full attention (SDPA)"]["rel_l2"] is None
    assert 0.0 < results["SLA2"]["rel_l2"] < 0.5
    assert results["SLA2"]["cosine"] > 0.9
    with Image.open(tmp_path / "demo" / "demo.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert image.format == "PNG" and pixels.shape[1] > 1000 and len(np.unique(pixels)) > 100
    printed = capsys.readouterr().out
    assert "50.0% sparsity" in printed and "rel L2 error" in printed and "speed-up" in printed


def test_demo_with_every_block_is_full_attention(tmp_path: Path) -> None:
    arguments = ["demo", "--device", "cpu", "--grid", "1x6x8", "--topk", "1.0", "--heads", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "demo.json").read_text())
    ours = next(result for result in summary["results"] if result["name"] == "SLA2")
    assert summary["sparsity"] == 0.0 and ours["rel_l2"] < 1e-5


def test_demo_takes_images_and_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    frames = [
        Image.fromarray(generator.integers(0, 255, (64, 90, 3), dtype=np.uint8)) for _ in range(3)
    ]
    frames[0].save(tmp_path / "photo.jpg")
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:])
    for name in ("photo.jpg", "video.gif"):
        arguments = ["demo", "--device", "cpu", "--grid", "2x4x5", "--heads", "1", "--topk", "1.0"]
        arguments += ["--input", str(tmp_path / name), "--output", str(tmp_path / "out")]
        assert main(arguments) == 0
        assert name in capsys.readouterr().out
    (tmp_path / "broken.png").write_bytes(b"no image")
    arguments = ["demo", "--grid", "1x2x2", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--input", str(tmp_path / "broken.png")]) == 2
    assert "cannot read" in capsys.readouterr().err
    both = [str(tmp_path / "video.gif"), str(tmp_path / "photo.jpg")]
    assert main([*arguments, "--input", *both]) == 2


def test_the_clip_moves_and_is_the_same_every_time() -> None:
    first, shown = clip.load_clip(None, 6, 48, 80)
    second, _ = clip.load_clip(None, 6, 48, 80)
    assert first.shape == (6, 48, 80, 3) and np.array_equal(first, second)
    assert "coffee" in shown
    # Two frames a shot: both a camera move and a cut change the picture, a cut much more.
    change = np.abs(np.diff(first.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert change.min() > 1.0 and change[1] > change[0] and change[3] > change[2]


def test_a_short_video_plays_forwards_and_backwards(tmp_path: Path) -> None:
    shades = [Image.new("RGB", (32, 32), (40 * i, 40 * i, 40 * i)) for i in range(3)]
    shades[0].save(tmp_path / "v.gif", save_all=True, append_images=shades[1:])
    frames, _ = clip.load_clip([str(tmp_path / "v.gif")], 6, 16, 16)
    assert frames[:, 0, 0, 0].tolist() == [0, 40, 80, 40, 0, 40]


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    grid = (3, 4, 5)
    cos, sin = tokens.rotary_3d(grid, 64, CPU)
    assert cos.shape == (60, 32)
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones(60, 32))
    q, k = torch.randn(1, 1, 64).expand(1, 60, 64), torch.randn(1, 1, 64).expand(1, 60, 64)
    scores = (tokens._rotate(q, cos, sin) @ tokens._rotate(k, cos, sin).mT)[0]
    scores = scores.reshape(*grid, *grid)
    torch.testing.assert_close(scores[0, 0, 0, 1, 2, 3], scores[1, 1, 1, 2, 3, 4])
    assert abs(scores[0, 0, 0, 0, 0, 1] - scores[0, 0, 0, 0, 1, 0]) > 1e-3


def test_embedding_is_fixed_and_has_the_peak_logits() -> None:
    frames, _ = clip.load_clip(None, tokens.pixel_frames(2), 64, 96)
    options: dict[str, Any] = {"heads": 3, "head_dim": 64, "dtype": torch.float32, "device": CPU}
    q, k, v = tokens.embed(frames, (2, 4, 6), **options)
    again = tokens.embed(frames, (2, 4, 6), **options)
    assert q.shape == k.shape == v.shape == (1, 48, 3, 64)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    own_score = (q * k).sum(-1)[0].mean(0) / 8.0
    assert ((own_score / torch.tensor([14.0, 18.0, 22.0]) - 1).abs() < 0.1).all()
