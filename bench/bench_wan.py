"""One denoising step of Wan2.1 at full size with random weights: dense attention against SLA2.

    python bench/bench_wan.py --size 1.3b --output bench/results
    python bench/bench_wan.py --size 14b --iters 3 --compile --output bench/results
    python bench/bench_wan.py --size tiny --device cpu

A step is what diffusers' pipeline does between two calls of its scheduler: a forward pass for the
prompt, one for the negative prompt, each of batch 1, and the guidance that combines them. The model
is bfloat16, with the parameters in float32 that `from_pretrained` keeps so; the time of a step does
not depend on the weights' values, SLA2's neither: the number of blocks is fixed.

Dense rows run self- and cross-attention by the backend in their name: FlashAttention-2 or cuDNN, of
torch's `scaled_dot_product_attention`, chosen by diffusers' `set_attention_backend`. SLA2's rows
leave cross-attention to torch's own choice. --compile adds rows in which diffusers compiles the
blocks (`compile_repeated_blocks`); --compile-only measures these alone.

Times are medians of whole steps. The profile is of one more step: attention's kernels are those
that its operators launched, told apart by their shapes; "other" is the sum of all other kernels,
"idle" what is left of the median. Peak memory is that of torch's allocator, weights included.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "wan"))

import diffusers
from rich.console import Console
from rich.table import Table
from wan_models import SIZES, latent_shape, random_text, random_transformer, video_size

import sla2
from sla2.cli.bench_timing import peak_extra_bytes, time_call
from sla2.cli.device import path_in_use, pick_device, provenance, require_served
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder, write_json
from sla2.cli.parser import QUANT_MODES

DENSE = {"dense-flash": "_native_flash", "dense-cudnn": "_native_cudnn"}  # diffusers' backends
GUIDANCE = 5.0
NUM_KERNELS = 12  # costliest ones, in the results
DENSE_OPERATOR = re.compile(r"aten::_scaled_dot_product_\w*attention\w*")
SPARSE_OPERATOR = re.compile(r"sla2::\w+")
CUDA_CALL = re.compile(r"cu(da)?[A-Z]")

Row = dict[str, Any]


class Variant(NamedTuple):
    """One row: attention is a key of DENSE or "sla2"; kept is 1.0 where it is dense."""

    attention: str
    kept: float
    compiled: bool


# ---- the step -----------------------------------------------------------------------------------


def make_step(
    model: Any, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    generator = torch.Generator(device).manual_seed(options.seed)
    latents = torch.randn(1, *latent_shape(options), generator=generator, device=device)
    timestep = torch.tensor([500], device=device)
    width = model.config.text_dim
    prompts = [random_text(width, options.seed + i).to(device, dtype) for i in (0, 1)]

    @torch.no_grad()
    def step() -> Tensor:
        noisy = latents.to(dtype)
        predicted, unconditional = (
            model(
                hidden_states=noisy,
                timestep=timestep,
                encoder_hidden_states=prompt,
                return_dict=False,
            )[0]
            for prompt in prompts
        )
        return unconditional + GUIDANCE * (predicted - unconditional)

    return step


# ---- profile ------------------------------------------------------------------------------------


def profile_step(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one step's self-attention, cross-attention and everything else.

    On a GPU of kernels, on a CPU of operators, where nothing is left over.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [
        (event.key, getattr(event, field) / 1e3)
        for event in profiler.key_averages()
        # An annotation spans kernels that are in the list already.
        if event.device_type == kind and getattr(event, field) > 0 and not event.is_user_annotation
    ]
    result = {"self_attention_ms": 0.0, "cross_attention_ms": 0.0}
    for event, name in attention_operators(profiler.events()):
        result[name] += (kernel_time(event) if on_gpu else event.cpu_time_total) / 1e3
    total = sum(milliseconds for _, milliseconds in kernels)
    kernels.sort(key=lambda item: -item[1])
    return {
        **result,
        "other_ms": total - sum(result.values()),
        "all_ms": total,
        "kernels": [{"name": name, "ms": ms} for name, ms in kernels[:NUM_KERNELS]],
    }


def attention_operators(events: Any) -> Iterator[tuple[Any, str]]:
    """The outermost operators of attention, and what each of them is a part of."""
    for event in events:
        if event.device_type != DeviceType.CPU or inside_attention(event.cpu_parent):
            continue
        if SPARSE_OPERATOR.fullmatch(event.name):
            yield event, "self_attention_ms"
        elif DENSE_OPERATOR.fullmatch(event.name):
            queries, keys = event.input_shapes[:2]  # (B, H, tokens, D)
            same = queries[2] == keys[2]
            yield event, "self_attention_ms" if same else "cross_attention_ms"


def kernel_time(event: Any) -> float:
    """Microseconds of the kernels that an operator and those inside it launched.

    `device_time_total` also adds those of CUDA calls, whose numbers are of another kind: the
    profiler takes them for operators of the same number, and counts kernels of others.
    """
    return sum(kernel.duration for kernel in event.kernels) + sum(
        kernel_time(child) for child in event.cpu_children if not CUDA_CALL.match(child.name)
    )


def inside_attention(event: Any) -> bool:
    while event is not None:
        if SPARSE_OPERATOR.fullmatch(event.name) or DENSE_OPERATOR.fullmatch(event.name):
            return True
        event = event.cpu_parent
    return False


# ---- measuring ----------------------------------------------------------------------------------


def prepare(model: Any, variant: Variant, options: argparse.Namespace) -> None:
    """Gives `model` the attention of `variant`, whatever it had."""
    if variant.attention == "sla2":
        model.set_attention_backend("native")
        sla2.apply(
            model, topk=variant.kept, quant=options.quant, router="new", **video_size(options)
        )
    else:
        model.set_attention_backend(DENSE[variant.attention])
    if variant.compiled:
        # A cache would take a graph with the kernels of another row's backend for this one's.
        torch.compiler.config.force_disable_caches = True
        model.compile_repeated_blocks(fullgraph=True)


def restore(model: Any, variant: Variant) -> None:
    if variant.attention == "sla2":
        sla2.remove(model)
    if variant.compiled:
        for block in model.blocks:
            block._compiled_call_impl = None  # nn.Module.compile has no inverse
        torch.compiler.reset()


def measure(model: Any, variant: Variant, options: argparse.Namespace, device: torch.device) -> Row:
    """Raises CliError where the backend does not run here."""
    config, grid = model.config, sla2_grid(options)
    tokens = grid[0] * grid[1] * grid[2]
    dtype = torch.bfloat16
    prepare(model, variant, options)
    try:
        step = make_step(model, options, device, dtype)
        try:
            step()  # compiles, and tells whether the backend runs here at all
        except RuntimeError as error:
            raise CliError(f"{variant.attention}: {str(error).strip().splitlines()[0]}") from error
        timing = time_call(step, device, iters=options.iters, warmup=options.warmup)
        weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        extra = peak_extra_bytes(step, device)
        parts = profile_step(step, device) if options.profile else None
        if parts is not None and device.type == "cuda":
            parts["idle_ms"] = timing.median - parts["all_ms"]
    finally:
        restore(model, variant)
    quant = options.quant if variant.attention == "sla2" else "none"
    return {
        "op": "wan_step",
        "model": options.size,
        "video": video_size(options),
        "forwards": 2,
        "B": 1,
        "H": config.num_attention_heads,
        "N": tokens,
        "D": config.attention_head_dim,
        "layers": config.num_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": variant.attention,
        "kept": variant.kept,
        "quant": quant,
        "path": path_of(variant, options, device, tokens),
        "compile": variant.compiled,
        "ms_median": timing.median,
        "ms_min": timing.min,
        "ms_max": timing.max,
        "iterations": timing.iterations,
        "profile": parts,
        "weights_bytes": weights,
        "peak_bytes": None if weights is None or extra is None else weights + extra,
        "diffusers": diffusers.__version__,
    }


def sla2_grid(options: argparse.Namespace) -> tuple[int, int, int]:
    _, frames, height, width = latent_shape(options)
    return frames, height // 2, width // 2


def path_of(
    variant: Variant, options: argparse.Namespace, device: torch.device, tokens: int
) -> str | None:
    if variant.attention != "sla2":
        return None
    kept = kept_blocks(tokens, variant.kept)
    return path_in_use(device, "auto", options.quant, kept, routed=True)


def kept_blocks(tokens: int, topk: float) -> int:
    return max(1, int(topk * -(-tokens // sla2.constants.BLOCK_K)))


# ---- output -------------------------------------------------------------------------------------


def print_table(rows: list[Row]) -> None:
    """Speed-ups are over the dense rows of the same run that are compiled alike."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has no width of its own
    table = Table()
    for name in ("model", "attention", "kept", "compile"):
        table.add_column(name)
    for name in ("ms", "self-attn", "cross-attn", "other", "idle", "peak GiB", "/flash", "/cuDNN"):
        table.add_column(name, justify="right")
    for row in rows:
        profile, peak = row["profile"] or {}, row["peak_bytes"]
        names = ("self_attention_ms", "cross_attention_ms", "other_ms", "idle_ms")
        parts = [f"{profile[name]:.1f}" if name in profile else "" for name in names]
        table.add_row(
            row["model"],
            row["attention"],
            f"{row['kept']:g}",
            "yes" if row["compile"] else "no",
            f"{row['ms_median']:.1f}",
            *parts,
            "" if peak is None else f"{peak / 2**30:.1f}",
            *(speed_up(rows, row, dense) for dense in DENSE),
        )
    console.print(table)


