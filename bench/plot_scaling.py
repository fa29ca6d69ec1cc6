"""Time over sequence length from the rows of `sla2 bench`, and where SLA2 overtakes cuDNN.

    sla2 bench --shape 1x12x8192x128 1x12x16384x128 1x12x32768x128 1x12x65536x128 1x12x131072x128 \\
      --quant int8_fp8 none --peers sdpa-cudnn sdpa-flash --output scaling
    python bench/plot_scaling.py scaling/bench.json scaling.png

The rows must be of one GPU, dtype, B, H, D and share of blocks kept; --kept chooses where there are
more. Between two lengths the crossover is taken on straight lines through the logarithms.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

from sla2.cli.errors import CliError
from sla2.files import write_atomically

matplotlib.use("Agg")  # a file only: no display is needed

# (op, quant) of a row -> its label and colour; in this order in the legend
LINES = {
    ("sla2_attention", "int8_fp8"): ("SLA2, int8_fp8", "#0b5d7a"),
    ("sla2_attention", "none"): ("SLA2, 16 bit", "#3fa7c4"),
    ("sdpa-cudnn", "none"): ("dense, cuDNN", "#c2571a"),
    ("sdpa-flash", "none"): ("dense, FlashAttention-2", "#e3a857"),
}
PEER = ("sdpa-cudnn", "none")
# What a row must have.
COLUMNS = ("gpu", "B", "N", "H", "D", "dtype", "kept", "ms_median")

Series = dict[tuple[str, str], dict[int, float]]


# ---- reading ----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(f"cannot read {path}: {error}") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise CliError(f"{path} is no list of rows; give the bench.json of sla2 bench --output")
    chosen = [row for row in content if (row.get("op"), row.get("quant")) in LINES]
    missing = sorted({name for row in chosen for name in COLUMNS if name not in row})
    if missing:
        raise CliError(f"{path} has rows without {', '.join(missing)}")
    return chosen


def common(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """The one value of each column; several would put unlike measurements on one line."""
    values = {name: sorted({str(row[name]) for row in rows}) for name in names}
    several = {name: found for name, found in values.items() if len(found) > 1}
    if several:
        raise CliError("; ".join(f"rows of {n} {', '.join(v)}" for n, v in several.items()))
    return {name: found[0] for name, found in values.items()}


def collect(rows: list[dict[str, Any]]) -> Series:
    """(op, quant) -> N -> median milliseconds."""
    series: Series = {}
    for row in rows:
        series.setdefault((row["op"], row["quant"]), {})[row["N"]] = row["ms_median"]
    return {key: dict(sorted(series[key].items())) for key in LINES if key in series}


# ---- what is shown ----------------------------------------------------------------------------


def crossover(own: dict[int, float], peer: dict[int, float]) -> str:
    """In words: from which N on `own` takes less time than `peer`."""
    lengths = sorted(set(own) & set(peer))
    if not lengths:
        return "no common length"
    gains = [math.log(peer[n] / own[n]) for n in lengths]
    if gains[-1] <= 0:
        return f"slower at N {lengths[-1]}, the longest"
    last_slower = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last_slower is None:
        return f"faster at every length from N {lengths[0]} on ({math.exp(gains[0]):.2f}x there)"
    low, high = lengths[last_slower], lengths[last_slower + 1]
    share = -gains[last_slower] / (gains[last_slower + 1] - gains[last_slower])
    return f"faster from N {low * (high / low) ** share:.0f} on"


def draw(series: Series, title: str, path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for key, points in series.items():
        label, colour = LINES[key]
        axes.plot(list(points), list(points.values()), "o-", color=colour, label=label)
        length, milliseconds = list(points.items())[-1]
        axes.annotate(
            f"{milliseconds:.3g}",
            (length, milliseconds),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({n for points in series.values() for n in points})
    axes.set_xticks(lengths, [f"{n / 1024:.3g}k" for n in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.3)  # room for the last points' numbers
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens N (k = 1024)")
    axes.set_ylabel("milliseconds per forward call, routing included")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---- command line -----------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    rows = read_rows(options.rows)
    own = [row for row in rows if row["op"] == "sla2_attention"]
    if options.kept is not None:
        own = [row for row in own if row["kept"] == options.kept]
    if not own:
        raise CliError(f"{options.rows} has no such rows of sla2_attention")
    peers = [row for row in rows if row["op"] != "sla2_attention"]
    share = common(own, ("kept",))["kept"]
    shape = common(own + peers, ("gpu", "B", "H", "D", "dtype"))
    series = collect(own + peers)
    title = "{gpu}, B {B}, {H} heads, D {D}, {dtype}, ".format(**shape) + f"{share} kept"
    options.image.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.image, lambda path: draw(series, title, path))
    print(f"wrote {options.image}")
    for key, points in series.items():
        if key[0] == "sla2_attention" and PEER in series:
            print(f"{LINES[key][0]} against cuDNN: {crossover(points, series[PEER])}")


def main(argv: list[str] | None = None) -> int:
    """0, or 2 where a file cannot be used."""
    parser = argparse.ArgumentParser(description="Draw the time over N of sla2 bench rows.")
    parser.add_argument("rows", type=Path, help="bench.json of sla2 bench --output")
    parser.add_argument("image", type=Path, help="the PNG to write")
    parser.add_argument("--kept", type=float, help="share of blocks kept, where rows have several")
    try:
        run(parser.parse_args(argv))
    except CliError as error:
        print(f"plot_scaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
