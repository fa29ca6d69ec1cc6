"""`sla2 demo`: SLA2 next to full attention on q, k, v made from real photographs.

No weights are downloaded and none are trained: the router is the identity, alpha is calibrated on
the clip itself (eq. 7 of "SLA2, arXiv 2602.12675"). A trained router and alpha err less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sla2
from sla2 import env
from sla2.cli.accuracy import cosine, relative_l2
from sla2.cli.bench_timing import Timing, time_call
from sla2.cli.clip import load_clip
from sla2.cli.demo_plot import Picture, draw, milliseconds
from sla2.cli.device import device_name, pick_device
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder, write_json
from sla2.cli.tokens import PATCH, Qkv, embed, pixel_frames
from sla2.files import write_atomically

GPU_GRID = (21, 30, 52)  # 81 frames at 832 x 480
CPU_GRID = (13, 30, 52)  # 49 frames: full attention takes seconds there
BUDGET_S = 3.0  # of timing per operation on a GPU
STEPS = 6


class Output(NamedTuple):
    """One way to compute attention: its time and its output (1, N, H, D)."""

    name: str
    timing: Timing
    out: Tensor


class Result(NamedTuple):
    """Its time, and its error against full attention; None for full attention itself."""

    name: str
    timing: Timing
    error: float | None  # relative L2
    cosine: float | None


def run(options: argparse.Namespace) -> int:
    """Prints the comparison, writes demo.png and demo.json; always 0."""
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    heads = options.heads or (12 if gpu else 2)
    head_dim = options.head_dim or (128 if gpu else 64)
    dtype = torch.bfloat16 if gpu else torch.float32
    quant = _choose_quant(options.quant, device, dtype, head_dim)
    grid: tuple[int, int, int] = options.grid or (GPU_GRID if gpu else CPU_GRID)
    if options.head >= heads:
        raise CliError(f"--head {options.head}: there are {heads} heads, counted from 0")
    folder = output_folder(options.output)

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("", total=STEPS)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=1)

        progress.update(task, description="making the clip")
        frames, height, width = grid
        clip, shown = load_clip(options.input, pixel_frames(frames), height * PATCH, width * PATCH)
        step("embedding it into q, k, v")
        qkv = embed(clip, grid, heads=heads, head_dim=head_dim, dtype=dtype, device=device)
        step("calibrating alpha")
        attention = sla2.SLA2Attention(
            heads,
            head_dim,
            seq_len=qkv.q.shape[1],
            topk=options.topk,
            quant=quant,
            device=device,
        ).requires_grad_(False)
        attention.calibrate_alpha(qkv.q, qkv.k)
        step("running SLA2")
        block_map, ours = _run_sla2(attention, qkv, device)
        step("running full attention")
        dense = _run_full(qkv, device)
        step("drawing")
        full = dense[0].out
        results = [
            *(Result(name, timing, None, None) for name, timing, _ in dense),
            *(_compare(output, full) for output in ours),
        ]
        error_map = _token_errors(ours[0].out, full).reshape(grid)
        summary = _summary(options, device, grid, qkv, quant, shown, block_map, attention, results)
        picture = Picture(
            clip=clip,
            grid=grid,
            head=options.head,
            blocks=block_map.to_dense()[0, options.head].cpu().numpy(),
            alpha=attention.alpha_logit.sigmoid().cpu().numpy(),
            errors=error_map.cpu().numpy(),
            summary=summary,
        )
        write_atomically(folder / "demo.png", lambda path: draw(picture, path))
        write_json(folder / "demo.json", summary)
        step("done")
    _print(summary)
    names = " and ".join(str(folder / name) for name in ("demo.png", "demo.json"))
    Console().print(f"wrote {escape(names)}", highlight=False, soft_wrap=True)
    return 0


def _choose_quant(
    wanted: str | None, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str:
    """The mode asked for if it runs here; else the fastest: 8 bit on a GPU, none on a CPU."""
    fastest = ("int8_fp8", "int8_fp16", "none") if device.type == "cuda" else ("none",)
    reason = None
    for quant in (wanted,) if wanted else fastest:
        reason = env.why_not(device, dtype=dtype, quant=quant, head_dim=head_dim)
        if reason is None:
            return quant
    raise CliError(str(reason))


@torch.no_grad()
def _run_sla2(
    attention: sla2.SLA2Attention, qkv: Qkv, device: torch.device
) -> tuple[sla2.BlockMap, list[Output]]:
    """The block map, and the outputs of SLA2 and of its sparse branch alone."""
    block_map = sla2.route(
        qkv.q, qkv.k, proj_q=attention.proj_q, proj_k=attention.proj_k, topk=attention.topk
    )

    def sparse() -> Tensor:
        out: Any = sla2.block_sparse_attention(*qkv, block_map, quant=attention.quant)
        return cast(Tensor, out)

    return block_map, [
        _measure("SLA2", lambda: attention(*qkv), device, repeats=3),
        _measure("sparse branch alone", sparse, device, repeats=3),
    ]


def _run_full(qkv: Qkv, device: torch.device) -> list[Output]:
    """Full attention by every fast SDPA backend that runs here."""
    backends = {"full attention (SDPA)": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        backends = {
            "full attention (SDPA, FlashAttention)": SDPBackend.FLASH_ATTENTION,
            "full attention (SDPA, cuDNN)": SDPBackend.CUDNN_ATTENTION,
        }
    q, k, v = (x.transpose(1, 2) for x in qkv)
    outputs = []
    for name, backend in backends.items():

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        try:
            outputs.append(_measure(name, call, device, repeats=1))
        except RuntimeError:
            continue  # this torch or this GPU is without the backend
    if not outputs:
        raise CliError(f"no fast backend of torch's SDPA runs on {device_name(device)}")
    return outputs


def _measure(
    name: str, call: Callable[[], Tensor], device: torch.device, *, repeats: int
) -> Output:
    """GPU: up to 20 timed calls after warming up. CPU: `repeats`, the output being the first's."""
    if device.type == "cuda":
        return Output(name, time_call(call, device, iters=20, warmup=3, budget_s=BUDGET_S), call())
    outputs: list[Tensor] = []
    warmup = 1 if repeats > 1 else 0
    timing = time_call(lambda: outputs.append(call()), device, iters=repeats, warmup=warmup)
    return Output(name, timing, outputs[0])


