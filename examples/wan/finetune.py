"""Stage 2 for Wan2.1: fine-tunes the transformer with SLA2 on the rectified-flow loss.

    torchrun --standalone --nproc-per-node 8 examples/wan/finetune.py --data latents \\
        --router stage1/fit/router_0.03.safetensors --output stage2
    accelerate launch --multi_gpu --num_processes 8 examples/wan/finetune.py ...
    python examples/wan/finetune.py --size tiny --router ... --topk 0.5 --steps 2 --output try

--data is what encode_videos.py wrote; with --random-weights it may be left out, and noise is used.
With several processes the model, its gradients and AdamW's state are sharded (FSDP2); both
launchers only set the variables by which torch.distributed finds the other processes.

The forward pass is that of inference, int8_fp8 with the hard block map; the router is frozen, and
alpha trains beside the weights. Weights and sums of gradients are float32, products bfloat16.

Written into --output: log.csv, the last checkpoint, from which the same command goes on with
--resume, and at the end transformer/, for `WanTransformer3DModel.from_pretrained`, and
router.safetensors, for `sla2.apply`. A resumed run may have other --steps, --checkpoint-every,
--batch and --device, and another number of processes; what else differs is refused by name.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from wan_models import (
    EMPTY_PROMPT,
    SIZES,
    add_arguments,
    complete,
    compute_dtype,
    latent_shape,
    load_transformer,
    random_text,
    video_size,
)

import sla2

# Processes, checkpoints and the log are those of the example of stage 2 on a small model.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_stage2 import (
    Log,
    barrier,
    is_main,
    load_checkpoint,
    mean_over_processes,
    rank,
    run,
    save_checkpoint,
)

TRANSFORMER = "transformer"  # folder in --output
TIMESTEPS = 1000  # the scale of the timesteps that the transformer was trained with


# ---- data ---------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One training example: the transformer's inputs and the velocity it has to predict."""

    noised: Tensor  # (1, 16, frames, height, width)
    timestep: Tensor  # (1,)
    text: Tensor  # (1, 512, text_dim)
    velocity: Tensor


class Data:
    """Latents and embeddings; which of them, and their noise, depends on seed and index alone."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options, self._device = options, device
        self._text_dim = SIZES[options.size].transformer["text_dim"]
        self._shape = latent_shape(options)
        self._files: list[Path] = []
        if options.data is not None:
            files = sorted(options.data.glob("*.safetensors"))
            self._files = [path for path in files if path.name != EMPTY_PROMPT]
            if not self._files:
                raise FileNotFoundError(f"no latents in {options.data}: see encode_videos.py")

    def sample(self, index: int) -> Sample:
        """The `index`-th example of the run, all processes counted."""
        options = self._options
        draw = random.Random(f"{options.seed}/{index}")
        latents, text = self._read(index, draw)
        # A video of this size at noise level u was trained as one at a higher level, by the shift.
        u, shift = draw.random(), SIZES[options.size].flow_shift
        sigma = shift * u / (1 + (shift - 1) * u)
        generator = torch.Generator(self._device).manual_seed(draw.getrandbits(63))
        noise = torch.randn(latents.shape, generator=generator, device=self._device)
        return Sample(
            noised=torch.lerp(latents, noise, sigma),
            timestep=torch.tensor([TIMESTEPS * sigma], device=self._device),
            text=text,
            velocity=noise - latents,
        )

    def _read(self, index: int, draw: random.Random) -> tuple[Tensor, Tensor]:
        unconditional = draw.random() < self._options.drop_prompt
        if not self._files:
            generator = torch.Generator().manual_seed(draw.getrandbits(63))
            latents = torch.randn(self._shape, generator=generator)
            text = random_text(self._text_dim, draw.getrandbits(32))[0]
        else:
            epoch, position = divmod(index, len(self._files))
            order = list(self._files)
            random.Random(f"{self._options.seed}/epoch {epoch}").shuffle(order)
            content = load_file(order[position])
            latents, text = content["latents"], content["prompt_embeds"]
            if latents.shape != self._shape:
                raise ValueError(
                    f"{order[position]} has latents {tuple(latents.shape)}; this size needs "
                    f"{self._shape}: encode the videos with the same size"
                )
            if unconditional:
                text = load_file(order[position].with_name(EMPTY_PROMPT))["prompt_embeds"]
        return latents[None].to(self._device).float(), text[None].to(self._device).float()


# ---- model --------------------------------------------------------------------------------------


def build(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The transformer in float32 with SLA2, as stage 2 starts from it."""
    # One process of a host after the other: each has the whole model in host memory while loading.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        if turn == local_rank:
            model = load_transformer(options, device, torch.float32)
        barrier()
    report = sla2.apply(
        model,
        topk=options.topk,
        quant=options.quant,
        router=options.router or "new",
        **video_size(options),
    )
    if is_main():
        print(report, flush=True)
        # Before `distribute`: FSDP2 gives the model another class, whose name would be written.
        model.save_config(options.output / TRANSFORMER)
    sla2.set_stage(model, 2)  # before the optimiser is made
    model.enable_gradient_checkpointing()
    return model.train()


