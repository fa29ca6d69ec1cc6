"""quality.json: gathered from the parts of a study, and read as means and spreads over seeds."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from quality.clips import HELD_OUT, TRAIN
from quality.study import VARIANTS, LayerFit, Settings, Study
from sla2.cli.files import write_json

Results = dict[str, Any]

KEPT = ("start", "fitted")  # what report.csv of a fit says


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
        if (reason := _what_is_wrong(layer_fits(results), results["settings"])) is not None:
            raise BadResults(f"{path}: its stage 1 {reason}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadResults(f"{path} is no quality.json: {error!r}") from error
    return dict(results)


def _what_is_wrong(fits: list[LayerFit], settings: dict[str, Any]) -> str | None:
    for topk in settings["topk"]:
        own = {fit.layer for fit in fits if fit.topk == topk}
        if len(own) != settings["depth"]:
            return f"has {len(own)} of {settings['depth']} layers at {topk}"
    if len(fits) != len({(fit.layer, fit.topk) for fit in fits}):
        return "has a layer twice"
    for fit in fits:
        errors = (fit.error_identity, fit.error_start, fit.error_fitted)
        if not all(math.isfinite(error) for error in errors) or fit.kept not in KEPT:
            return f"has {fit}"
    return None


# ---- numbers ------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Mean and standard deviation over the seeds."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values))


def layer_fits(results: Results) -> list[LayerFit]:
    """Stage 1 by layer and topk."""
    return [LayerFit(**fit) for fit in results["stage1"]["layers"]]


def still_identity(fits: list[LayerFit], topk: float) -> list[str]:
    """The layers whose learned router at `topk` is the identity: no fit so far was kept."""
    learned = {fit.layer for fit in fits if fit.topk >= topk and fit.kept == "fitted"}
    return [fit.layer for fit in fits if fit.topk == topk and fit.layer not in learned]


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
