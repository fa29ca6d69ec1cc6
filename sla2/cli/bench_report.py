"""The rows of a benchmark as a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from sla2.cli.files import write_json
from sla2.files import write_atomically

matplotlib.use("Agg")  # files only: no display is needed

COLUMNS = (
    "gpu",
    "driver",
    "torch",
    "cuda",
    "commit",
    "date",
    "op",
    "B",
    "H",
    "N",
    "D",
    "kept",
    "quant",
    "path",
    "ms_median",
    "ms_min",
    "ms_max",
    "peers",
    "clocks",
    "dtype",
    "executed_tflops",
    "dense_equivalent_tflops",
    "peak_extra_bytes",
    "command",
)

Row = dict[str, Any]


def print_table(rows: list[Row], verdicts: dict[int, str]) -> None:
    """The rows; `verdicts`: result of the comparison with the reference, by the row's position."""
    table = Table()
    table.add_column("operation")
    table.add_column("shape")
    for name in ("kept", "quant", "path"):
        table.add_column(name)
    for name in ("ms", "min", "max", "executed TFLOP/s", "dense-equivalent TFLOP/s", "extra MiB"):
        table.add_column(name, justify="right")
    if verdicts:
        table.add_column("reference")
    for index, row in enumerate(rows):
        extra = row["peak_extra_bytes"]
        cells = [
            row["op"],
            f"B{row['B']} H{row['H']} N{row['N']} D{row['D']} {row['dtype']}",
            f"{row['kept']:g}",
            row["quant"],
            row["path"],
            *(_milliseconds(row[name]) for name in ("ms_median", "ms_min", "ms_max")),
            _rate(row["executed_tflops"]),
            _rate(row["dense_equivalent_tflops"]),
            "" if extra is None else f"{extra / 2**20:.1f}",
        ]
        table.add_row(*cells, *([verdicts.get(index, "")] if verdicts else []))
    console = Console()
    if not console.is_terminal:
        console = Console(
            width=220
        )  # a log file has no width of its own; keep every row on one line
    console.print(table)


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1f}"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def write_report(rows: list[Row], folder: Path) -> list[Path]:
    """bench.json, bench.csv and bench.png in `folder`; returns their paths."""
    paths = [folder / f"bench.{suffix}" for suffix in ("json", "csv", "png")]
    write_json(paths[0], rows)
    write_atomically(paths[1], lambda path: _write_csv(rows, path))
    write_atomically(paths[2], lambda path: _plot(rows, path))
    return paths


def _write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(
                json.dumps(row[name]) if isinstance(row[name], dict) else row[name]
                for name in COLUMNS
            )


def _plot(rows: list[Row], path: Path) -> None:
    """One panel per shape, a bar per row; the axis is logarithmic: times span two decades."""
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row["B"], row["H"], row["N"], row["D"]) for row in rows))
    groups = [[r for r in rows if (r["B"], r["H"], r["N"], r["D"]) == shape] for shape in shapes]
    figure, panels = pyplot.subplots(
        len(shapes),
        1,
        squeeze=False,
        figsize=(10, 1.6 + sum(0.34 * len(group) + 0.9 for group in groups)),
        height_ratios=[len(group) + 1.5 for group in groups],
        layout="constrained",
    )
    for panel, shape, group in zip(panels[:, 0], shapes, groups, strict=True):
        ordered = sorted(group, key=lambda row: -row["ms_median"])
        medians = [row["ms_median"] for row in ordered]
        spread = [
            [row["ms_median"] - row["ms_min"] for row in ordered],
            [row["ms_max"] - row["ms_median"] for row in ordered],
        ]
        colours = [
            "#1f6f8b" if row["op"].startswith("sla2_attention") else "#b9c4c9" for row in ordered
        ]
        panel.barh(range(len(ordered)), medians, xerr=spread, color=colours, ecolor="#555555")
        panel.set_yticks(range(len(ordered)), [_label(row) for row in ordered])
        panel.set_xscale("log")
        # Room to the right of the longest bar for its number.
        panel.set_xlim(min(medians) * 0.5, max(row["ms_max"] for row in ordered) * 3.0)
        for position, row in enumerate(ordered):
            panel.annotate(
                f"{_milliseconds(row['ms_median'])} ms",
                (row["ms_max"], position),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_title(
            "B{} H{} N{} D{}".format(*shape) + f" {group[0]['dtype']}", loc="left", fontsize=10
        )
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("milliseconds per call (bar: median, line: lowest to highest)")
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(row: Row) -> str:
    parts = [row["op"]]
    if row["kept"] < 1.0:
        parts.append(f"{row['kept']:.0%} kept")
    if row["quant"] != "none":
        parts.append(row["quant"])
    return ", ".join(parts)
