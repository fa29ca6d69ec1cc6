"""The sections of the numbers page: what each shows of the results, as tables and as plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sla2.cli import bench_paper as paper
from sla2.cli.bench_cells import (
    PRESETS,
    by_machine,
    case_label,
    dense_rate,
    group_by,
    machines,
    median_cell,
    peer_cell,
    percent,
    row_order,
    shape_cell,
    shape_of,
    significant,
    table,
)
from sla2.cli.bench_page_plots import Bar, Bars, Lines, Panel
from sla2.cli.bench_results import (
    BACKWARD,
    FORWARD,
    LINEAR,
    ROUTE,
    SPARSE,
    Results,
    Row,
    Run,
    newest,
)

SHAPE = ("B", "H", "N", "D", "dtype")
CASE = (*SHAPE, "kept", "quant", "path")
SERIES = ("B", "H", "D", "dtype", "kept")  # what lengths of one curve have in common
MIN_LENGTHS = 3  # two lengths make no curve
PAPER_QUANT = "int8_fp8"  # the precision of the paper's kernel
FLASH = "sdpa-flash"
FLASH_STEP = "dense-flash"  # the same kernels, as bench/bench_wan.py names them


class Section(NamedTuple):
    """blocks: paragraphs and tables, none where nothing is measured; make: command to measure."""

    name: str
    title: str
    introduction: str
    make: str
    paper: list[str]
    blocks: list[str]
    panels: list[Panel]


def sections(results: Results, cite: Callable[[Run], str]) -> list[Section]:
    """All sections in their order; `cite` makes a table's cell of a run."""
    return [
        _forward(results, cite),
        _backward(results, cite),
        _stages(results, cite),
        _scaling(results, cite),
        _end_to_end(results, cite),
    ]


# ---- forward and backward ---------------------------------------------------------------------


def _call_table(rows: list[Row], cite: Callable[[Run], str], *, backward: bool = False) -> str:
    peers = sorted({name for row in rows for name in row["peers"]})
    header = ["shape", "kept", "`quant`", "kernels", "run", "SLA2 ms", "C/t", *peers]
    cells = [
        [
            *(shape_cell(row), percent(row["kept"]), row["quant"], row["path"], cite(row["run"])),
            median_cell(row),
            significant(dense_rate(row, row["ms_median"], backward=backward)),
            *(peer_cell(row, name) for name in peers),
        ]
        for row in rows
    ]
    return table(header, cells, left=5)


def _call_panels(rows: list[Row]) -> list[Panel]:
    """Per machine and shape: SLA2's calls, and each peer as the newest run has it."""
    panels: list[Panel] = []
    for machine, own in by_machine(rows):
        for group in group_by(own, lambda row: tuple(row[name] for name in SHAPE)).values():
            bars = [
                Bar(case_label(row), {"call": row["ms_median"]}, (row["ms_min"], row["ms_max"]))
                for row in group
            ]
            peers: dict[tuple[str, float], float] = {}
            for row in sorted(group, key=lambda row: row["run"].date):
                for name, ms in row["peers"].items():
                    peers[name, row["kept"] if name == "flex" else 1.0] = ms
            bars += [
                Bar(f"{name}, {percent(kept)} kept", {"call": ms}, peer=True)
                for (name, kept), ms in sorted(peers.items())
            ]
            panels.append(Bars(f"{machine}: {shape_cell(group[0])}", bars))
    return panels


def _forward(results: Results, cite: Callable[[Run], str]) -> Section:
    series = [id(row) for group in _series(results) for row in group]
    rows = [
        row
        for row in newest([row for row in results.rows if row["op"] == FORWARD], CASE)
        if id(row) not in series or shape_of(row) in PRESETS
    ]
    blocks = []
    for machine, own in by_machine(rows):
        blocks += [f"**{machine}**", _call_table(own, cite)]
    return Section(
        "forward",
        "Forward",
        "One call of `sla2_attention` without gradients.",
        "sla2 bench --shape wan1.3b-480p wan14b-720p --topk 0.03 0.05 0.1 "
        "--quant none int8_fp8 --peers --refcheck --output forward",
        _forward_paper(rows),
        blocks,
        _call_panels(rows),
    )


