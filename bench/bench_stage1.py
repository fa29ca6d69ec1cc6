"""One step of stage 1, SLA2 in soft mode forward and backward, beside dense attention's.

    python bench/bench_stage1.py                       # both of Wan2.1's sizes, 5 % of the blocks
    python bench/bench_stage1.py --size 1.3b --output bench/results
    python bench/bench_stage1.py --size tiny --device cpu

What a step costs depends on the inputs: the kernels visit the blocks whose mask is at least 2^-16,
the "listed" ones. Inputs are the demo's clip through its fixed embedding, where attention is
concentrated as in a video model, and Gaussian noise, whose pooled scores are so alike that nothing
is masked: the worst case, and no input of a model. Gradients are those of stage 1 ("router": both
projections and alpha) and of everything ("all": q, k and v, too). Dense rows differentiate q, k, v.

Every row is a median over calls with a cold L2 cache; q, k, v are bfloat16 (float32 on a CPU).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sla2
from sla2.cli.bench import make_problem
from sla2.cli.bench_peers import SDPA_BACKENDS, PeerUnavailable, sdpa, with_backward
from sla2.cli.bench_results import STAGE1, STAGE1_DENSE, STAGE1_GRADIENTS, STAGE1_INPUTS
from sla2.cli.bench_timing import peak_extra_bytes, time_call
from sla2.cli.bench_work import Shape
from sla2.cli.clip import load_clip
from sla2.cli.device import path_in_use, pick_device, provenance, require_served
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder, write_json
from sla2.cli.tokens import PATCH, Qkv, embed, pixel_frames
from sla2.constants import SOFT_MAP_MIN

PEER_BUDGET_S = 3.0


class Size(NamedTuple):
    """A model's layer: heads, head dimension and token grid (frames, rows, columns)."""

    heads: int
    head_dim: int
    grid: tuple[int, int, int]

    @property
    def shape(self) -> Shape:
        frames, rows, columns = self.grid
        return Shape(1, self.heads, frames * rows * columns, self.head_dim)


SIZES = {
    "1.3b": Size(12, 128, (21, 30, 52)),
    "14b": Size(40, 128, (21, 45, 80)),
    "tiny": Size(2, 64, (3, 8, 12)),
}
Row = dict[str, Any]


