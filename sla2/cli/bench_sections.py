"""The sections of the numbers page: what each shows of the results, as tables and as plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sla2.cli import bench_paper as paper
from sla2.cli.bench_cells import (
    PRESETS,
    by_machine,
    case_label,
    dense_rate,
    group_by,
    median_cell,
    peer_cell,
    percent,
    row_order,
    shape_cell,
    shape_of,
    significant,
    table,
)
from sla2.cli.bench_end_to_end import end_to_end
from sla2.cli.bench_layout import Section
from sla2.cli.bench_page_plots import Bar, Bars, Lines, Panel
from sla2.cli.bench_results import (
    BACKWARD,
    FORWARD,
    LINEAR,
    ROUTE,
    SPARSE,
    STAGE1_GRADIENTS,
    STAGE1_INPUTS,
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
STAGE1_CASE = (*CASE, "inputs", "gradients")
FORWARD_ONLY = (
    "The paper's kernel figures are of the forward pass; there is none to set beside these."
)


def sections(results: Results, cite: Callable[[Run], str]) -> list[Section]:
    """All sections in their order; `cite` makes a table's cell of a run."""
    return [
        _forward(results, cite),
        _backward(results, cite),
        _stage1(results, cite),
        _stages(results, cite),
        _scaling(results, cite),
        end_to_end(results, cite),
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
            _extra_memory(row),
        ]
        for row in rows
    ]
    return table([*header, "extra / qkv"], cells, left=5)


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
        "One call of `sla2_attention` without gradients. `extra / qkv` is the most memory that a "
        "call holds beyond what was there before it, its output included, over that of q, k and v.",
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
        "pays. C/t counts the seven products of full attention forward and backward. `extra / qkv` "
        "includes the gradients.",
        "sla2 bench --backward --shape wan1.3b-480p wan14b-720p --topk 0.03 0.05 0.1 "
        "--quant none int8_fp8 --peers --output backward",
        [FORWARD_ONLY],
        blocks,
        _call_panels(rows),
    )


# ---- stage 1 ----------------------------------------------------------------------------------


def _stage1(results: Results, cite: Callable[[Run], str]) -> Section:
    def kind(row: Row) -> tuple[int, int]:
        inputs, gradients = row["inputs"], row["gradients"]
        return STAGE1_INPUTS.index(inputs), STAGE1_GRADIENTS.index(gradients)

    rows = sorted(newest(results.stage1, STAGE1_CASE), key=kind)
    blocks = []
    for machine, own in by_machine(rows):
        blocks += [f"**{machine}**", _stage1_table(own, cite)]
    return Section(
        "stage1",
        "Stage 1",
        "One step of stage 1: SLA2 in soft mode forward and backward, with the gradients of the "
        "projections and alpha (`router`) or those of q, k and v, too (`all`); other attention is "
        "forward and backward with the gradients of q, k and v. The kernels visit the listed "
        "blocks, those whose mask is at least 2^-16: `clip` is the demo's video, and `gaussian` "
        "noise, where nothing is masked, the worst case. `extra / qkv` is the most memory that a "
        "step holds beyond what was there before it, over that of q, k and v.",
        "python bench/bench_stage1.py --output stage1",
        [FORWARD_ONLY],
        blocks,
        _stage1_panels(rows),
    )


def _stage1_table(rows: list[Row], cite: Callable[[Run], str]) -> str:
    peers = sorted({name for row in rows for name in row["peers"]})
    header = ["shape", "inputs", "gradients", "kernels", "run", "H", "N", "kept", "listed"]
    cells = [
        [
            *(shape_cell(row), row["inputs"], row["gradients"], row["path"], cite(row["run"])),
            *(str(row["H"]), str(row["N"]), percent(row["kept"]), f"{100 * row['listed']:.1f} %"),
            median_cell(row),
            *(peer_cell(row, name) for name in peers),
            _extra_memory(row),
        ]
        for row in rows
    ]
    return table([*header, "SLA2 ms", *peers, "extra / qkv"], cells, left=5)


def _extra_memory(row: Row) -> str:
    """Empty for a CPU, where it is not measured, and in older files."""
    extra = row.get("peak_extra_bytes")
    if extra is None:
        return ""
    element = 4 if row["dtype"] == "float32" else 2
    qkv = 3 * element * row["B"] * row["H"] * row["N"] * row["D"]
    return f"{extra / qkv:.2f}"


def _stage1_label(row: Row) -> str:
    return f"{row['inputs']}, {row['gradients']}, {percent(row['kept'])} kept, {row['path']}"


def _stage1_panels(rows: list[Row]) -> list[Panel]:
    """Per machine and shape: SLA2's steps, and each peer as the newest run has it."""
    panels: list[Panel] = []
    for machine, own in by_machine(rows):
        for group in group_by(own, lambda row: tuple(row[name] for name in SHAPE)).values():
            bars = [
                Bar(_stage1_label(row), {"step": row["ms_median"]}, (row["ms_min"], row["ms_max"]))
                for row in group
            ]
            peers: dict[tuple[str, str], float] = {}
            for row in sorted(group, key=lambda row: row["run"].date):
                for name, ms in row["peers"].items():
                    peers[row["inputs"], name] = ms
            bars += [
                Bar(f"{inputs}, {name}", {"step": ms}, peer=True)
                for (inputs, name), ms in sorted(peers.items())
            ]
            panels.append(Bars(f"{machine}: {shape_cell(group[0])}, one step of stage 1", bars))
    return panels


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
