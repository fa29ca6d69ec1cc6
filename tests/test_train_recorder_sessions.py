"""Recordings of several sessions: appended ones, and copies of a model made in between."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_recorder import Model, make_qkv, record_numbers
from torch import nn

from sla2.train import QKVRecorder, read_samples
from sla2.train.samples import list_files, read_priority

# ---- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("sessions", [[8], [3, 5], [1, 1, 6], [1] * 8, [2, 1] * 5], ids=str)
def test_the_choice_is_uniform(
    tmp_path: Path, sessions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over appended recordings of one seed: each call is kept by as large a share of seeds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # many small files
    calls = sum(sessions)
    kept = [0] * calls
    for seed in range(15 * calls):
        start = 0
        for length in sessions:
            numbers = record_numbers(
                tmp_path / str(seed), range(start, start + length),
                max_samples_per_layer=2, seed=seed, append=True,
            )  # fmt: skip
            start += length
        for value in numbers:
            kept[int(value)] += 1
    # Binomial of mean 30 and standard deviation 4.7 (8 calls) or 5.1 (15).
    assert sum(kept) == 30 * calls and min(kept) >= 13 and max(kept) <= 48


def test_sessions_of_one_seed_are_reproducible_and_differ(tmp_path: Path) -> None:
    """Also a session of which nothing was kept counts, and one that was cut short."""
    options: dict[str, Any] = {"max_samples_per_layer": 3, "seed": 6}
    chosen = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        record_numbers(folder, range(20), **options)
        for session in range(1, 20):
            numbers = range(20 * session, 20 * session + 20)
            chosen.append(record_numbers(folder, numbers, append=True, **options))
    assert chosen[:19] == chosen[19:]
    assert len({tuple(value % 20 for value in kept) for kept in chosen}) > 3
    assert any(before == after for before, after in zip(chosen, chosen[1:19], strict=False))

    def first_priority(folder: Path) -> float:
        record_numbers(folder, [0], layer="b", append=True, **options)
        (file,) = (file for file in list_files(folder) if file.layer == "b")
        return read_priority(file)

    killed = QKVRecorder(nn.Identity(), tmp_path / "2", layers=(), seed=6, append=True).__enter__()
    assert killed.counts == {"a": 3}
    assert first_priority(tmp_path / "1") != first_priority(tmp_path / "2")


def test_a_new_recording_begins_with_the_first_session(tmp_path: Path) -> None:
    """The same choice in a folder whose samples were deleted."""
    options: dict[str, Any] = {"max_samples_per_layer": 4, "seed": 3}
    first = record_numbers(tmp_path, range(50), **options)
    record_numbers(tmp_path, range(50, 60), append=True, **options)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert record_numbers(tmp_path, range(50), **options) == first


def test_a_damaged_count_of_sessions(tmp_path: Path) -> None:
    record_numbers(tmp_path, [1.0], seed=3)
    (tmp_path / "sessions").write_text("two")
    with pytest.raises(ValueError, match="sessions is damaged: .*'two'.*number of sessions"):
        record_numbers(tmp_path, [2.0], seed=3, append=True)
    record_numbers(tmp_path, [2.0], append=True)


def test_append(tmp_path: Path) -> None:
    """The limit counts the earlier samples; a lower one applies from the next kept sample on."""

    def continued(numbers: range, limit: int, seed: int) -> list[float]:
        options: dict[str, Any] = {"max_samples_per_layer": limit, "seed": seed, "append": True}
        return record_numbers(tmp_path, numbers, **options)

    assert continued(range(3), 4, seed=1) == [0, 1, 2]
    assert len(continued(range(3, 50), 4, seed=2)) == 4
    more = continued(range(50, 52), 6, seed=3)
    assert len(more) == 6 and more[-2:] == [50, 51]
    less = continued(range(100, 400), 2, seed=4)
    assert len(less) == 2 and max(less) >= 100


# ---- copies of the model ------------------------------------------------------------------------


def test_a_copy_made_while_recording_is_not_recorded(tmp_path: Path) -> None:
    """Neither inside the `with`, as the original, nor after it, nor by the recorder's next one."""
    model, qkv = Model(), make_qkv()
    recorder = QKVRecorder(model, tmp_path, layers=["blocks.0"], append=True)
    with recorder:
        model(*qkv)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(*make_qkv(1)), Model()(*make_qkv(1)))
        assert recorder.counts == {"blocks.0": 1}
        model(*qkv)
    twin(*qkv)
    with recorder:
        twin(*qkv)
        model(*qkv)
    assert recorder.counts == {"blocks.0": 3}
    assert all(torch.equal(sample.q, qkv[0]) for sample in read_samples(tmp_path))
    with (
        pytest.warns(RuntimeWarning, match="nothing was recorded of blocks.0"),
        QKVRecorder(model, tmp_path / "other", layers=["blocks.0"]),
    ):
        copy.deepcopy(model)(*qkv)