def speed_up(rows: list[Row], row: Row, dense: str) -> str:
    for other in rows:
        alike = all(other[name] == row[name] for name in ("model", "compile", "video"))
        if alike and other["attention"] == dense:
            return f"{other['ms_median'] / row['ms_median']:.2f}x"
    return ""


# ---- command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One denoising step of Wan2.1, dense and with SLA2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument(
        "--attention", nargs="+", choices=[*DENSE, "sla2"], default=[*DENSE, "sla2"]
    )
    parser.add_argument("--topk", type=float, nargs="+", default=[0.1, 0.05, 0.03], help="of SLA2")
    parser.add_argument("--quant", choices=QUANT_MODES, default="int8_fp8", help="of SLA2")
    compiled = parser.add_mutually_exclusive_group()
    compiled.add_argument("--compile", action="store_true", help="the same rows compiled, too")
    compiled.add_argument("--compile-only", action="store_true", help="compiled rows alone")
    parser.add_argument("--iters", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps besides a first one")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--output", metavar="FOLDER", help="write wan_<size>.json there")
    parser.add_argument("--commit", help="commit to record (default: the installed package's)")
    parser.add_argument("--device", help="(default: the GPU)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    frames, height, width = SIZES[options.size].video
    options.num_frames, options.height, options.width = frames, height, width
    return options


def variants(options: argparse.Namespace) -> list[Variant]:
    compiled_or_not = (True,) if options.compile_only else (False, True)[: 1 + options.compile]
    return [
        Variant(attention, kept, compiled)
        for compiled in compiled_or_not
        for attention in options.attention
        for kept in (options.topk if attention == "sla2" else (1.0,))
    ]


def run(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    size = SIZES[options.size]
    grid = sla2_grid(options)
    if "sla2" in options.attention:
        longest = kept_blocks(grid[0] * grid[1] * grid[2], max(options.topk))
        head_dim = size.transformer["attention_head_dim"]
        require_served(device, "auto", "bfloat16", head_dim, options.quant, longest)
    folder = None if options.output is None else output_folder(options.output)
    diffusers.utils.logging.set_verbosity_error()  # set_attention_backend warns at every call
    model = random_transformer(size, device, torch.bfloat16, options.seed)
    command = " ".join(["python", *sys.argv])
    source = {**provenance(device, options.commit), "command": command}
    rows: list[Row] = []
    for variant in variants(options):
        try:
            rows.append({**source, **measure(model, variant, options, device)})
        except CliError as error:
            print(f"left out {error}", file=sys.stderr)
            continue
        print(f"{variant.attention} {variant.kept:g}: {rows[-1]['ms_median']:.1f} ms", flush=True)
        if folder is not None:  # after every row: a run that is ended keeps those it has
            write_json(folder / f"wan_{options.size}.json", rows)
    print_table(rows)
    if folder is not None:
        print(f"wrote {folder / f'wan_{options.size}.json'}")


def main(argv: list[str] | None = None) -> int:
    """0, or 2 where the options, the device or a file cannot be used."""
    try:
        run(parse(argv))
    except CliError as error:
        print(f"bench_wan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
