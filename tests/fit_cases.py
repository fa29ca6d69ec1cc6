"""What the tests of stage 1's fit share: recordings, the model they belong to, a fit's files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2 import SLA2Attention
from sla2.train import QKVRecorder

N, H, D = 300, 2, 16  # T_m = 3, T_n = 5, both with a short tail
FRACTIONS = (0.8, 0.4)
SMALL: dict[str, Any] = {
    "topk": FRACTIONS, "steps": 5, "batch": 2, "checkpoint_every": 2, "progress": False,
    "device": "cpu",
}  # fmt: skip
# What a fit was before it had schedules: AdamW and nothing else.
PLAIN: dict[str, Any] = {
    "schedule": "constant", "warmup": 0, "tau": None, "decay": 0.0, "refit_alpha": False,
    "keep_better": False,
}  # fmt: skip


def record(folder: Path, layers: dict[str, Sequence[Sequence[Tensor]]], **options: Any) -> Path:
    """A recording with these (q, k, v)."""
    with QKVRecorder(
        nn.Identity(), folder, layers=(), max_samples_per_layer=99, **options
    ) as recorder:
        for name, samples in layers.items():
            for qkv in samples:
                recorder.record(name, *qkv)
    return folder


def random_samples(
    count: int = 3, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (1, N, H, D)
) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    samples = []
    for _ in range(count):
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        samples.append([x.to(dtype) for x in (2 * q, 2 * k, v)])
    return samples


def record_two_layers(folder: Path) -> Path:
    """Three samples of each layer of `Model`."""
    names = ("blocks.0.attn1", "blocks.1.attn1")
    return record(folder, dict.fromkeys(names, random_samples()))


def errors_line(router: Path, topk: float) -> str:
    """What the scripts of stage 1 print of a router file of two layers, from the report beside."""
    with (router.parent / "report.csv").open(newline="") as stream:
        own = [row for row in csv.DictReader(stream) if row["topk"] == str(topk)]
    assert len(own) == 2
    start, fitted = (sum(float(row[f"error_{x}"]) for row in own) / 2 for x in ("start", "fitted"))
    kept = [row["kept"] for row in own].count("start")
    return (
        f"topk {topk:g}: relative error {start:.3f} at the start, {fitted:.3f} fitted; {kept} of 2 "
        f"layers kept the start; {router}\n"
    )


class Model(nn.Module):
    """Has SLA2Attention where the recording says."""

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(layers))
        for block in self.blocks:
            block.attn1 = SLA2Attention(H, D, **{"seq_len": N, **options})


def read_log(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(output: Path) -> dict[str, Any]:
    """Everything in the folder: bytes, and the log's rows but for the seconds."""
    files: dict[str, Any] = {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "log.csv"
    }
    files["log"] = [{**row, "seconds": ""} for row in read_log(output)]
    return files
