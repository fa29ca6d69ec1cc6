"""Stage 2: fine-tunes a video diffusion transformer with SLA2 in place of full attention.

    python examples/train_stage2.py --model base/model.safetensors \\
        --router stage1/fit/router_0.03.safetensors --output stage2
    torchrun --standalone --nproc-per-node 8 examples/train_stage2.py --parallel fsdp ...

Without --router the model is trained with full attention, without --model from scratch: that makes
the model to begin with, and the baseline. `accelerate launch` starts it like torchrun does: both
only set the variables by which torch.distributed finds the other processes.

The loop is plain: rectified flow, AdamW, bfloat16 autocast over float32 weights, on the model and
the clips of bench/quality. SLA2's part is in `build` (attention, router, stage), `param_groups`,
and for FSDP2 in `distribute`. Written into --output: log.csv, the last checkpoint, from which the
same command goes on with --resume, and at the end model.safetensors and router.safetensors. A
resumed run may differ in what MAY_CHANGE names; any other difference is refused by name.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from quality.clips import TRAIN, Clips
from quality.flow import autocast, draw_batch, learning_rate
from quality.model import VideoDiT, load_model, use_sla2, write_model
from run_folder import check_settings, settings_of, write_settings

import sla2

COLUMNS = ("step", "loss", "gradient_norm", "lr", "seconds")
# A resumed run may be longer, and spread over its machines in another way.
MAY_CHANGE = ("output", "resume", "steps", "checkpoint_every", "batch", "parallel", "device")


# ---- model --------------------------------------------------------------------------------------


def build(options: argparse.Namespace, device: torch.device) -> VideoDiT:
    """The model, with SLA2 as stage 2 starts from it where a router is given."""
    if options.model is not None:
        model = load_model(options.model, device)
    else:
        model = VideoDiT(
            tuple(options.grid),
            patch=options.patch,
            heads=options.heads,
            head_dim=options.head_dim,
            depth=options.depth,
        ).to(device)
    if options.router is not None:
        use_sla2(model, topk=options.topk, quant=options.quant)
        # Names the first setting that differs, such as a router of another topk or grid.
        sla2.load_router(model, options.router)
        sla2.set_stage(model, 2)  # router frozen, alpha trainable: before the optimiser is made
    return model


def distribute(
    model: VideoDiT, parallel: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model spread over the processes: weights copied ("ddp") or sharded ("fsdp")."""
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    # Weights travel in 16 bit, gradients are summed in float32. Autocast sees to the activations.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, sla2.SLA2Attention):
                # In a group of its own, without a policy: a router in 16 bit chooses other blocks.
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.AdamW:
    if options.router is not None:
        groups = sla2.param_groups(
            model,
            lr_model=options.lr,
            lr_alpha=options.lr_alpha,
            weight_decay=options.weight_decay,
        )
    else:
        groups = [
            {
                "params": list(model.parameters()),
                "lr": options.lr,
                "weight_decay": options.weight_decay,
            }
        ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))


# ---- checkpoints --------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*") if re.search(r"-[0-9]{8}$", p.name))


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Every process writes its shards; the folder gets its name when all are on disk."""
    final = folder / f"checkpoint-{step:08d}"
    temporary = folder / f".{final.name}"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    barrier()
    if is_main():
        older = checkpoints(folder)
        temporary.rename(final)
        for path in older:
            shutil.rmtree(path)
    barrier()


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns the steps that are done; 0 where there is no checkpoint."""
    found = checkpoints(folder)
    if not found:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(found[-1].name.rpartition("-")[2])


def save_result(folder: Path, net: VideoDiT, model: nn.Module, *, router: bool) -> None:
    """Weights without attention's own, and router with alpha: each loads by itself."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)  # gathers: every process takes part
    if is_main():
        weights = {name: x for name, x in state.items() if isinstance(x, Tensor)}
        write_model(folder / "model.safetensors", net.config, weights)
    if router:
        sla2.save_router(model, folder / "router.safetensors")


# ---- processes ----------------------------------------------------------------------------------


def begin(name: str) -> torch.device:
    """Joins the other processes, where a launcher started several; this one's device."""
    device = torch.device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