def _forward_paper(rows: list[Row]) -> list[str]:
    """The paper's kernels; a column for every machine and Wan shape with the paper's baseline."""
    columns: dict[str, tuple[str, list[Row]]] = {}
    comparable = [r for r in rows if r["quant"] == PAPER_QUANT and FLASH in r["peers"]]
    for machine, own in by_machine([row for row in comparable if shape_of(row) in PRESETS]):
        for size, group in group_by(own, shape_of).items():
            columns[f"{machine}, {PRESETS[size]}"] = (machine, group)

    def own_cell(group: list[Row], kernel: paper.Kernel) -> str:
        if kernel == paper.BASELINE:
            row = max(group, key=lambda row: row["run"].date)
            return f"{dense_rate(row, row['peers'][FLASH]):.0f}"
        found = [row for row in group if row["kept"] == kernel.kept]
        if kernel not in paper.SLA2 or not found:
            return ""
        row = min(found, key=lambda row: row["ms_median"])
        ratio = row["peers"][FLASH] / row["ms_median"]
        return f"{dense_rate(row, row['ms_median']):.0f} ({ratio:.1f}x, {row['path']})"

    cells = [
        [
            *(kernel.method, percent(kernel.kept), f"{kernel.tops:.0f}"),
            f"{kernel.tops / paper.BASELINE.tops:.1f}x",
            *(own_cell(group, kernel) for _, group in columns.values()),
        ]
        for kernel in paper.KERNELS
    ]
    header = ["method", "kept", f"C/t, {paper.GPU}", "over FlashAttention-2", *columns]
    blocks = [
        f"The paper's kernels ({paper.TITLE}): C/t in TOPS on one {paper.GPU}, and over "
        "FlashAttention-2 there. To the right, where measured, the fastest "
        f"`{PAPER_QUANT}` rows of this page in the same terms, over `{FLASH}` in their own run.",
        table(header, cells, left=2),
    ]
    measured = {machine: max(group, key=row_order) for machine, group in columns.values()}
    return blocks + [_gpu_difference(name, measured.get(name)) for name in paper.OTHER_GPUS]


def _gpu_difference(machine: str, row: Row | None) -> str:
    """Why speedups on `machine` are not the paper's; row: one with FlashAttention-2 as a peer."""
    there, here = paper.PEAKS[paper.GPU], paper.PEAKS[machine]
    shares = ""
    if row is not None:
        share = paper.BASELINE.tops / there.tflops16
        own_share = dense_rate(row, row["peers"][FLASH]) / here.tflops16
        shares = f"; FlashAttention-2 runs at {100 * share:.0f} % of the nominal bf16 rate there, "
        shares += f"at {100 * own_share:.0f} % here"
    return (
        f"The GPUs differ. {paper.GPU}: {there.tflops16:g} TFLOP/s in bf16, {there.tops8:g} TOPS "
        f"in int8, {there.tb_per_s:g} TB/s of memory; {machine}: {here.tflops16:g}, "
        f"{here.tops8:g} and {here.tb_per_s:g} (NVIDIA's data sheets, dense). int8 is "
        f"{there.tops8 / there.tflops16:.1f} times as fast as bf16 there, "
        f"{here.tops8 / here.tflops16:.1f} times here{shares}. Times over FlashAttention-2 compare "
        "two programs on one GPU; they do not carry over to another."
    )


def _backward(results: Results, cite: Callable[[Run], str]) -> Section:
    rows = newest([row for row in results.rows if row["op"] == BACKWARD], CASE)
    blocks = []
    for machine, own in by_machine(rows):
        blocks += [f"**{machine}**", _call_table(own, cite, backward=True)]
    return Section(
        "backward",
        "Backward",
        "One call of `sla2_attention` and the gradients of q, k, v and alpha: what a training step "
        "pays. C/t counts the seven products of full attention forward and backward.",
        "sla2 bench --backward --shape wan1.3b-480p wan14b-720p --topk 0.03 0.05 0.1 "
        "--quant none int8_fp8 --peers --output backward",
        ["The paper's kernel figures are of the forward pass; there is none to set beside these."],
        blocks,
        _call_panels(rows),
    )


# ---- stages -----------------------------------------------------------------------------------


def _stages(results: Results, cite: Callable[[Run], str]) -> Section:
    blocks, panels = _stage_calls(results, cite)
    more_blocks, more_panels = _kernel_groups(results, cite)
    return Section(
        "stages",
        "Stages",
        "Where the time of a forward call goes.",
        "sla2 bench --stages --shape wan1.3b-480p wan14b-720p --quant none int8_fp8 "
        "--output stages",
        ["The paper's kernel figures are of whole calls; there is none to set beside these."],
        blocks + more_blocks,
        panels + more_panels,
    )


