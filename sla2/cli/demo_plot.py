"""The demo's picture: frame, error map, block map of a head, alpha, and the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray

from sla2.cli.clip import Clip
from sla2.cli.tokens import FRAMES_PER_TOKEN
from sla2.constants import BLOCK_K, BLOCK_Q

matplotlib.use("Agg")  # files only: no display is needed

INK, GREY, ACCENT, DENSE = "#22313a", "#9aa7ad", "#1f6f8b", "#b9c4c9"


class Picture(NamedTuple):
    """What is drawn."""

    clip: Clip
    grid: tuple[int, int, int]
    head: int
    blocks: NDArray[np.bool_]  # (T_m, T_n) of the head
    alpha: NDArray[np.float32]  # (H, T_m)
    errors: NDArray[np.float32]  # (T, H, W), relative error of each token
    summary: dict[str, Any]


def draw(picture: Picture, path: Path) -> None:
    """Writes the picture as PNG."""
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": GREY}):
        figure = pyplot.figure(figsize=(13, 9.8), layout="constrained")
        rows: Any = figure.subfigures(2, 1, height_ratios=[4.0, 5.4])
        frame, errors = rows[0].subplots(1, 2)
        _draw_frame(frame, errors, picture)
        columns: Any = rows[1].subfigures(1, 2, width_ratios=[1.0, 1.05])
        _draw_blocks(columns[0].subplots(), picture)
        alpha, times = columns[1].subplots(2, 1, height_ratios=[1.5, 1.2])
        _draw_alpha(alpha, picture)
        _draw_times(times, picture)
        figure.suptitle(_title(picture), fontsize=11, color=INK)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def milliseconds(value: float) -> str:
    """Four significant digits or whole milliseconds."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _title(picture: Picture) -> str:
    summary = picture.summary
    return (
        f"SLA2 on {summary['tokens']} tokens, {summary['heads']} heads of {summary['head_dim']}: "
        f"{summary['sparsity']:.1%} sparsity, quant {summary['quant']}, {summary['device']}"
    )


def _draw_frame(left: Any, right: Any, picture: Picture) -> None:
    """The frame in the middle of the clip, and the error of each of its tokens over it."""
    token_frame = picture.grid[0] // 2
    pixels = picture.clip[FRAMES_PER_TOKEN * token_frame]
    left.imshow(pixels)
    left.set_title(f"frame {FRAMES_PER_TOKEN * token_frame + 1} of {len(picture.clip)}", loc="left")
    grey = pixels.mean(axis=2)
    right.imshow(grey, cmap="gray", vmin=0, vmax=255)
    # The scale covers the whole clip, so that one outlier does not flatten the map.
    top = float(np.quantile(picture.errors, 0.99)) or 1.0
    overlay = right.imshow(
        picture.errors[token_frame],
        cmap="inferno",
        alpha=0.72,
        vmin=0.0,
        vmax=top,
        extent=(-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5),
        interpolation="nearest",
    )
    mean = float(picture.errors[token_frame].mean())
    right.set_title(
        f"error against full attention, per token (mean {mean:.2f})",
        loc="left",
    )
    bar = right.figure.colorbar(overlay, ax=right, shrink=0.85, pad=0.01)
    bar.set_label("relative error")
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])


def _draw_blocks(axes: Any, picture: Picture) -> None:
    """Selected pairs of blocks; both axes in video frames, because tokens are in raster order."""
    frames, height, width = picture.grid
    tokens = height * width
    rows, columns = picture.blocks.shape
    extent = (0.0, columns * BLOCK_K / tokens, rows * BLOCK_Q / tokens, 0.0)
    from matplotlib.colors import ListedColormap

    axes.imshow(
        _thicken(picture.blocks),
        cmap=ListedColormap(["#f3f5f6", ACCENT]),
        extent=extent,
        interpolation="nearest",
        aspect="equal",
    )
    step = max(1, frames // 7)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(
            [f + 0.5 for f in range(0, frames, step)], [str(f) for f in range(0, frames, step)]
        )
    for edge in range(1, frames):
        axes.axvline(edge, color="white", linewidth=0.4)
        axes.axhline(edge, color="white", linewidth=0.4)
    axes.set_xlim(0, frames)
    axes.set_ylim(frames, 0)
    axes.tick_params(length=0)
    kept = int(picture.blocks.sum(1).max())
    axes.set_title(
        f"block map of head {picture.head}: {kept} of {columns} key blocks per row", loc="left"
    )
    axes.set_xlabel("key block, by its token frame")
    axes.set_ylabel("query block, by its token frame")


def _thicken(blocks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Nearest-neighbour scaling to about 1000 pixels, so that single blocks do not vanish."""
    factor = max(1, 1024 // max(blocks.shape))
    return np.kron(blocks, np.ones((2 * factor, factor), dtype=bool)).astype(np.uint8)


def _draw_alpha(axes: Any, picture: Picture) -> None:
    frames, height, width = picture.grid
    position = (np.arange(picture.alpha.shape[1]) + 0.5) * BLOCK_Q / (height * width)
    for head, values in enumerate(picture.alpha):
        if head != picture.head:
            axes.plot(position, values, color=GREY, linewidth=0.7, alpha=0.7)
    axes.plot(position, picture.alpha[picture.head], color=ACCENT, linewidth=1.6)
    axes.set_xlim(0, frames)
    axes.set_ylim(0, 1)
    axes.set_title(
        f"alpha, the sparse branch's weight: head {picture.head} (others grey)", loc="left"
    )
    axes.set_xlabel("query block, by its token frame")
    step = max(1, frames // 7)
    axes.set_xticks(range(0, frames + 1, step))
    axes.grid(axis="y", color="#e3e8ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_times(axes: Any, picture: Picture) -> None:
    results = picture.summary["results"][::-1]
    times = [result["ms_median"] for result in results]
    colours = [DENSE if result["rel_l2"] is None else ACCENT for result in results]
    axes.barh(range(len(results)), times, color=colours, height=0.36)
    axes.set_yticks([])
    for position, result in enumerate(results):
        text = f"{result['name']}: {milliseconds(result['ms_median'])} ms"
        if result["rel_l2"] is not None:
            text += f", {result['speedup']:.1f}x, relative L2 error {result['rel_l2']:.2f}"
        axes.annotate(
            text,
            (0, position + 0.2),
            xytext=(1, 2),
            textcoords="offset points",
            va="bottom",
            color=INK,
        )
    axes.set_ylim(-0.4, len(results) - 0.3)
    axes.set_xlabel("milliseconds per call")
    axes.spines[["top", "right", "left"]].set_visible(False)
