"""`sla2.apply` and what works on a model that it was called for."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint import find_layers
from ..checks import (
    Grid,
    Shape,
    check_choice,
    check_grid,
    check_layer_options,
    check_quant,
    num_tokens,
    resolve_num_kv_blocks,
)
from ..env import why_not
from ..module import SLA2Attention
from .adapter import Adapter, find_adapter
from .pretrained import load_parameters, reject_dropped_parameters
from .processor import MISMATCHES, Dispatch, GridAttention, SLA2Processor
from .report import ApplyReport

# Where a model holds its Dispatch: an attribute, which a deep copy takes along.
_ATTRIBUTE = "_sla2_dispatch"
# What `apply` knows of a layer by itself, or has an argument for.
_OWN_OPTIONS = ("num_heads", "head_dim", "seq_len", "grid", "layout", "device", "topk", "quant")


def apply(
    model: nn.Module,
    *,
    topk: float = 0.03,
    quant: str = "none",
    grid: Sequence[int] | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    dense_blocks: Iterable[int] = (),
    min_tokens: int = 0,
    on_mismatch: str = "error",
    layer_options: Mapping[str, Any] | None = None,
    router: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> ApplyReport:
    """Makes the self-attention of a diffusers model SLA2, in place; cross-attention stays.

    Every self-attention layer gets a processor that is a module with an `SLA2Attention`, on the
    layer's device: its parameters are part of the model. The layer's projections, norms and rotary
    embedding are used as they are.

    Args:
        model: a `WanTransformer3DModel` or `LTXVideoTransformer3DModel` of diffusers, or what an
            adapter of your own handles; of a pipeline its `transformer`.
        topk, quant: of every layer, as in `sla2_attention`.
        grid: (frames, rows, columns) of tokens, after patching: (21, 30, 52) for Wan at 480p and
            81 frames. Or the video that has it: num_frames, height and width in pixels.
        dense_blocks: indices of the blocks, from 0, whose self-attention stays as it is.
        min_tokens: calls with fewer tokens run dense attention, whatever their grid; logged once.
        on_mismatch: what a call with another grid does: "error", "dense" (dense attention), or
            "interpolate" (alpha, which belongs to the grid, is interpolated linearly).
        layer_options: further arguments of `SLA2Attention`, such as {"per_head_router": True}, but
            those that follow from the model and from the arguments here.
        router: parameters to start with: a file of `sla2.save_router`, or a checkpoint (folder or
            safetensors file) that was saved with SLA2 in the model, without settings to compare.
            None: an untrained router; where the model came from such a checkpoint, that is an
            error, because loading has dropped them. "new": an untrained router all the same.
        force: replace an earlier `apply`, whose parameters are lost.

    Returns what was replaced, to be printed. Where an error is raised the model is as before,
    but for an earlier `apply` that `force` has removed.

    Raises:
        TypeError: no adapter for the model; arguments of wrong types.
        ValueError: arguments out of range or at odds with the model; nothing left to replace;
            `router` None or a file that does not fit.
        RuntimeError: SLA2 is applied already; the device cannot run it.
    """
    adapter = find_adapter(model)
    if _ATTRIBUTE in vars(model):
        if not force:
            count = len(_processors(model))
            raise RuntimeError(
                f"SLA2 is applied to this {type(model).__name__} already ({count} layers). "
                "sla2.set_topk and sla2.set_stage change it; sla2.remove(model) ends it, and "
                "force=True starts anew"
            )
        remove(model)
    check_quant(quant)
    check_choice("on_mismatch", on_mismatch, MISMATCHES)
    parameters = inspect.signature(SLA2Attention).parameters
    options = check_layer_options(layer_options, parameters, _OWN_OPTIONS, "apply")
    if isinstance(min_tokens, bool) or not isinstance(min_tokens, int):
        raise TypeError(f"min_tokens must be an int; got {min_tokens!r}")
    tokens_grid = _resolve_grid(adapter, model, grid, (num_frames, height, width))
    layers = adapter.self_attention(model)
    dense = _names_of(layers, dense_blocks)
    replaced = [name for name in layers if name not in dense]
    if not replaced:
        classes = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"nothing to replace in {type(model).__name__}: {len(layers)} self-attention layers, "
            f"{len(dense)} of them in dense_blocks. Classes seen: {', '.join(classes)}"
        )
    if router is None:
        reject_dropped_parameters(model)

    dispatch = Dispatch(adapter, tokens_grid, min_tokens, on_mismatch)
    options |= {"topk": topk, "quant": quant}
    processors = {name: _make_processor(name, layers[name], dispatch, options) for name in replaced}
    skipped = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "set_processor") and name not in layers
    ]
    for name, processor in processors.items():
        layers[name].set_processor(processor)
    setattr(model, _ATTRIBUTE, dispatch)
    dispatch.attach(model)
    try:
        if router is not None and router != "new":
            load_parameters(model, {name: p.sla2 for name, p in processors.items()}, router)
    except BaseException:
        remove(model)
        raise
    return ApplyReport(
        model=type(model).__name__,
        adapter=adapter.name,
        grid=tokens_grid,
        topk=topk,
        quant=quant,
        replaced=tuple(replaced),
        dense=tuple(dense),
        skipped=tuple(skipped),
        parameters=sum(x.numel() for p in processors.values() for x in p.sla2.parameters()),
        runs_dense=num_tokens(tokens_grid) < min_tokens,
    )


def remove(model: nn.Module) -> int:
    """Undoes `apply`: the layers get back the processors they had, and compute the same bits.

    The SLA2 parameters are gone; `sla2.save_router` keeps them. Layers whose processor somebody
    else has replaced since are left alone. Returns the number of layers restored; raises ValueError
    where SLA2 is not applied.
    """
    count = 0
    for root in _roots(model):
        for attn, processor in _processors(root):
            attn.set_processor(processor.original)
            count += 1
        _dispatch(root).detach()
        delattr(root, _ATTRIBUTE)
    return count


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, `model` runs the attention it had before `apply`, at any grid.

    For steps of a sampling loop that shall stay dense, and for comparing; may be nested. With
    gradient checkpointing the backward pass belongs inside too, because it runs layers again.
    Raises ValueError where SLA2 is not applied.
    """
    dispatches = [_dispatch(root) for root in _roots(model)]
    for dispatch in dispatches:
        dispatch.dense_scopes += 1
    try:
        yield
    finally:
        for dispatch in dispatches:
            dispatch.dense_scopes -= 1


