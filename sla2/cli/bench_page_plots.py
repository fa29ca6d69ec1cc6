"""The plots of the numbers page: bars of times, in parts or whole, and times over the length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from PIL import Image, UnidentifiedImageError

from sla2.cli.bench_cells import significant

matplotlib.use("Agg")  # files only: no display is needed

COLOURS = ("#0b5d7a", "#3fa7c4", "#e3a857", "#c2571a", "#7a8f5a", "#6d5a8f")
PEER_COLOUR = "#b9c4c9"
DPI = 110


class Bar(NamedTuple):
    """parts: name -> ms, drawn one after the other; spread: lowest and highest ms of the whole."""

    label: str
    parts: dict[str, float]
    spread: tuple[float, float] | None = None
    peer: bool = False


class Bars(NamedTuple):
    """One panel of bars; logarithmic where every bar has one part."""

    title: str
    bars: list[Bar]

    @property
    def part_names(self) -> list[str]:
        return list(dict.fromkeys(name for bar in self.bars for name in bar.parts))

    @property
    def has_legend(self) -> bool:
        return len(self.part_names) > 1


class Lines(NamedTuple):
    """One panel of times over the length: label -> N -> ms."""

    title: str
    lines: dict[str, dict[int, float]]


Panel = Bars | Lines


def digest(panels: list[Panel]) -> str:
    """What a plot says it shows, kept in the PNG: its bytes depend on matplotlib and its fonts."""
    text = json.dumps([[type(panel).__name__, *panel] for panel in panels])
    return hashlib.sha256(text.encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that the PNG was written with; None where there is no such file."""
    try:
        with Image.open(path) as image:
            return image.info.get("Description")
    except (FileNotFoundError, UnidentifiedImageError):
        return None


def draw(panels: list[Panel], path: Path) -> None:
    from matplotlib import pyplot

    heights = [_height(panel) for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        squeeze=False,
        figsize=(9.5, sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        if isinstance(panel, Bars):
            _draw_bars(panel, axis)
        else:
            _draw_lines(panel, axis)
        legend_above = isinstance(panel, Bars) and panel.has_legend
        axis.set_title(panel.title, loc="left", fontsize=10, pad=22 if legend_above else 6)
        axis.spines[["top", "right"]].set_visible(False)
    # Without matplotlib's version the same matplotlib writes the same bytes.
    figure.savefig(path, dpi=DPI, metadata={"Software": None, "Description": digest(panels)})
    pyplot.close(figure)


def _height(panel: Panel) -> float:
    """In inches."""
    if isinstance(panel, Lines):
        return 4.5
    return 1.0 + 0.24 * len(panel.bars) + (0.25 if panel.has_legend else 0.0)


def _draw_bars(panel: Bars, axis: Any) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = panel.part_names
    for position, bar in enumerate(reversed(panel.bars)):
        left = 0.0
        for name, ms in bar.parts.items():
            colour = PEER_COLOUR if bar.peer else COLOURS[names.index(name) % len(COLOURS)]
            axis.barh(position, ms, left=left, height=0.7, color=colour)
            left += ms
        low, high = bar.spread or (left, left)
        axis.plot([low, high], [position, position], color="#555555", linewidth=1)
        axis.annotate(
            f"{significant(left)} ms",
            (high, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axis.set_yticks(range(len(panel.bars)), [bar.label for bar in reversed(panel.bars)], fontsize=8)
    wholes = [sum(bar.parts.values()) for bar in panel.bars]
    longest = max(max(wholes), *(bar.spread[1] for bar in panel.bars if bar.spread), 0.0)
    if not panel.has_legend:
        axis.set_xscale("log")  # times span two decades
        axis.set_xlim(min(wholes) * 0.5, longest * 2.0)  # room for the longest bar's number
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(0, longest * 1.15)
        axis.legend(
            handles=[Patch(color=COLOURS[i % len(COLOURS)], label=n) for i, n in enumerate(names)],
            loc="lower left",
            bbox_to_anchor=(0.0, 0.98),  # between the title and the bars
            ncols=len(names),
            frameon=False,
            fontsize=8,
        )
    axis.set_xlabel("milliseconds", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)


def _draw_lines(panel: Lines, axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    lengths = sorted({n for points in panel.lines.values() for n in points})
    for index, (label, points) in enumerate(panel.lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(list(points), list(points.values()), "o-", color=colour, label=label)
        length, ms = list(points.items())[-1]
        axis.annotate(
            significant(ms),
            (length, ms),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{n / 1024:.3g}k" for n in lengths])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.3)  # room for the last points' numbers
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_xlabel("tokens N (k = 1024)")
    axis.set_ylabel("milliseconds per call, routing included")
    axis.legend(frameon=False)
