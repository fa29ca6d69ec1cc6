"""Every kernel of one forward call on a GPU: its time, what it may take, and what it must move.

    python bench/bench_stages.py --output results
    python bench/bench_stages.py --shape wan14b-720p --quant int8_fp8 none --topk 0.03 0.1

Times are means of torch's profiler with a warm L2 cache; the whole call is timed by events with a
cold one.

Counted bytes. A kernel reads each tensor once from memory and writes each once; what it reads again
comes out of the L2 cache. Weights, alpha and the statistics of a head are too small to count.
`linear_kernel` keeps the states of two or three heads in a ring that every SM reads. L2 holds three
quarters of a ring of 26 MB and at best a third of one of 40 MB: states of a ring above RING_BYTES
count, once written and once read, as the portable kernels' do; those of a smaller one do not.

Counted operations, two per multiply-add, of the method and not of a kernel: 6 (T_m + T_n) D^2 and
6 T_m T_n D for the router (each of its products takes three of 16 bit to be as exact as float32),
2 N D^2 for the states, 2 T_m T_n (D^2 + 2 D) for the complement (4 D where states are in e4m3),
2 N 64 K D for each of Q K^T and P V over K blocks of 64 keys, 2 N D^2 for phi(Q) H; all times B H.

The floor is the larger of bytes and operations at the highest rates seen on one H200: 4.26 TB/s of
copy, 751 TFLOP/s in bf16, 1300 in int8 and e4m3; that of several kernels is the sum of theirs.
Budgets are what the design gives each part of a call in int8_fp8 with 3 % of the blocks kept there.

What the memory system says itself, to be put beside the count, for one case at a time:

    ncu --csv --log-file ncu.csv --cache-control none \\
      --kernel-name-base demangled --kernel-name regex:sla2:: \\
      --metrics dram__bytes_read.sum,dram__bytes_write.sum \\
      python bench/bench_stages.py --once --shape wan1.3b-480p
    python bench/bench_stages.py --shape wan1.3b-480p --ncu-bytes ncu.csv

Lines that a kernel leaves dirty in L2 are written during the next one: single kernels may differ
from the count for this reason, the sum hardly.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import sla2
from sla2.cli.bench import make_problem
from sla2.cli.bench_timing import kernel_times, time_call
from sla2.cli.bench_work import Shape
from sla2.cli.device import (
    ROUTED_BY_SM90,
    path_in_use,
    pick_device,
    provenance,
    require_served,
    use_path,
)
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder, write_json
from sla2.cli.parser import QUANT_MODES, SHAPES, parse_shape
from sla2.constants import BLOCK_K

COPY_BYTES_PER_S = 4.26e12
FLOP16_PER_S = 751e12
FLOP8_PER_S = 1300e12

STAGES = ("pool", "reduce", "router", "linear", "attention")
PREPARATION = "pool + reduce + linear"  # one kernel of the sm90 path has parts of two budgets
BUDGETS_MS = {
    SHAPES["wan1.3b-480p"]: {PREPARATION: 0.12 + 0.09, "router": 0.02, "attention": 0.22},
    SHAPES["wan14b-720p"]: {PREPARATION: 0.95 + 0.95, "router": 0.12, "attention": 3.3},
}
BUDGET_CASE = ("int8_fp8", 0.03)

RING_BYTES = 36e6  # of states; measured on one H200, steps 30 to 33 of docs/optimization_log.md
THREE_HEADS_BYTES = 40 << 20  # a ring has three heads where these fit, otherwise two: pipeline.h

ROUTE_KEY_BLOCKS = 3008  # more than these are routed by the portable kernels on both paths

OWN_KERNEL = re.compile(r"\bsla2::(?:\(anonymous namespace\)::|<unnamed>::)?(\w+_kernel)\b")
# ncu leaves the namespaces of its own "demangled" names out in some versions.
NCU_KERNEL = re.compile(
    r"(?:void )?(?:sla2::)?(?:\(anonymous namespace\)::|<?unnamed>::)?(\w+_kernel)\b"
)
NCU_METRICS = {"dram__bytes_read.sum": 0, "dram__bytes_write.sum": 1}
NCU_UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


class Case(NamedTuple):
    """One forward call; path: whose kernels run, "portable", "sm90" or ROUTED_BY_SM90."""

    shape: Shape
    topk: float
    quant: str
    path: str


class Work(NamedTuple):
    """What one kernel must do in one call; bytes and operations as the module counts them."""

    stage: str
    read: float
    written: float
    flop16: float = 0.0
    flop8: float = 0.0

    @property
    def floor_ms(self) -> float:
        operations = self.flop16 / FLOP16_PER_S + self.flop8 / FLOP8_PER_S
        return 1e3 * max((self.read + self.written) / COPY_BYTES_PER_S, operations)


# ---- counting ---------------------------------------------------------------------------------


def kernel_work(case: Case) -> dict[str, Work]:
    """Kernel -> its work, for every kernel that a routed call may launch."""
    shape, quantised = case.shape, case.quant != "none"
    heads, n, d = shape.batch * shape.heads, shape.seqlen, shape.head_dim
    q_blocks, kv_blocks, kept = shape.q_blocks, shape.kv_blocks, shape.kept_blocks(case.topk)
    q_rows, kv_rows = heads * q_blocks, heads * kv_blocks

    tensor = 2 * heads * n * d  # q, k, v or out
    q_mean, k_sum = 4 * q_rows * d, 4 * kv_rows * d
    v_amax = 4 * q_rows * d if quantised else 0
    statistics = 4 * heads * d * (3 if quantised else 1)  # K's mean, V's scales
    k_range = 4 * kv_rows * d if quantised and case.path == "sm90" else 0
    lists = q_rows * (2 * kept + 4)
    mask = 4 * heads * _up(kv_blocks, 64) // 32 * _up(q_blocks, 128)
    record_bytes = {"none": 0, "int8_fp8": 2, "int8_fp16": 3}[case.quant]  # per key and feature
    records = kv_rows * (BLOCK_K * d * record_bytes + 4) if quantised else 0
    states8 = case.path == "sm90" and case.quant == "int8_fp8"  # in e4m3, z in four parts
    parts = 4 if states8 else 2
    state_columns = d * d + parts * d
    states = 2 * kv_rows * state_columns
    sums = q_rows * (2 * d * d + 4 * parts * d)  # H and Z

    state_flop = 2.0 * heads * n * d * d
    complement_flop = 2.0 * heads * q_blocks * kv_blocks * state_columns
    product = 2.0 * heads * n * min(kept * BLOCK_K, n) * d
    wide_products = {"none": 2, "int8_fp16": 1, "int8_fp8": 0}[case.quant]
    attention = Work(
        "attention",
        tensor + (records if quantised else 2 * tensor) + lists + sums,
        tensor,
        wide_products * product + 2.0 * heads * n * d * d,
        (2 - wide_products) * product,
    )

    pooled = q_mean + k_sum + v_amax + k_range
    work = {
        "pool_kernel": Work("pool", (3 if quantised else 2) * tensor, pooled),
        "reduce_kernel": Work("reduce", k_sum + v_amax, statistics),
        "complement_mask_kernel": Work("linear", lists, mask),
    }
    work |= _router_work(case, q_mean + k_sum, lists, mask)
    if case.path == "sm90":
        head = (1 if states8 else 2) * kv_blocks * state_columns
        ring = min(heads, 3 if 3 * head <= THREE_HEADS_BYTES else 2) * head
        through_memory = heads * head if ring > RING_BYTES else 0
        work["linear_kernel"] = Work(
            "linear",
            2 * tensor + k_range + statistics + mask + through_memory,
            records + sums + through_memory,
            state_flop + (0.0 if states8 else complement_flop),
            complement_flop if states8 else 0.0,
        )
        work["attn_fwd_sm90_kernel"] = attention
    else:
        work["linear_state_kernel"] = Work(
            "linear", 2 * tensor + statistics, records + states, state_flop
        )
        work["complement_kernel"] = Work("linear", states + mask, sums, complement_flop)
        work["attn_fwd_kernel"] = attention
    return work


def _router_work(case: Case, means: int, lists: int, mask: int) -> dict[str, Work]:
    shape = case.shape
    heads, d = shape.batch * shape.heads, shape.head_dim
    q_blocks, kv_blocks = shape.q_blocks, shape.kv_blocks
    project_flop = 6.0 * heads * (q_blocks + kv_blocks) * d * d
    score_flop = 6.0 * heads * q_blocks * kv_blocks * d
    if case.path in ("sm90", ROUTED_BY_SM90) and kv_blocks <= ROUTE_KEY_BLOCKS:
        written = lists + (mask if case.path == "sm90" else 0)
        parts = heads * (_up(q_blocks, 64) + _up(kv_blocks, 64)) * (4 * d + 4)
        return {
            "project_kernel": Work("router", means, parts, project_flop),
            "route_kernel": Work("router", parts, written, score_flop),
        }
    scores = 4 * heads * q_blocks * kv_blocks
    return {
        "project_kernel": Work("router", means, means, project_flop),
        "score_kernel": Work("router", means, scores, score_flop),
        "select_kernel": Work("router", scores, lists),
    }


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# ---- measuring --------------------------------------------------------------------------------


def forward_call(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> Callable[[], Any]:
    problem = make_problem(case.shape, dtype, device, seed)
    kept = case.shape.kept_blocks(case.topk)
    return lambda: sla2.sla2_attention(
        problem.q,
        problem.k,
        problem.v,
        alpha_logit=problem.alpha_logit,
        num_kv_blocks=kept,
        quant=case.quant,
        **problem.router,
    )


def own_kernels(times: list[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by the kernels' short names; what others launched is left out."""
    found: dict[str, float] = {}
    for name, milliseconds in times:
        if match := OWN_KERNEL.search(name):
            found[match[1]] = found.get(match[1], 0.0) + milliseconds
    return found


