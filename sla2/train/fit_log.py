"""What a fit reports: a CSV row per step, scalars for TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..files import write_atomically


class Row(NamedTuple):
    """A line of log.csv; the values are those before the step's update."""

    layer: str
    topk: float
    step: int  # from 1
    loss: float  # mean squared error over the batch
    relative_error: float  # ||SLA2 - full|| / ||full|| over the batch
    lr: float
    tau: float  # SoftTop-k's temperature
    seconds: float


class FitLog:
    """Context manager. log.csv in `folder` keeps its first `rows_done` rows and goes on from there.

    TensorBoard gets the same numbers where it is installed, in the folder `tensorboard`; a resumed
    fit may write some steps twice, with equal values. The bar, on stderr, needs rich.
    """

    def __init__(self, folder: Path, *, rows_done: int, rows_total: int, progress: bool) -> None:
        self._path = folder / "log.csv"
        self._rows_done = rows_done
        _keep_rows(self._path, rows_done)
        self._writer = _tensorboard(folder / "tensorboard")
        self._bar = _bar() if progress else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=rows_total, completed=rows_done)

    def __enter__(self) -> FitLog:
        self._stream = self._path.open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._stream)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()
        if self._writer is not None:
            self._writer.close()
        if self._bar is not None:
            self._bar.stop()

    def add(self, row: Row) -> None:
        """Writes and shows a step."""
        self._csv.writerow(row)
        self._stream.flush()
        if self._writer is not None:
            for name in ("loss", "relative_error", "lr", "tau"):
                tag = f"{row.layer}/topk_{row.topk}/{name}"
                self._writer.add_scalar(tag, getattr(row, name), row.step)
        if self._bar is not None:
            text = f"{row.layer} topk {row.topk:g} relative error {row.relative_error:.4f}"
            self._bar.update(self._task, advance=1, description=text)

    def sync(self) -> None:
        """The rows are on the disk: called before a checkpoint, which must not outlive them."""
        os.fsync(self._stream.fileno())


def _keep_rows(path: Path, count: int) -> None:
    """Makes `path` a CSV file with the header and the first `count` rows that it has."""
    rows: list[list[str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1 : 1 + count]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([Row._fields, *rows])
    data = text.getvalue().encode("utf-8")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _tensorboard(folder: Path) -> Any:
    """A SummaryWriter, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _bar() -> Any:
    """A progress bar, or None where rich (of the extra `cli`) is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    text = TextColumn("{task.description}", markup=False)  # names of layers may have brackets
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
    return Progress(*columns, console=Console(file=sys.stderr))
