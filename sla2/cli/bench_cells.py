"""Cells, tables and groups of the numbers page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sla2.cli.bench_results import Row
from sla2.cli.bench_work import Shape, dense_flop
from sla2.cli.parser import QUANT_MODES, SHAPES

PRESETS = {Shape(*sizes): name for name, sizes in SHAPES.items()}


def significant(value: float) -> str:
    """Three significant digits from 1 on."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def table(header: list[str], rows: Iterable[list[str]], *, left: int) -> str:
    """The first `left` columns are text, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (header, rule, *rows)
    )


def median_cell(row: Row) -> str:
    spread = f"{significant(row['ms_min'])} to {significant(row['ms_max'])}"
    return f"{significant(row['ms_median'])} ({spread})"


def peer_cell(row: Row, name: str) -> str:
    ms = row["peers"].get(name)
    return "" if ms is None else f"{significant(ms)} ({ms / row['ms_median']:.2f}x)"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def shape_of(row: Row) -> Shape:
    return Shape(row["B"], row["H"], row["N"], row["D"])


def shape_cell(row: Row) -> str:
    shape = shape_of(row)
    name = PRESETS.get(shape)
    return f"{name or 'B{} H{} N{} D{}'.format(*shape)} {row['dtype']}"


def case_label(row: Row) -> str:
    return f"{percent(row['kept'])} kept, {row['quant']}, {row['path']}"


def dense_rate(row: Row, ms: float, *, backward: bool = False) -> float:
    """C/t in TFLOP/s: the operations of full attention over the time."""
    return 1e-9 * dense_flop(shape_of(row), backward=backward) / ms


def row_order(row: Row) -> tuple[Any, ...]:
    known = row["quant"] in QUANT_MODES
    quant = QUANT_MODES.index(row["quant"]) if known else len(QUANT_MODES)
    shape = shape_of(row)
    work = shape.batch * shape.heads * shape.seqlen * shape.head_dim
    return work, *shape, row["dtype"], row["kept"], quant, row["quant"], row["path"]


def group_by(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def by_machine(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    groups = group_by(rows, lambda row: row["run"].machine)
    return [(name, sorted(groups[name], key=row_order)) for name in machines(groups)]


def machines(groups: dict[str, list[Row]]) -> list[str]:
    """The names of the GPUs, then of the processors."""
    return sorted(groups, key=lambda name: (groups[name][0]["run"].cuda is None, name))