def read_ncu(path: Path) -> dict[str, list[float]]:
    """Kernel -> bytes read and written, summed over its launches, from ncu's CSV output."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"{path} is not UTF-8: let ncu write it with --log-file") from error
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None or '"Metric Value"' not in lines[header]:
        raise CliError(f'{path} has no table with "ID" and "Metric Value": use ncu --csv')
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(lines[header:]):
        kernel = NCU_KERNEL.match(row["Kernel Name"] or "")
        metric = row["Metric Name"]
        if kernel is None or metric not in NCU_METRICS:
            continue
        if row["Metric Unit"] not in NCU_UNITS:
            raise CliError(f"{path}: {metric} in {row['Metric Unit']!r}, not in bytes")
        try:
            value = (
                float((row["Metric Value"] or "").replace(",", "")) * NCU_UNITS[row["Metric Unit"]]
            )
        except ValueError as error:
            raise CliError(f"{path}: {metric} is {row['Metric Value']!r}, not a number") from error
        found.setdefault(kernel[1], [0.0, 0.0])[NCU_METRICS[metric]] += value
    if not found:
        raise CliError(f"{path} has none of {', '.join(NCU_METRICS)} of a kernel of this library")
    return found


def summarise(
    case: Case, times: dict[str, float], ncu: dict[str, list[float]] | None
) -> dict[str, Any]:
    """Kernels with their work and the sums over stages, over PREPARATION and over all."""
    work = kernel_work(case)
    unknown = sorted(set(times) - set(work))
    if unknown:
        raise CliError(f"no work is counted for {', '.join(unknown)} on path {case.path}")
    kernels = []
    for name in sorted(times, key=lambda name: (STAGES.index(work[name].stage), -times[name])):
        own = work[name]
        kernels.append(
            {
                "kernel": name,
                **own._asdict(),
                "ms": times[name],
                "floor_ms": own.floor_ms,
                "ncu_bytes": None if ncu is None else ncu.get(name),
            }
        )
    groups = {stage: (stage,) for stage in STAGES}
    groups |= {PREPARATION: ("pool", "reduce", "linear"), "all": STAGES}
    budgets: dict[str, float] = {}
    if (case.quant, case.topk) == BUDGET_CASE:
        budgets = dict(BUDGETS_MS.get(tuple(case.shape), {}))
        if budgets:
            budgets["all"] = sum(budgets.values())
    sums = []
    for group, stages in groups.items():
        members = [kernel for kernel in kernels if kernel["stage"] in stages]
        entry: dict[str, Any] = {"group": group, "budget_ms": budgets.get(group)}
        for field in ("ms", "floor_ms", "read", "written", "flop16", "flop8"):
            entry[field] = sum(kernel[field] for kernel in members)
        measured = [kernel["ncu_bytes"] for kernel in members]
        complete = bool(measured) and all(pair is not None for pair in measured)
        entry["ncu_bytes"] = [sum(p[i] for p in measured) for i in (0, 1)] if complete else None
        sums.append(entry)
    return {"kernels": kernels, "sums": sums}


# ---- output -----------------------------------------------------------------------------------


def print_case(entry: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width of its own
    title = "B{B} H{H} N{N} D{D} {dtype}, {kept:g} kept, {quant}, {path}".format(**entry)
    table = Table(title=title, title_justify="left")
    table.add_column("stage, kernel")
    for name in ("ms", "budget ms", "floor ms", "floor / ms", "GB", "TFLOP", "ncu GB", "ncu / GB"):
        table.add_column(name, justify="right")
    for total in entry["sums"]:
        if total["group"] in (PREPARATION, "all"):
            table.add_section()
        members = [k["kernel"] for k in entry["kernels"] if k["stage"] == total["group"]]
        label = f"{total['group']}: {members[0]}" if len(members) == 1 else total["group"]
        table.add_row(label, *_cells(total), style="bold")
        for kernel in entry["kernels"]:
            if len(members) > 1 and kernel["kernel"] in members:
                table.add_row(f"  {kernel['kernel']}", *_cells(kernel))
    console.print(table)
    counted = _bytes(entry["sums"][-1])
    whole = "{median:.4f} ms ({min:.4f} to {max:.4f})".format(**entry["whole_ms"])
    console.print(
        f"whole call {whole}, cold cache; bytes counted {counted / 1e9:.3f} GB, "
        f"{1e3 * counted / COPY_BYTES_PER_S:.4f} ms of copy; q, k, v and out once "
        f"{entry['operand_bytes'] / 1e9:.3f} GB\n",
        highlight=False,
        soft_wrap=True,
    )


def _bytes(entry: dict[str, Any]) -> float:
    return float(entry["read"] + entry["written"])


def _cells(entry: dict[str, Any]) -> list[str]:
    budget, ncu = entry.get("budget_ms"), entry["ncu_bytes"]
    share = entry["floor_ms"] / entry["ms"] if entry["ms"] else 0.0
    return [
        f"{entry['ms']:.4f}",
        "" if budget is None else f"{budget:g}",
        f"{entry['floor_ms']:.4f}",
        f"{share:.0%}",
        f"{_bytes(entry) / 1e9:.3f}",
        f"{(entry['flop16'] + entry['flop8']) / 1e12:.4f}",
        "" if ncu is None else f"{sum(ncu) / 1e9:.3f}",
        "" if ncu is None else f"{sum(ncu) / _bytes(entry):.2f}",
    ]


# ---- command line -----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times, budgets, floors and bytes of the kernels of one forward call",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--shape", type=parse_shape, nargs="+", default=list(SHAPES.values()), help="as in bench"
    )
    parser.add_argument("--topk", type=float, nargs="+", default=[0.03], help="blocks kept")
    parser.add_argument("--quant", nargs="+", choices=QUANT_MODES, default=["int8_fp8"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--path", choices=("auto", "portable", "sm90"), default="auto")
    parser.add_argument("--iters", type=int, default=30, help="timed iterations")
    parser.add_argument(
        "--ncu-bytes", type=Path, metavar="FILE", help="ncu's CSV, see the top of this file"
    )
    parser.add_argument(
        "--once", action="store_true", help="one call per case, for a profiler; nothing is timed"
    )
    parser.add_argument("--output", metavar="FOLDER", help="write stages.json there")
    parser.add_argument("--commit", help="commit to record (default: the installed package's)")
    parser.add_argument("--device", help="(default: the GPU)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    cases: list[Case] = []
    for shape in (Shape(*sizes) for sizes in options.shape):
        for quant in options.quant:
            longest = shape.kept_blocks(max(options.topk))
            require_served(device, options.path, options.dtype, shape.head_dim, quant, longest)
            for topk in options.topk:
                kept = shape.kept_blocks(topk)
                path = path_in_use(device, options.path, quant, kept, routed=True)
                cases.append(Case(shape, topk, quant, path))
    if options.ncu_bytes is not None and len(cases) != 1:
        raise CliError(f"--ncu-bytes belongs to one case; these options make {len(cases)}")
    return cases


def run(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    if device.type != "cuda":
        raise CliError("the kernels run on a GPU alone, and none is usable here")
    cases = make_cases(options, device)
    ncu = None if options.ncu_bytes is None else read_ncu(options.ncu_bytes)
    folder = None if options.output is None else output_folder(options.output)
    entries = []
    for case in cases:
        with use_path(device, options.path):
            call = forward_call(case, getattr(torch, options.dtype), device, options.seed)
            if options.once:
                call()
                torch.cuda.synchronize(device)
                continue
            times = own_kernels(kernel_times(call, device, options.iters))
            whole = time_call(call, device, iters=options.iters, warmup=5)
        shape = case.shape
        entries.append(
            {
                **dict(zip("BHND", shape, strict=True)),
                "dtype": options.dtype,
                "kept": case.topk,
                "quant": case.quant,
                "path": case.path,
                "whole_ms": whole._asdict(),
                "operand_bytes": 8 * shape.batch * shape.heads * shape.seqlen * shape.head_dim,
                **summarise(case, times, ncu),
            }
        )
        print_case(entries[-1])
    if folder is not None and not options.once:
        target = folder / "stages.json"
        command = " ".join(["python", *sys.argv])
        source = {**provenance(device, options.commit), "command": command}
        write_json(target, {**source, "cases": entries})
        print(f"wrote {target}")


def main(argv: list[str] | None = None) -> int:
    """0, or 2 where the options, the device or a file cannot be used."""
    try:
        run(parse(argv))
    except CliError as error:
        print(f"bench_stages: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