def make_inputs(kind: str, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Qkv:
    """q, k, v (1, N, H, D) of a layer."""
    if kind == "gaussian":
        problem = make_problem(size.shape, dtype, device, seed)
        return Qkv(problem.q, problem.k, problem.v)
    frames, rows, columns = size.grid
    clip, _ = load_clip(None, pixel_frames(frames), rows * PATCH, columns * PATCH)
    return embed(
        clip, size.grid, heads=size.heads, head_dim=size.head_dim, dtype=dtype, device=device
    )


def time_size(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rows of dense attention, then of SLA2, for each kind of inputs."""
    size = SIZES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for kind in options.inputs:
        qkv = make_inputs(kind, size, dtype, device, options.seed)
        layer = sla2.SLA2Attention(
            size.heads, size.head_dim, seq_len=size.shape.seqlen, topk=options.topk, device=device
        )
        layer.calibrate_alpha(qkv.q, qkv.k)
        layer.set_stage(1)
        peers = {}
        for peer in SDPA_BACKENDS:
            leaves = [x.detach().clone().requires_grad_() for x in qkv]
            try:
                call = with_backward(sdpa(peer, *leaves), leaves)
            except PeerUnavailable as error:
                print(f"not run: {error}", file=sys.stderr)
                continue
            row = measure(call, size, dtype, options, device, PEER_BUDGET_S)
            row |= {"op": STAGE1_DENSE, "inputs": kind, "gradients": "all", "kept": 1.0}
            peers[peer] = row["ms_median"]
            yield {**row, "path": peer, "listed": 1.0, "peers": {}}
        listed = listed_share(layer, qkv)
        for gradients in options.gradients:
            call = soft_step(layer, qkv, everything=gradients == "all")
            row = measure(call, size, dtype, options, device, None)
            row |= {"op": STAGE1, "inputs": kind, "gradients": gradients, "kept": options.topk}
            path = path_in_use(device, "portable", "none", 1, routed=False)
            yield {**row, "path": path, "listed": listed, "peers": peers}


def soft_step(layer: sla2.SLA2Attention, qkv: Qkv, *, everything: bool) -> Callable[[], object]:
    """Forward and backward for a fixed incoming gradient."""
    q, k, v = (x.detach().requires_grad_(everything) for x in qkv)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    return with_backward(lambda: layer(q, k, v), [*leaves, *((q, k, v) if everything else ())])


@torch.no_grad()
def listed_share(layer: sla2.SLA2Attention, qkv: Qkv) -> float:
    """Share of the blocks that the kernels visit."""
    result: Any = sla2.sla2_attention(
        *qkv,
        proj_q=layer.proj_q,
        proj_k=layer.proj_k,
        alpha_logit=layer.alpha_logit,
        topk=layer.topk,
        mode="soft",
        tau=layer.tau,
        return_aux=True,
    )
    mask: Tensor = result[1].block_map
    listed = int((mask >= SOFT_MAP_MIN).count_nonzero())
    return listed / mask.numel()  # of all blocks 1: a mean in float32 may round to more


def measure(
    call: Callable[[], object],
    size: Size,
    dtype: torch.dtype,
    options: argparse.Namespace,
    device: torch.device,
    budget_s: float | None,
) -> Row:
    call()
    extra = peak_extra_bytes(call, device)
    timing = time_call(call, device, iters=options.iters, warmup=options.warmup, budget_s=budget_s)
    batch, heads, tokens, head_dim = size.shape
    return {
        **{"B": batch, "H": heads, "N": tokens, "D": head_dim},
        "dtype": str(dtype).removeprefix("torch."),
        "quant": "none",
        "ms_median": timing.median,
        "ms_min": timing.min,
        "ms_max": timing.max,
        "iterations": timing.iterations,
        "peak_extra_bytes": extra,
    }


def step_name(row: Row) -> str:
    return STAGE1 if row["op"] == STAGE1 else f"{row['path']}_fwd_bwd"


def print_table(rows: list[Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file has no width of its own
    table = Table()
    for name in ("H", "N", "inputs", "step", "gradients"):
        table.add_column(name)
    for name in ("listed", "ms", "min", "/flash", "/cuDNN", "extra / qkv"):
        table.add_column(name, justify="right")
    for row in rows:
        inputs_bytes = 3 * row["B"] * row["H"] * row["N"] * row["D"] * 2
        extra = row["peak_extra_bytes"]
        table.add_row(
            *(str(row["H"]), str(row["N"]), row["inputs"], step_name(row), row["gradients"]),
            f"{row['listed']:.1%}",
            f"{row['ms_median']:.2f}",
            f"{row['ms_min']:.2f}",
            *(
                f"{row['peers'][peer] / row['ms_median']:.2f}x" if peer in row["peers"] else ""
                for peer in ("sdpa-flash", "sdpa-cudnn")
            ),
            "" if extra is None else f"{extra / inputs_bytes:.2f}",
        )
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time of one step of stage 1, beside dense attention's forward and backward.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["1.3b", "14b"])
    parser.add_argument("--topk", type=float, default=0.05, help="share of key blocks")
    parser.add_argument("--inputs", nargs="+", choices=STAGE1_INPUTS, default=list(STAGE1_INPUTS))
    parser.add_argument(
        "--gradients", nargs="+", choices=STAGE1_GRADIENTS, default=list(STAGE1_GRADIENTS)
    )
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or cuda:<index> (default: the GPU)")
    parser.add_argument("--output", metavar="FOLDER", help="write stage1.json there")
    parser.add_argument("--commit", help="commit to record (default: the installed package's)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    for name in options.size:
        if device.type == "cuda":
            require_served(device, "portable", "bfloat16", SIZES[name].head_dim, "none", 1)
    folder = None if options.output is None else output_folder(options.output)
    source = {
        **provenance(device, options.commit),
        "command": " ".join(["python", "bench/bench_stage1.py", *sys.argv[1:]]),
    }
    rows: list[Row] = []
    for name in options.size:
        for row in time_size(name, options, device):
            rows.append({**source, **row})
            print(
                f"{name}, {row['inputs']}, {step_name(row)}, {row['gradients']}: "
                f"{row['ms_median']:.2f} ms, {row['listed']:.1%} listed",
                flush=True,
            )
            if folder is not None:  # after every row: a run that is ended keeps those it has
                write_json(folder / "stage1.json", rows)
    print_table(rows)
    if folder is not None:
        print(f"wrote {folder / 'stage1.json'}")


def main(argv: list[str] | None = None) -> int:
    """0, or 2 where the options, the device or a file cannot be used."""
    try:
        run(parse(argv))
    except CliError as error:
        print(f"bench_stage1: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