def _compare(output: Output, full: Tensor) -> Result:
    error, angle = relative_l2(output.out, full), cosine(output.out, full)
    return Result(output.name, output.timing, error, angle)


def _token_errors(out: Tensor, full: Tensor) -> Tensor:
    """(N,): per token, ||out - full|| / ||full|| over all heads."""
    difference = (out.float() - full.float())[0].flatten(1).norm(dim=1)
    return difference / full.float()[0].flatten(1).norm(dim=1).clamp_min(1e-12)


def _summary(
    options: argparse.Namespace,
    device: torch.device,
    grid: tuple[int, int, int],
    qkv: Qkv,
    quant: str,
    shown: str,
    block_map: sla2.BlockMap,
    attention: sla2.SLA2Attention,
    results: list[Result],
) -> dict[str, Any]:
    """Everything that is printed, drawn and written as JSON."""
    _, n, heads, head_dim = qkv.q.shape
    fastest = min(r.timing.median for r in results if r.error is None)
    alpha = attention.alpha_logit.sigmoid()
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "clip": shown,
        "frames": pixel_frames(grid[0]),
        "grid": list(grid),
        "tokens": n,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": str(qkv.q.dtype).removeprefix("torch."),
        "quant": quant,
        "topk": options.topk,
        "kv_blocks_kept": block_map.num_kv_blocks,
        "kv_blocks": -(-n // 64),
        "sparsity": block_map.sparsity,
        "alpha_mean": alpha.mean().item(),
        "results": [
            {
                "name": r.name,
                "ms_median": r.timing.median,
                "ms_min": r.timing.min,
                "ms_max": r.timing.max,
                "speedup": fastest / r.timing.median,
                "rel_l2": r.error,
                "cosine": r.cosine,
            }
            for r in results
        ],
    }


def _print(summary: dict[str, Any]) -> None:
    console = Console()
    frames, height, width = summary["grid"]
    console.print(
        escape(
            f"clip: {summary['frames']} frames, {width * PATCH}x{height * PATCH}, "
            f"{summary['clip']}\n"
            f"tokens: {frames}x{height}x{width} = {summary['tokens']}, {summary['heads']} heads of "
            f"{summary['head_dim']}, {summary['dtype']}, on {summary['device']}\n"
            f"SLA2: {summary['kv_blocks_kept']} of {summary['kv_blocks']} key blocks per query "
            f"block, {summary['sparsity']:.1%} sparsity, quant {summary['quant']}; identity "
            f"router, alpha calibrated (mean {summary['alpha_mean']:.2f}), nothing trained"
        ),
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    table.add_column("operation")
    for name in ("ms", "speed-up", "rel L2 error", "cosine"):
        table.add_column(name, justify="right")
    for result in summary["results"]:
        measured = result["rel_l2"] is not None
        table.add_row(
            result["name"],
            f"{milliseconds(result['ms_median'])}",
            f"{result['speedup']:.1f}x",
            f"{result['rel_l2']:.3f}" if measured else "",
            f"{result['cosine']:.4f}" if measured else "",
        )
    console.print(table)
