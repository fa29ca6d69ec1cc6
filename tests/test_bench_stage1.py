"""bench/bench_stage1.py at its smallest size on the CPU: its rows, its file and its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from package_tools import REPOSITORY

import sla2
from sla2.cli import main
from sla2.cli.bench_page import page

sys.path.insert(0, str(REPOSITORY / "bench"))

import bench_stage1
import readme_table

TINY = ["--size", "tiny", "--device", "cpu", "--iters", "1", "--warmup", "0"]


def test_bench_times_a_step_of_stage_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_stage1.main([*TINY, "--topk", "0.5", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "not run: sdpa-cudnn" in printed.err  # there is none for a CPU
    assert "tiny, clip, stage1_step, router: " in printed.out
    rows = json.loads((tmp_path / "stage1.json").read_text())
    seen = [(row["op"], row["inputs"], row["gradients"], row["kept"]) for row in rows]
    dense, own = ("stage1_dense", 1.0), ("stage1_step", 0.5)
    assert seen == [
        (op, inputs, gradients, kept)
        for inputs in ("clip", "gaussian")
        for (op, kept), gradients in ((dense, "all"), (own, "router"), (own, "all"))
    ]
    for row in rows:
        assert (row["B"], row["H"], row["N"], row["D"]) == (1, 2, 288, 64)
        assert (row["dtype"], row["quant"], row["iterations"]) == ("float32", "none", 1)
        assert row["peak_extra_bytes"] is None and 0 < row["listed"] <= 1
    for first in (0, 3):
        flash, *steps = rows[first : first + 3]
        assert (flash["path"], flash["peers"]) == ("sdpa-flash", {})
        for row in steps:
            assert (row["path"], row["peers"]) == ("cpu", {"sdpa-flash": flash["ms_median"]})

    text, sections = page(tmp_path)
    assert [section.name for section in sections if section.panels] == ["stage1"]
    table = text.partition("\n## Stage 1\n")[2].partition("\n## ")[0]
    assert table.count("| B1 H2 N288 D64 float32 |") == 4
    folders = ["--results", str(tmp_path), "--output", str(tmp_path / "docs")]
    assert main(["bench", "--report", *folders]) == 0
    assert (tmp_path / "docs" / "benchmarks" / "stage1.png").is_file()
    assert readme_table.read_rows(tmp_path) == []  # README's tables are of single calls


def test_a_step_differentiates_what_it_says() -> None:
    size = bench_stage1.SIZES["tiny"]
    device = torch.device("cpu")
    qkv = bench_stage1.make_inputs("gaussian", size, torch.float32, device, 0)
    layer = sla2.SLA2Attention(size.heads, size.head_dim, seq_len=size.shape.seqlen, topk=0.5)
    layer.set_stage(1)
    router = bench_stage1.soft_step(layer, qkv, everything=False)()
    every = bench_stage1.soft_step(layer, qkv, everything=True)()
    assert len(router) == len(list(layer.parameters())) and len(every) == len(router) + 3
    assert all(gradient.abs().max() > 0 for gradient in every)


@pytest.mark.parametrize("flags", [["--device", "cuda:99"], ["--output", __file__]])
def test_bench_refuses_what_it_cannot_use(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_stage1.main([*TINY, *flags]) == 2
    assert "bench_stage1: " in capsys.readouterr().err