def set_topk(model: nn.Module, topk: float) -> None:
    """Sets the share of key blocks kept, a float in (0, 1], of every `SLA2Attention` in `model`.

    The parameters stay, although router and alpha are trained for one share. A compiled model is
    compiled again. Raises TypeError / ValueError, having changed nothing.
    """
    layers = find_layers(model).values()
    for layer in layers:
        shape = Shape(1, layer.seq_len, layer.num_heads, layer.head_dim)
        resolve_num_kv_blocks(topk, None, shape)
    for layer in layers:
        layer.topk = topk


def set_stage(model: nn.Module, stage: int) -> None:
    """`SLA2Attention.set_stage` of every `SLA2Attention` in `model`: 1 trains the router, 2 alpha.

    Freezing the rest of the model is the caller's part. Call it after adding a PEFT adapter, which
    freezes what it does not save; the copies that PEFT keeps unused stay frozen. Raises ValueError
    for another stage, and where `model` has no such layer.
    """
    for name, layer in find_layers(model).items():
        layer.set_stage(stage)
        if name.endswith(".original_module"):
            layer.requires_grad_(False)


# ---- parts of apply -----------------------------------------------------------------------------


def _resolve_grid(
    adapter: Adapter,
    model: nn.Module,
    grid: Sequence[int] | None,
    video: tuple[int | None, int | None, int | None],
) -> Grid:
    if grid is not None:
        if video != (None, None, None):
            raise ValueError("pass grid, or num_frames, height and width, not both")
        return check_grid(grid)
    frames, height, width = video
    if frames is None or height is None or width is None:
        raise ValueError(
            "alpha belongs to one token grid: pass grid=(frames, rows, columns) of tokens, or all "
            "of num_frames, height and width of the video"
        )
    return adapter.video_grid(model, frames, height, width)


def _names_of(layers: Mapping[str, Any], indices: Iterable[int]) -> list[str]:
    """The layers' names, in the model's order."""
    chosen, names = set(indices), list(layers)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"dense_blocks must hold ints; got {index!r}")
        if not 0 <= index < len(names):
            raise ValueError(
                f"dense_blocks has {index}: the {len(names)} blocks are 0..{len(names) - 1}"
            )
    return [name for i, name in enumerate(names) if i in chosen]


def _make_processor(
    name: str, attn: Any, dispatch: Dispatch, options: Mapping[str, Any]
) -> SLA2Processor:
    original = attn.processor
    if getattr(original, "_parallel_config", None) is not None:
        raise RuntimeError(
            f"{name} runs under diffusers' context parallelism, which SLA2 does not: each rank has "
            "a part of the tokens, and the router ranks all of them"
        )
    heads, head_dim = dispatch.adapter.heads(attn)
    first = next(attn.parameters())
    # float32 and quantised weights: autocast or the layer decides what q, k, v will be.
    dtype = first.dtype if first.dtype in (torch.bfloat16, torch.float16) else None
    if not first.is_meta:
        reason = why_not(first.device, dtype=dtype, quant=options["quant"], head_dim=head_dim)
        if reason is not None:
            raise RuntimeError(f"{name}: {reason}")
    elif hasattr(attn.to_out[0], "_hf_hook"):
        raise RuntimeError(
            f"{name} is offloaded module by module, and a module added now would not be: call "
            "sla2.apply first, then enable_sequential_cpu_offload"
        )
    layer = GridAttention(
        heads, head_dim, grid=dispatch.grid, layout="BNHD", device=first.device, **options
    )
    processor = SLA2Processor(layer, original, dispatch)
    return processor.train(attn.training)


def _dispatch(root: nn.Module) -> Dispatch:
    found: Dispatch = vars(root)[_ATTRIBUTE]
    return found


def _roots(model: nn.Module) -> list[nn.Module]:
    """The modules that `apply` was called for: `model`, or what it wraps."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    roots = [module for module in model.modules() if _ATTRIBUTE in vars(module)]
    if not roots:
        raise ValueError(f"SLA2 is not applied to this {type(model).__name__}: see sla2.apply")
    return roots


def _processors(root: nn.Module) -> list[tuple[Any, SLA2Processor]]:
    """The layers that still have the processor that `apply` gave them."""
    pairs = ((module, getattr(module, "processor", None)) for module in root.modules())
    return [(attn, found) for attn, found in pairs if isinstance(found, SLA2Processor)]
