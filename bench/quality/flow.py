"""Rectified flow on clips: the loss, training, and evaluation on held-out photographs.

x_t = (1 - t) clip + t noise, t in [0, 1]; the model predicts the velocity noise - clip.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from quality.clips import Clips, derive_seed
from quality.model import VideoDiT, attention_names
from sla2.files import write_atomically

WARMUP = 50  # steps; AdamW's second moments are of few gradients at first
CLIP_NORM = 1.0
CHECKPOINT_EVERY = 500  # steps; at the default sizes about a minute of an H200
PROGRESS_S = 30.0


class Batch(NamedTuple):
    """Noised clips (B, 3, T, H, W), their timesteps (B,), and the velocity to predict."""

    noised: Tensor
    t: Tensor
    velocity: Tensor


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def draw_batch(clips: Clips, count: int, *key: object) -> Batch:
    """A training batch that depends on its key alone; timesteps are spread evenly over [0, 1]."""
    clean = clips.batch(count, *key)
    generator = torch.Generator(clean.device).manual_seed(derive_seed("noise", *key))
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    offsets = torch.rand(count, generator=generator, device=clean.device)
    t = (torch.arange(count, device=clean.device) + offsets) / count
    return mix(clean, noise, t)


def mix(clean: Tensor, noise: Tensor, t: Tensor) -> Batch:
    weight = t.view(-1, 1, 1, 1, 1)
    return Batch(torch.lerp(clean, noise, weight), t, noise - clean)


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate at a step counted from 0: linear warm-up, then a cosine to zero."""
    warmup = min(WARMUP, steps // 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(
    model: VideoDiT,
    groups: list[dict[str, Any]],
    clips: Clips,
    *,
    steps: int,
    batch: int,
    dtype: torch.dtype,
    seed: int | str,
    checkpoint: Path,
    title: str,
) -> list[float]:
    """AdamW on the flow loss; returns the loss of every step.

    seed: of clips, noise and timesteps: equal seeds see equal batches, whatever the model.
    checkpoint: file for the state every CHECKPOINT_EVERY steps; where it exists, training goes on
    from it. It is deleted at the end.
    Raises RuntimeError naming the first step whose loss is not finite.
    """
    device = model.head.weight.device
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    rates = [float(group["lr"]) for group in groups]
    trained = [p for group in groups for p in group["params"]]
    losses = torch.zeros(steps, device=device)  # read at the end: reading waits for the GPU
    done = _load(checkpoint, model, optimizer, losses)
    began = reported = time.perf_counter()
    model.train()
    for step in range(done, steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate(step, steps)
        noised, t, velocity = draw_batch(clips, batch, seed, step)
        with autocast(device, dtype):
            predicted = model(noised, t)
        loss = F.mse_loss(predicted, velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            _save(checkpoint, model, optimizer, losses, step + 1)
        if time.perf_counter() - reported > PROGRESS_S:
            reported = time.perf_counter()
            rate = (reported - began) / (step + 1 - done)
            print(
                f"{title}: step {step + 1}/{steps}, loss {loss.item():.4f}, {rate:.3f} s/step",
                file=sys.stderr,
                flush=True,
            )
    values: list[float] = losses.tolist()
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise RuntimeError(f"{title}: the loss of step {step + 1} is {value}")
    checkpoint.unlink(missing_ok=True)
    return values


def _save(
    path: Path, model: VideoDiT, optimizer: torch.optim.Optimizer, losses: Tensor, done: int
) -> None:
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": x for name, x in moments.items()}
    tensors["losses"] = losses
    data = safetensors.torch.save(
        {name: x.detach().contiguous() for name, x in tensors.items()}, {"done": str(done)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _load(path: Path, model: VideoDiT, optimizer: torch.optim.Optimizer, losses: Tensor) -> int:
    """Restores the state and returns the steps done; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, framework="pt", device=str(losses.device)) as content:
        done = int(content.metadata()["done"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    losses.copy_(tensors.pop("losses"))
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "model":
            weights[rest] = x
        else:
            index, key = rest.split(".")
            moments.setdefault(int(index), {})[key] = x
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return done


# ---- evaluation ---------------------------------------------------------------------------------


class HeldOut:
    """Clips of unseen photographs with fixed noise at fixed timesteps."""

    def __init__(self, clips: Clips, *, count: int, timesteps: int, batch: int) -> None:
        self._clips, self._count, self._timesteps, self._batch = clips, count, timesteps, batch

    def batches(self) -> Iterator[Batch]:
        """Every clip at every timestep, in batches of one timestep."""
        for first in range(0, self._count, self._batch):
            size = min(self._batch, self._count - first)
            clean = self._clips.batch(size, "held-out", first)
            generator = torch.Generator(clean.device)
            for index in range(self._timesteps):
                generator.manual_seed(derive_seed("held-out", first, index))
                noise = torch.randn(clean.shape, generator=generator, device=clean.device)
                t = torch.full((size,), (index + 0.5) / self._timesteps, device=clean.device)
                yield mix(clean, noise, t)


@torch.no_grad()
def evaluate(model: VideoDiT, held_out: HeldOut, dtype: torch.dtype) -> dict[str, Any]:
    """Held-out loss, and the relative L2 error of each layer's attention.

    The error is against full attention on the q, k, v that the layer meets in this model.
    """
    device = model.head.weight.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    elements = 0
    model.eval()
    with attention_errors(model) as layer_errors, autocast(device, dtype):
        for noised, t, velocity in held_out.batches():
            predicted = model(noised, t)
            loss += (predicted - velocity).double().square().sum()
            elements += velocity.numel()
    errors = layer_errors()
    value = loss.item() / elements
    if not all(map(math.isfinite, (value, *errors))):
        raise RuntimeError(f"the held-out loss is {value}, the errors of attention are {errors}")
    return {"loss": value, "attention_error": sum(errors) / len(errors), "layer_errors": errors}


@contextmanager
def attention_errors(model: VideoDiT) -> Iterator[Callable[[], list[float]]]:
    """Compares every attention inside the block with full attention on the same q, k, v.

    Yields a function that returns ||out - full|| / ||full|| of each layer so far.
    """
    names = attention_names(model)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=model.head.weight.device)
    hooks = []
    for index, name in enumerate(names):

        def compare(_: nn.Module, qkv: tuple[Tensor, ...], out: Tensor, index: int = index) -> None:
            q, k, v = (x.transpose(1, 2) for x in qkv)
            full = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).float()
            sums[index, 0] += (out.float() - full).square().sum()
            sums[index, 1] += full.square().sum()

        hooks.append(model.get_submodule(name).register_forward_hook(compare))
    try:
        yield lambda: (sums[:, 0] / sums[:, 1]).sqrt().tolist()
    finally:
        for hook in hooks:
            hook.remove()