def _stage_calls(results: Results, cite: Callable[[Run], str]) -> tuple[list[str], list[Panel]]:
    """Stages as calls of their own, from the rows of `sla2 bench --stages`."""
    found = {
        (row["run"], row["op"], *(row[name] for name in (*SHAPE, "kept", "quant"))): row
        for row in results.rows
    }

    def same_run(row: Row, op: str, quant: str) -> Row | None:
        return found.get((row["run"], op, *(row[name] for name in (*SHAPE, "kept")), quant))

    rows = newest([row for row in results.rows if row["op"] == SPARSE], CASE)
    blocks: list[str] = []
    panels: list[Panel] = []
    for machine, own in by_machine(rows):
        cells, bars = [], []
        for row in own:
            parts = {
                "`route`": same_run(row, ROUTE, "none"),
                "`complement_linear_attention`": same_run(row, LINEAR, "none"),
                "`block_sparse_attention`": row,
                "`sla2_attention`": same_run(row, FORWARD, row["quant"]),
            }
            cells.append(
                [shape_cell(row), percent(row["kept"]), row["quant"], row["path"], cite(row["run"])]
                + ["" if r is None else significant(r["ms_median"]) for r in parts.values()]
            )
            stages = {
                name.strip("`"): r["ms_median"]
                for name, r in parts.items()
                if r is not None and r["op"] != FORWARD
            }
            bars.append((shape_cell(row), Bar(case_label(row), stages)))
        header = ["shape", "kept", "`quant`", "kernels", "run", *parts]
        blocks += [f"**{machine}**, each stage called by itself", table(header, cells, left=5)]
        for shape in dict.fromkeys(shape for shape, _ in bars):
            title = f"{machine}: {shape}, stages called by themselves"
            panels.append(Bars(title, [bar for name, bar in bars if name == shape]))
    if blocks:
        blocks.insert(
            0,
            "Median milliseconds. `sla2_attention` shares work between the stages: it may take "
            "less than their sum.",
        )
    return blocks, panels


def _kernel_groups(results: Results, cite: Callable[[Run], str]) -> tuple[list[str], list[Panel]]:
    """Kernels inside one call, from `bench/bench_stages.py`."""
    blocks: list[str] = []
    panels: list[Panel] = []
    for machine, own in by_machine(newest(results.cases, CASE)):
        groups = list(dict.fromkeys(entry["group"] for case in own for entry in case["sums"]))
        cells, bars = [], []
        for case in own:
            sums = {entry["group"]: entry for entry in case["sums"] if entry["ms"] > 0}
            cells.append(
                [
                    *(shape_cell(case), percent(case["kept"]), case["quant"], case["path"]),
                    *(cite(case["run"]), significant(case["whole_ms"]["median"])),
                    *(_floor_cell(sums.get(group)) for group in groups),
                ]
            )
            single = {
                name: e["ms"] for name, e in sums.items() if "+" not in name and name != "all"
            }
            bars.append(Bar(f"{shape_cell(case)}, {case_label(case)}", single))
        header = ["shape", "kept", "`quant`", "kernels", "run", "whole call", *groups]
        blocks += [
            f"**{machine}**, kernels inside one call: mean milliseconds with a warm cache (the "
            "least that bytes and operations allow); the whole call with a cold one",
            table(header, cells, left=5),
        ]
        panels.append(Bars(f"{machine}: kernels inside one call", bars))
    return blocks, panels


def _floor_cell(entry: Row | None) -> str:
    if entry is None:
        return ""
    return f"{significant(entry['ms'])} ({significant(entry['floor_ms'])})"


# ---- scaling ----------------------------------------------------------------------------------


def _series(results: Results) -> list[list[Row]]:
    """The forward rows of runs that time enough lengths of one shape, the oldest run first."""
    rows = [row for row in results.rows if row["op"] == FORWARD]
    groups = group_by(rows, lambda row: (row["run"], *(row[name] for name in SERIES)))
    series = [g for g in groups.values() if len({row["N"] for row in g}) >= MIN_LENGTHS]
    return sorted(series, key=lambda group: group[0]["run"].date)


def _newest_series(results: Results) -> list[list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for group in _series(results):
        first, paths = group[0], sorted({row["path"] for row in group})
        case = (first["run"].machine, *(first[name] for name in SERIES), *paths)
        found[case] = group
    return [sorted(found[key], key=row_order) for key in sorted(found)]


def _scaling(results: Results, cite: Callable[[Run], str]) -> Section:
    blocks: list[str] = []
    panels: list[Panel] = []
    for group in _newest_series(results):
        first = group[0]
        title = "{}: B{B} H{H} D{D} {dtype}, ".format(first["run"].machine, **first)
        title += f"{percent(first['kept'])} kept"
        lines: dict[str, dict[int, float]] = {}
        for row in group:
            label = f"SLA2, {row['quant']}, {row['path']}"
            lines.setdefault(label, {})[row["N"]] = row["ms_median"]
        for name in sorted({name for row in group for name in row["peers"]}):
            lines[name] = {row["N"]: row["peers"][name] for row in group if name in row["peers"]}
        blocks += [f"**{title}**", _call_table(group, cite)]
        panels.append(Lines(title, lines))
    return Section(
        "scaling",
        "Scaling",
        "The forward call over the number of tokens, all lengths in one run.",
        "sla2 bench --shape 1x12x8192x128 1x12x16384x128 1x12x32768x128 1x12x65536x128 "
        "1x12x131072x128 --quant none int8_fp8 --peers sdpa-cudnn sdpa-flash --output scaling",
        ["The paper's kernel figures do not vary the length; there is none to set beside these."],
        blocks,
        panels,
    )


# ---- end to end -------------------------------------------------------------------------------

STEP_CASE = ("model", "compile", "attention", "kept", "quant", "path")


def _end_to_end(results: Results, cite: Callable[[Run], str]) -> Section:
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
