"""quality.json: gathered from the parts of a study, and read as means and spreads over seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from quality.clips import HELD_OUT, TRAIN
from quality.study import VARIANTS, Settings, Study
from sla2.cli.files import write_json

Results = dict[str, Any]


class BadResults(Exception):
    """A file that is no result of a whole study; says which and why."""


def missing_parts(study: Study) -> list[str]:
    """What the study still has to compute, in the order of computing."""
    parts = [name for name in ("base", "stage1") if not (study.folder / f"{name}.json").exists()]
    return parts + [
        f"{variant.name}:{seed}"
        for seed in range(study.settings.seeds)
        for variant in VARIANTS
        if not study.piece_file(variant, seed).exists()
    ]


def gather(study: Study, command: str) -> Path:
    """Writes quality.json from the parts of a finished study."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    pieces = [
        read(study.piece_file(variant, seed))
        for variant in VARIANTS
        for seed in range(study.settings.seeds)
    ]
    base = read(study.folder / "base.json")
    keys = ("gpu", "driver", "torch", "cuda", "commit", "date")
    path = study.folder / "quality.json"
    write_json(
        path,
        {
            # The newest part stands for all; each has its own besides.
            **{key: max(pieces, key=lambda piece: str(piece["date"]))[key] for key in keys},
            "command": command,
            "settings": asdict(study.settings),
            "photographs": {"train": TRAIN, "held_out": HELD_OUT},
            "base": base,
            "stage1": read(study.folder / "stage1.json"),
            "pieces": pieces,
        },
    )
    return path


def read_results(path: Path) -> Results:
    """Raises BadResults for what `gather` did not write."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        names = set(Settings.__dataclass_fields__)
        if set(results["settings"]) != names:
            raise BadResults(f"{path}: its settings are not {', '.join(sorted(names))}")
        for variant in VARIANTS:
            if len(outcomes(results, variant.name)) < 2:
                raise BadResults(f"{path} lacks seeds of {variant.name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadResults(f"{path} is no quality.json: {error!r}") from error
    return dict(results)


# ---- numbers ------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Mean and standard deviation over the seeds."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values))


def outcomes(results: Results, variant: str) -> list[Any]:
    """The pieces of a variant, by seed."""
    own = [piece for piece in results["pieces"] if piece["variant"] == variant]
    return sorted(own, key=lambda piece: int(piece["seed"]))


def values(results: Results, variant: str, quant: str, when: str, key: str) -> list[float]:
    """One number of every seed: key "loss" or "attention_error", when "before" or "after"."""
    return [float(piece[when][quant][key]) for piece in outcomes(results, variant)]


def differences(results: Results, first: tuple[str, str], second: tuple[str, str]) -> list[float]:
    """Held-out loss of `first` less that of `second`, seed by seed; each a (variant, quant).

    Seeds are paired, because variants of one seed have seen the same batches.
    """
    a, b = (values(results, *which, "after", "loss") for which in (first, second))
    return [x - y for x, y in zip(a, b, strict=True)]