def distribute(model: nn.Module, device: torch.device) -> None:
    """Shards every block by itself, in place.

    No 16-bit policy: it would round the router and the parameters that Wan keeps in float32, and
    gathering a block of the 14B model in float32 takes milliseconds beside seconds of products.
    """
    if not dist.is_initialized():
        return
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def save_result(model: nn.Module, folder: Path) -> None:
    """Weights without those of attention's router, and router with alpha: two files."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)  # gathers: every process takes part
    if is_main():
        weights = {
            # What was gathered from uneven shards is the front of a padded buffer.
            name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
            for name, x in state.items()
            if isinstance(x, Tensor) and ".processor.sla2." not in name
        }
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(weights, folder / TRANSFORMER, filename_pattern=pattern)
    sla2.save_router(model, folder / "router.safetensors")


# ---- the loop -----------------------------------------------------------------------------------


def fine_tune(options: argparse.Namespace, device: torch.device) -> None:
    model = build(options, device)
    distribute(model, device)
    groups = sla2.param_groups(
        model, lr_model=options.lr, lr_alpha=options.lr_alpha, weight_decay=options.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    rates = [group["lr"] for group in groups]
    data = Data(options, device)
    done = load_checkpoint(options.output, model, optimizer) if options.resume else 0
    log = Log(options.output / "log.csv", done)
    dtype = compute_dtype(device)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(done, options.steps):
        began = time.perf_counter()
        factor = min(1.0, (step + 1) / options.warmup)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        total = torch.zeros((), device=device)
        first = (step * processes + rank()) * options.batch
        for index in range(first, first + options.batch):
            sample = data.sample(index)
            # A cached cast of every weight would be a second copy of the whole model.
            with torch.autocast(
                device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
            ):
                predicted = model(sample.noised, sample.timestep, sample.text, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), sample.velocity) / options.batch
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: a DTensor
        values = mean_over_processes(total), norm.item()
        seconds = time.perf_counter() - began
        log.add(step + 1, *values, factor * options.lr, seconds)
        if is_main():
            print(
                f"step {step + 1}/{options.steps}: loss {values[0]:.4f}, {seconds:.1f} s",
                flush=True,
            )
        if not torch.tensor(values).isfinite().all():
            raise RuntimeError(f"step {step + 1}: loss and gradient norm are {values}")
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            save_checkpoint(options.output, step + 1, model, optimizer)
    save_result(model, options.output)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 2 of SLA2 for Wan2.1")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--data", type=Path, help="folder that encode_videos.py wrote")
    parser.add_argument("--router", type=Path, help="of record_and_fit.py (default: untrained)")
    parser.add_argument("--topk", type=float, default=0.03, help="that of the router file")
    parser.add_argument("--quant", default="int8_fp8", help="that of the router file")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="videos of a process and step")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--lr-alpha", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--warmup", type=int, default=20, help="steps until the full rate")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--drop-prompt", type=float, default=0.1, help="share of empty prompts")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    add_arguments(parser)
    options = complete(parser.parse_args(argv))
    if options.data is None and not options.random_weights:
        parser.error("--data is needed: a folder that encode_videos.py wrote")
    return options


def main(argv: list[str] | None = None) -> int:
    return run(parse(argv), fine_tune)


if __name__ == "__main__":
    sys.exit(main())
