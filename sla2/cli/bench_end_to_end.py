"""The section of the numbers page on a whole model: one denoising step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sla2.cli import bench_paper as paper
from sla2.cli.bench_cells import group_by, machines, median_cell, percent, significant, table
from sla2.cli.bench_layout import Section
from sla2.cli.bench_page_plots import Bar, Bars, Panel
from sla2.cli.bench_results import Results, Row, Run, newest

STEP_CASE = ("model", "compile", "attention", "kept", "quant", "path")
FLASH_STEP = "dense-flash"  # FlashAttention-2, as bench/bench_wan.py names it


def end_to_end(results: Results, cite: Callable[[Run], str]) -> Section:
    groups = group_by(newest(results.steps, STEP_CASE), lambda step: step["run"].machine)
    blocks: list[str] = []
    panels: list[Panel] = []
    for machine in machines(groups):
        own = sorted(groups[machine], key=_step_order)
        blocks += [f"**{machine}**", _step_table(own, results.steps, cite)]
        for group in group_by(own, lambda step: (step["model"], step["compile"])).values():
            compiled = ", compiled" if group[0]["compile"] else ""
            title = f"{machine}: {_model(group[0])}, one denoising step{compiled}"
            panels.append(Bars(title, [_step_bar(step) for step in group]))
    return Section(
        "end_to_end",
        "End to end",
        "One denoising step of a whole model with classifier-free guidance, weights random; "
        "attention's share is of a profile of one more step.",
        "python bench/bench_wan.py --size 1.3b --compile --output end_to_end\n"
        "python bench/bench_wan.py --size 14b --compile --output end_to_end",
        _end_to_end_paper(groups, results.steps),
        blocks,
        panels,
    )


def _model(step: Row) -> str:
    found = paper.END_TO_END.get(step["model"])
    return found.title if found else f"Wan2.1 {step['model']}"


def _step_order(step: Row) -> tuple[Any, ...]:
    own, models = step["attention"] == "sla2", [*paper.END_TO_END, step["model"]]
    names = ("attention", "kept", "quant", "path")
    return models.index(step["model"]), step["compile"], own, *(str(step[n]) for n in names)


def _step_label(step: Row) -> str:
    if step["attention"] != "sla2":
        return str(step["attention"])
    return f"SLA2, {percent(step['kept'])} kept, {step['quant']}, {step['path']}"


def _step_parts(step: Row) -> dict[str, float]:
    """Milliseconds of attention and of the rest; none without a profile."""
    if step["profile"] is None:
        return {}
    own, cross = (step["profile"][f"{name}_attention_ms"] for name in ("self", "cross"))
    rest = max(0.0, step["ms_median"] - own - cross)  # a CPU's profiler slows the step it times
    return {"rest": rest, "cross-attention": cross, "self-attention": own}


def _dense_ms(step: Row, recorded: list[Row], attention: str) -> float | None:
    """The same model with other attention in the same run."""

    def kind(row: Row) -> tuple[Any, ...]:
        return row["run"], row["model"], row["compile"]

    same = (r for r in recorded if r["attention"] == attention and kind(r) == kind(step))
    return next((row["ms_median"] for row in same), None)


def _step_table(steps: list[Row], recorded: list[Row], cite: Callable[[Run], str]) -> str:
    peers = sorted({step["attention"] for step in steps} - {"sla2"})
    parts = ("self-attention", "cross-attention", "rest")
    cells = []
    for step in steps:
        peak, found = step["peak_bytes"], _step_parts(step)
        ratios = [_dense_ms(step, recorded, peer) for peer in peers]
        cells.append(
            [
                *(_model(step), _step_label(step), "yes" if step["compile"] else "no"),
                *(cite(step["run"]), median_cell(step)),
                *(significant(found[name]) if name in found else "" for name in parts),
                "" if peak is None else f"{peak / 2**30:.1f}",
                *("" if ms is None else f"{ms / step['ms_median']:.2f}x" for ms in ratios),
            ]
        )
    header = ["model", "attention", "compiled", "run", "step ms", *parts, "peak GiB"]
    return table([*header, *(f"over {peer}" for peer in peers)], cells, left=4)


def _step_bar(step: Row) -> Bar:
    parts = _step_parts(step) or {"step": step["ms_median"]}
    return Bar(_step_label(step), parts, (step["ms_min"], step["ms_max"]))


def _end_to_end_paper(groups: dict[str, list[Row]], recorded: list[Row]) -> list[str]:
    cells = []
    for model, found in paper.END_TO_END.items():
        own = []
        for machine in machines(groups):
            ratios = [
                (dense / step["ms_median"], _step_label(step))
                for step in groups[machine]
                if step["model"] == model and step["attention"] == "sla2" and not step["compile"]
                if (dense := _dense_ms(step, recorded, FLASH_STEP)) is not None
            ]
            own.append("{:.2f}x ({})".format(*max(ratios)) if ratios else "")
        seconds = [f"{value:g}" for value in (found.other_s, found.dense_s, found.sla2_s)]
        cells.append([found.title, *seconds, f"{found.speedup:.2f}x", *own])
    header = ["model", "other s", "FlashAttention-2 s", "SLA2 s", "speedup"]
    return [
        f"The paper's videos ({paper.TITLE}): seconds of a whole generation on one {paper.GPU}. "
        "A step here and a generation there compare as speedups over FlashAttention-2, and the "
        "GPUs differ as said under [Forward](#forward).",
        table([*header, *(f"{machine}, a step" for machine in machines(groups))], cells, left=1),
    ]
