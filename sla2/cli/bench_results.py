"""The measurements of a folder of JSON files, each checked before anything is made of it.

A file is one of: a list of rows (`sla2 bench --output`, `bench/bench_cpu.py`,
`bench/bench_stage1.py`, `bench/bench_wan.py`); an object with "cases" (`bench/bench_stages.py`); a
report of something other than time, which is passed over. Anything else is an error that names the
file and the field.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sla2.cli.errors import CliError
from sla2.cli.parser import PEERS

Row = dict[str, Any]

FORWARD, BACKWARD = "sla2_attention", "sla2_attention_fwd_bwd"
STEP = "wan_step"
STAGE1, STAGE1_DENSE = "stage1_step", "stage1_dense"
STAGE1_INPUTS, STAGE1_GRADIENTS = ("clip", "gaussian"), ("router", "all")
SPARSE, ROUTE, LINEAR = "block_sparse_attention", "route", "complement_linear_attention"
# Peers have rows of their own, but are shown from the "peers" of the row they were run beside.
OPERATIONS = {
    *(FORWARD, BACKWARD, SPARSE, ROUTE, LINEAR),
    *(f"{peer}{suffix}" for peer in PEERS for suffix in ("", "_fwd_bwd")),
}

# A key of the object -> what such a report holds; none of them is a time of attention.
PASSED_OVER = {
    "faults": "tests/mutation.py",
    "results": "sla2 selftest --json",
    "settings": "bench/quality",
}


class Run(NamedTuple):
    """One call of a benchmark; `date` first, so that runs sort from the oldest to the newest."""

    date: str
    file: str
    machine: str
    command: str | None
    commit: str
    torch: str
    cuda: str | None
    driver: str | None


class Results(NamedTuple):
    """Measurements as they are in the files, each with its Run as "run"."""

    rows: list[Row]
    cases: list[Row]  # kernels of one call
    steps: list[Row]  # denoising steps of a whole model
    stage1: list[Row]  # steps of stage 1 in one layer


# ---- fields -----------------------------------------------------------------------------------


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size_or_none(value: Any) -> bool:
    return value is None or _size(value)


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _not_negative(value: Any) -> bool:
    return value == 0 and not isinstance(value, bool) or _positive(value)


def _share(value: Any) -> bool:
    return _positive(value) and value <= 1


def _date(value: Any) -> bool:
    try:
        datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _times(value: Any) -> bool:
    return isinstance(value, dict) and all(_positive(ms) for ms in value.values())


def _object_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _list(value: Any) -> bool:
    return isinstance(value, list)


Field = tuple[Callable[[Any], bool], str]


def _one_of(names: tuple[str, ...]) -> Field:
    return (lambda value: value in names), f"one of {', '.join(names)}"


TEXT: Field = (_text, "text")
TEXT_OR_NONE: Field = (_text_or_none, "text or null")
SIZE: Field = (_size, "a positive integer")
POSITIVE: Field = (_positive, "a positive number")
NOT_NEGATIVE: Field = (_not_negative, "a number that is not negative")
SHARE: Field = (_share, "a share in (0, 1]")
DATE: Field = (_date, "an ISO 8601 date")
TIMES: Field = (_times, "an object of positive milliseconds")
LIST: Field = (_list, "a list")
FLAG: Field = (_flag, "true or false")
SIZE_OR_NONE: Field = (_size_or_none, "a positive integer or null")
OBJECT_OR_NONE: Field = (_object_or_none, "an object or null")

PROVENANCE = {
    **{"gpu": TEXT_OR_NONE, "driver": TEXT_OR_NONE, "torch": TEXT, "cuda": TEXT_OR_NONE},
    **{"commit": TEXT, "date": DATE},
}
SHAPE = {"B": SIZE, "H": SIZE, "N": SIZE, "D": SIZE, "dtype": TEXT, "kept": SHARE, "quant": TEXT}
MEDIAN = {"ms_median": POSITIVE, "ms_min": POSITIVE, "ms_max": POSITIVE}
# Older files lack them, or GPU rows do.
OPTIONAL = {"command": TEXT_OR_NONE, "cpu": TEXT_OR_NONE, "peak_extra_bytes": SIZE_OR_NONE}
ROW = {**PROVENANCE, "op": TEXT, **SHAPE, "path": TEXT, **MEDIAN, "peers": TIMES}
CASE = {**SHAPE, "path": TEXT, "whole_ms": TIMES, "sums": LIST}
SUM = {"group": TEXT, "ms": NOT_NEGATIVE, "floor_ms": NOT_NEGATIVE}
STEP_ROW = {
    **PROVENANCE,
    **{"model": TEXT, "attention": TEXT, "kept": SHARE, "quant": TEXT, "path": TEXT_OR_NONE},
    **{"compile": FLAG, **MEDIAN, "profile": OBJECT_OR_NONE, "peak_bytes": SIZE_OR_NONE},
}
PROFILE = {"self_attention_ms": NOT_NEGATIVE, "cross_attention_ms": NOT_NEGATIVE}
STAGE1_ROW = {
    **ROW,
    **{"inputs": _one_of(STAGE1_INPUTS), "gradients": _one_of(STAGE1_GRADIENTS)},
    **{"listed": SHARE, "iterations": SIZE, "peak_extra_bytes": SIZE_OR_NONE},
}


def _check(value: Any, fields: dict[str, Field], where: str) -> None:
    """That `value` is an object with those fields; where: how messages name it."""
    if not isinstance(value, dict):
        raise CliError(f"{where} is no object but {type(value).__name__}")
    missing = [name for name in fields if name not in value]
    if missing:
        raise CliError(f"{where} lacks {', '.join(missing)}")
    for name, (good, wanted) in {**fields, **OPTIONAL}.items():
        if not good(value.get(name)):
            raise CliError(f"{where}: {name} is {value[name]!r}, {wanted} is needed")


# ---- files ------------------------------------------------------------------------------------


def read_results(folder: Path) -> Results:
    """All measurements of the JSON files directly in `folder`."""
    if not folder.is_dir():
        raise CliError(f"{folder} is no folder of results; give --results FOLDER")
    results = Results([], [], [], [])
    lists = {STEP: results.steps, STAGE1: results.stage1}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CliError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise CliError(f"{path} is not JSON: {error}") from error
        if isinstance(content, list):
            for row in _rows(content, path):
                lists.get(row["op"], results.rows).append(row)
        elif isinstance(content, dict) and "cases" in content and _list(content["cases"]):
            results.cases.extend(_cases(content, path))
        elif not isinstance(content, dict) or not PASSED_OVER.keys() & content.keys():
            known = ", ".join(["cases", *PASSED_OVER])
            raise CliError(f"{path} is neither a list of rows nor a report with one of {known}")
    return results


def _rows(content: list[Any], path: Path) -> list[Row]:
    rows = []
    for index, row in enumerate(content):
        if isinstance(row, dict) and "kernel" in row and "op" in row:
            continue  # the kernels.json of sla2 bench --stages: no GPU, commit or date
        where = f"{path}, row {index}"
        op = row.get("op") if isinstance(row, dict) else None
        if op == STEP:
            _check(row, STEP_ROW, where)
            if row["profile"] is not None:
                _check(row["profile"], PROFILE, f"{where}, profile")
        elif op in (STAGE1, STAGE1_DENSE):
            _check(row, STAGE1_ROW, where)
        else:
            _check(row, ROW, where)
            if op not in OPERATIONS:
                raise CliError(f"{where}: op is {op!r}, which this page does not know")
        if op != STAGE1_DENSE:  # the "peers" of a step of stage 1 hold these times
            rows.append({**row, "run": _run(row, path)})
    return rows


def _cases(content: Row, path: Path) -> list[Row]:
    _check(content, PROVENANCE, str(path))
    for index, case in enumerate(content["cases"]):
        where = f"{path}, case {index}"
        _check(case, CASE, where)
        _check(case["whole_ms"], dict.fromkeys(("median", "min", "max"), POSITIVE), where)
        for position, entry in enumerate(case["sums"]):
            _check(entry, SUM, f"{where}, sum {position}")
    return [{**case, "run": _run(content, path)} for case in content["cases"]]


def _run(source: Row, path: Path) -> Run:
    machine = str(source["gpu"] or source.get("cpu") or "CPU")
    command = source.get("command")
    versions = (source["torch"], source["cuda"], source["driver"])
    return Run(source["date"], path.name, machine, command, source["commit"], *versions)


# ---- choice -----------------------------------------------------------------------------------


def newest(rows: list[Row], names: tuple[str, ...]) -> list[Row]:
    """One row per machine and values of `names`: the one of the latest run."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["run"].date):
        case = (row["run"].machine, *(row[name] for name in names))
        found[case] = row
    return list(found.values())