# ---- the loop -----------------------------------------------------------------------------------


class Log:
    """log.csv of the main process, continued after the first `done` steps."""

    def __init__(self, path: Path, done: int) -> None:
        self._path = path if is_main() else None
        if self._path is None:
            return
        rows: list[list[str]] = []
        if done and path.exists():
            with path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))[1 : 1 + done]
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([list(COLUMNS), *rows])

    def add(self, *row: Any) -> None:
        if self._path is not None:
            with self._path.open("a", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerow(row)


def fine_tune(options: argparse.Namespace, device: torch.device) -> None:
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    torch.manual_seed(options.seed)  # the same new weights in every process
    net = build(options, device)
    clips = Clips(TRAIN, net.clip_size, device)
    model = distribute(net, options.parallel, device, dtype)
    optimizer = make_optimizer(model, options)
    rates = [group["lr"] for group in optimizer.param_groups]
    done = load_checkpoint(options.output, model, optimizer) if options.resume else 0
    log = Log(options.output / "log.csv", done)
    model.train()
    for step in range(done, options.steps):
        began = time.perf_counter()
        factor = learning_rate(step, options.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        # Batches depend on step and rank alone, so a resumed run sees those it would have seen.
        noised, t, velocity = draw_batch(clips, options.batch, options.seed, step, rank())
        with autocast(device, dtype):
            predicted = model(noised, t)
        loss = F.mse_loss(predicted, velocity)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # FSDP2 gives the norm as a DTensor.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values = mean_over_processes(loss.detach()), norm.item()
        log.add(step + 1, *values, factor * options.lr, time.perf_counter() - began)
        if not all(map(torch.isfinite, map(torch.tensor, values))):
            raise RuntimeError(f"step {step + 1}: loss and gradient norm are {values}")
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            save_checkpoint(options.output, step + 1, model, optimizer)
    save_result(options.output, net, model, router=options.router is not None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 2 of SLA2: fine-tune the whole model")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--model", type=Path, help="model.safetensors; default: new weights")
    parser.add_argument("--router", type=Path, help="of stage 1; default: full attention")
    parser.add_argument("--topk", type=float, default=0.03, help="that of the router file")
    parser.add_argument("--quant", default="int8_fp8", help="that of the router file")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="clips of a process and step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lr-alpha", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--device", default="cuda" if sla2.is_available("cuda") else "cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), help="default: by device")
    new = parser.add_argument_group("a new model")
    new.add_argument("--grid", type=int, nargs=3, default=(9, 32, 32), metavar=("T", "H", "W"))
    new.add_argument("--patch", type=int, default=4)
    new.add_argument("--heads", type=int, default=6)
    new.add_argument("--head-dim", type=int, default=64)
    new.add_argument("--depth", type=int, default=4)
    options = parser.parse_args(argv)
    if options.precision is None:
        cuda = torch.device(options.device).type == "cuda"
        options.precision = "bfloat16" if cuda else "float32"
    return options


def run(options: argparse.Namespace, train: Callable[[Any, torch.device], None]) -> int:
    """`train` among its processes, unless --output holds a run and --resume was not said.

    Raises ValueError where it holds a run with other options.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    settings, kept = settings_of(options, MAY_CHANGE), options.output / "settings.json"
    begun = bool(checkpoints(options.output))
    if begun and not options.resume:
        print(f"{options.output} holds a run: go on with --resume, or choose another folder")
        return 2
    if begun:
        check_settings(kept, settings)
    # A run of one process is what it is told to be.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    device = begin(options.device)
    try:
        if is_main() and not begun:
            write_settings(kept, settings)
        train(options, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(parse(argv), fine_tune)


if __name__ == "__main__":
    sys.exit(main())
