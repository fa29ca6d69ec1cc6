"""The folder of a fit: settings, finished layers, the checkpoint of the run in progress.

    settings.json             what the numbers depend on; a resumed fit must agree
    layers/<layer>@<topk>.safetensors    a finished run, a router file of one layer
    layers/<layer>@<topk>.trained.safetensors    the same router with alpha as trained in soft mode,
                              where the next topk starts
    layers/<layer>@<topk>.json    how it compares to its start in hard mode
    checkpoint.safetensors    the run in progress: parameters, AdamW's state; metadata `sla2.fit`
                              with layer, topk and the steps that are done
    log.csv                   a row per step, see fit_log
    router_<topk>.safetensors all layers, when everything is done
    report.csv                the comparisons of all layers, when everything is done

All but the log are written beside their names and renamed, and nothing is a pickle.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import save_router
from ..files import write_atomically
from ..module import SLA2Attention

_VERSION = 3
_REPORT = "report.csv"
_METADATA_KEY = "sla2.fit"
_ADAM = "adam"


class Run(NamedTuple):
    """The training of one layer at one topk."""

    layer: str
    topk: float


class FitReport(NamedTuple):
    """A row of report.csv: relative L2 errors in hard mode, unquantised, over a layer's samples."""

    layer: str
    topk: float
    error_start: float  # of the router that the run started from
    error_fitted: float
    kept: str  # "fitted" or "start": what was written


def read_report(output: str | os.PathLike[str]) -> list[FitReport]:
    """report.csv of a finished `fit_router`, layer after layer and for each the `topk` as given.

    Raises OSError where `output` has none: the fit is not finished, or it is another folder.
    """
    with (Path(output) / _REPORT).open(newline="", encoding="utf-8") as stream:
        return [
            FitReport(
                row["layer"],
                float(row["topk"]),
                float(row["error_start"]),
                float(row["error_fitted"]),
                row["kept"],
            )
            for row in csv.DictReader(stream)
        ]


