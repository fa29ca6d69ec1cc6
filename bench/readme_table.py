"""The measured numbers of README.md, written from bench/results/*.json or checked against them.

    python bench/readme_table.py            # rewrite the block between the two markers
    python bench/readme_table.py --check    # change nothing; exit code 1 where the block is stale

A file of bench/results is a benchmark where it is a list of rows, as `sla2 bench --output` and
`bench/bench_cpu.py --output` write them. Other reports may lie beside them: objects (`sla2 selftest
--json`) and lists of kernel times are passed over. Of rows that measure the same thing on the same
device, the newest counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sla2.cli.parser import SHAPES

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
INTRODUCTION = (
    "Written by `python bench/readme_table.py` from `bench/results/*.json`. Milliseconds per call, "
    "routing included:\nmedian (lowest to highest); the other columns are medians of other "
    "attention in the same run, on the same inputs; flex is\nFlexAttention with the block map "
    "given, the sparse branch alone, without routing or a linear branch. Of a GPU the\nshapes of "
    "models are here, with the kernels that a call takes; other lengths, head dimensions and "
    "kernels are in\n[docs/benchmarks.md](docs/benchmarks.md)."
)
NOTHING = (
    "No measurement of this version is recorded there yet; `sla2 bench --peers --output "
    "bench/results` records one."
)
OPERATIONS = {"sla2_attention": "forward", "sla2_attention_fwd_bwd": "forward + backward"}
QUANT_ORDER = ("none", "int8_fp16", "int8_fp8")
NUMBERS = ("B", "H", "N", "D", "kept", "ms_median", "ms_min", "ms_max")
FIELDS = (
    *("gpu", "driver", "torch", "cuda", "commit", "date", "op", "quant", "path", "peers"),
    *NUMBERS,
)

Row = dict[str, Any]


class BadResults(Exception):
    """A file of measurements, or the README's markers, that cannot be used; says which and why."""


# ---- reading ----------------------------------------------------------------------------------


def read_rows(folder: Path) -> list[Row]:
    """The rows of whole operations in all benchmarks of `folder`, each with its "file"."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadResults(f"{path} is not JSON: {error}") from error
        if not isinstance(content, list):
            continue
        for index, row in enumerate(content):
            if isinstance(row, dict) and ("kernel" in row or row.get("op") == "wan_step"):
                continue
            _check_row(row, f"{path}, row {index}")
            if row["op"] in OPERATIONS:
                rows.append({**row, "file": path.name})
    return rows


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise BadResults(f"{where} is no object but {type(row).__name__}")
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise BadResults(f"{where} lacks {', '.join(missing)}")
    for name in NUMBERS:
        if isinstance(row[name], bool) or not isinstance(row[name], (int, float)):
            raise BadResults(f"{where}: {name} is {row[name]!r}, a number is needed")
    if not isinstance(row["peers"], dict):
        raise BadResults(f"{where}: peers is {row['peers']!r}, an object name: ms is needed")


def machine(row: Row) -> str:
    """The GPU's name, or the processor's for a row of the CPU path."""
    return str(row["gpu"] or row.get("cpu") or "CPU")


def newest(rows: list[Row]) -> list[Row]:
    """One row per machine and case: the one with the latest date."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda r: str(r["date"])):
        names = ("op", "B", "H", "N", "D", "kept", "quant", "path")
        case = (machine(row), row.get("dtype"), *(row[name] for name in names))
        found[case] = row
    return list(found.values())


def chosen(rows: list[Row]) -> list[Row]:
    """Of one machine's rows the shapes of models, if there are any, and the portable kernels only
    where no others were measured."""
    models = [r for r in rows if tuple(r[x] for x in "BHND") in SHAPES.values()] or rows

    def case(row: Row) -> tuple[Any, ...]:
        return row.get("dtype"), *(row[x] for x in ("op", "B", "H", "N", "D", "kept", "quant"))

    served = {case(row) for row in models if row["path"] != "portable"}
    return [row for row in models if row["path"] != "portable" or case(row) not in served]


# ---- writing ----------------------------------------------------------------------------------


def _order(row: Row) -> tuple[Any, ...]:
    quant = QUANT_ORDER.index(row["quant"]) if row["quant"] in QUANT_ORDER else len(QUANT_ORDER)
    operation = list(OPERATIONS).index(row["op"])
    size = row["B"] * row["H"] * row["N"] * row["D"]
    rest = (row["kept"], quant, str(row.get("dtype")), str(row["path"]))
    return operation, size, row["N"], *rest


def milliseconds(value: float) -> str:
    """Three significant digits from 1 ms on."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _table(rows: list[Row]) -> list[str]:
    peers = sorted({name for row in rows for name in row["peers"]})
    header = ["", "shape", "kept", "`quant`", "kernels", "SLA2", *peers]
    lines = [_cells(header), _cells(["---"] * 5 + ["---:"] * (1 + len(peers)))]
    for row in sorted(rows, key=_order):
        spread = f"{milliseconds(row['ms_min'])} to {milliseconds(row['ms_max'])}"
        shape = f"B{row['B']} H{row['H']} N{row['N']} D{row['D']} {row.get('dtype') or ''}"
        times = [row["peers"].get(name) for name in peers]
        cells = [OPERATIONS[row["op"]], shape.strip(), f"{100 * row['kept']:g} %", row["quant"]]
        cells += [row["path"], f"{milliseconds(row['ms_median'])} ({spread})"]
        lines.append(_cells(cells + ["" if t is None else milliseconds(t) for t in times]))
    return lines


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _sources(rows: list[Row]) -> list[str]:
    """A line per command: with what it was run."""
    lines = []
    for row in sorted(rows, key=lambda r: (str(r["date"]), r["file"])):
        command = row.get("command")
        versions = [f"commit {str(row['commit'])[:12]}", str(row["date"])[:10]]
        for name, title in (("torch", "torch"), ("cuda", "CUDA"), ("driver", "driver")):
            if row[name]:
                versions.append(f"{title} {row[name]}")
        what = f"`{command}`, " if command else ""
        line = f"- {what}`bench/results/{row['file']}`: {', '.join(versions)}"
        if line not in lines:
            lines.append(line)
    return lines


def block(rows: list[Row]) -> str:
    """The text between the markers."""
    rows = newest(rows)
    parts = [INTRODUCTION]
    if not rows:
        parts.append(NOTHING)
    for name in sorted({machine(row) for row in rows}):
        own = chosen([row for row in rows if machine(row) == name])
        parts += [f"**{name}**", "\n".join(_table(own)), "\n".join(_sources(own))]
    return "\n\n".join(parts)


def updated(text: str, content: str) -> str:
    """`text` with `content` between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BadResults(f"the README must hold {BEGIN} and after it {END}, each once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


# ---- command line -----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """0, 1 where --check finds a stale block, 2 where a file cannot be used."""
    parser = argparse.ArgumentParser(
        description="Write the measured numbers of README.md from bench/results/*.json."
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(argv)
    try:
        text = options.readme.read_text(encoding="utf-8")
        wanted = updated(text, block(read_rows(options.results)))
    except (BadResults, OSError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    if wanted == text:
        return 0
    if options.check:
        print(
            f"readme_table: the measured block of {options.readme} does not show the results in "
            f"{options.results}; run: python bench/readme_table.py",
            file=sys.stderr,
        )
        return 1
    options.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