class FitFolder:
    """Reads and writes the files of one fit."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._settings = self.path / "settings.json"
        self._checkpoint = self.path / "checkpoint.safetensors"

    # ---- settings -----------------------------------------------------------------------------

    def begin(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Starts a fit in a new or empty folder, or continues the one that is there.

        Raises FileExistsError for a folder in use without `resume`; ValueError for a folder of
        something else, and for settings that differ from the fit's, naming the first difference.
        """
        settings = json.loads(json.dumps({"version": _VERSION, **settings}))  # tuples to lists
        if self._settings.exists():
            if not resume:
                raise FileExistsError(
                    f"the folder {self.path} already holds a fit: continue it with resume=True, or "
                    "choose another folder"
                )
            self._check_settings(settings)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise FileExistsError(
                    f"the folder {self.path} is not empty and holds no fit: choose another"
                )
            text = json.dumps(settings, indent=1) + "\n"
            write_atomically(self._settings, lambda temporary: temporary.write_text(text, "utf-8"))
        (self.path / "layers").mkdir(exist_ok=True)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        try:
            saved = json.loads(self._settings.read_text("utf-8"))
            if not isinstance(saved, dict) or not isinstance(saved.get("layers"), dict):
                raise ValueError("no settings of a fit")
        except ValueError as error:
            raise ValueError(f"{self._settings} is damaged: {error}") from error
        for what, before, now in _pairs(saved, settings):
            if before != now:
                raise ValueError(
                    f"the fit in {self.path} has {what}={before!r}, this call {what}={now!r}: with "
                    "resume=True everything that the numbers depend on must be as before. Choose "
                    "another folder for another fit"
                )

    # ---- finished runs ------------------------------------------------------------------------

    def part(self, run: Run) -> Path:
        """The router file of a finished run."""
        return self.path / "layers" / f"{quote(run.layer, safe='')}@{run.topk}.safetensors"

    def router(self, topk: float) -> Path:
        """The router file of all layers."""
        return self.path / f"router_{topk}.safetensors"

    def trained(self, run: Run) -> Path:
        """The router file with alpha as trained."""
        return self.part(run).with_suffix(".trained.safetensors")

    def finish(
        self, run: Run, layer: SLA2Attention, trained: SLA2Attention, report: FitReport
    ) -> None:
        """Makes the run a finished one. After a crash in between its checkpoint is not used."""
        data = (json.dumps(report._asdict()) + "\n").encode("utf-8")
        save_router(trained, self.trained(run))
        # Before the part, which is what says that the run is finished.
        write_atomically(self._report(run), lambda temporary: temporary.write_bytes(data))
        save_router(layer, self.part(run))
        self._checkpoint.unlink(missing_ok=True)

    def _report(self, run: Run) -> Path:
        return self.part(run).with_suffix(".json")

    def write_report(self, runs: Sequence[Run]) -> None:
        """report.csv, a row for each of the finished `runs`."""
        rows = [json.loads(self._report(run).read_text("utf-8")) for run in runs]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FitReport._fields)
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode("utf-8")
        write_atomically(self.path / _REPORT, lambda temporary: temporary.write_bytes(data))

    # ---- the run in progress ------------------------------------------------------------------

    def save_checkpoint(
        self, run: Run, layer: SLA2Attention, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        """The state after `step` steps of `run`, in place of an earlier one."""
        tensors = {name: p.detach() for name, p in layer.named_parameters()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{_ADAM}.{index}.{name}": value for name, value in state.items()}
        tensors = {name: value.to("cpu").contiguous() for name, value in tensors.items()}
        header = {"version": _VERSION, **run._asdict(), "step": step}
        data = safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps(header)})
        write_atomically(
            self._checkpoint, lambda temporary: temporary.write_bytes(data), suffix=".tmp"
        )

    def steps_done(self, runs: Sequence[Run], steps: int) -> int:
        """How many of the steps of all `runs`, each of `steps`, are done.

        Raises ValueError for a damaged checkpoint.
        """
        finished = 0
        while finished < len(runs) and self.part(runs[finished]).exists():
            finished += 1
        done = finished * steps
        if finished < len(runs) and self._checkpoint.exists():
            run, step, _ = self._read_checkpoint()
            # One of another run was left by a crash after that run's part was written.
            if run == runs[finished]:
                done += step
        return done

    def load_checkpoint(self, layer: SLA2Attention, optimizer: torch.optim.Optimizer) -> None:
        """Restores the checkpoint that `steps_done` has counted. Raises as `steps_done`."""
        _, _, tensors = self._read_checkpoint()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(tensors.pop(name))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _read_checkpoint(self) -> tuple[Run, int, dict[str, Tensor]]:
        try:
            with safe_open(self._checkpoint, framework="pt", device="cpu") as content:
                header = json.loads((content.metadata() or {})[_METADATA_KEY])
                names = content.keys()
                # Copies: AdamW will write into them, and they are mapped from the file.
                tensors = {name: content.get_tensor(name).clone() for name in names}
            return Run(header["layer"], header["topk"]), int(header["step"]), tensors
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._checkpoint} is damaged or no checkpoint of a fit ({error!r}). Delete it: "
                "its layer starts anew at that topk, with the same numbers"
            ) from error


def _pairs(saved: dict[str, Any], own: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, saved value, own value) of every setting, layers and samples one by one.

    What comes after a pair counts on that its two values are equal.
    """
    for name in {**own, **saved}:
        if name != "layers":
            yield name, saved.get(name), own.get(name)
    before, now = saved["layers"], own["layers"]
    yield "layers", list(before), list(now)
    for layer in before:
        for name in now[layer]:
            if name != "samples":
                yield f"{name} of layer {layer!r}", before[layer].get(name), now[layer][name]
        samples, samples_now = before[layer]["samples"], now[layer]["samples"]
        yield f"samples of layer {layer!r}", list(samples), list(samples_now)
        for call in samples:
            name = f"fingerprint of sample {call} of layer {layer!r}"
            yield name, samples[call], samples_now[call]
