"""Records the q, k, v that reach attention: the input of stage 1.

Which calls are kept is bottom-k sampling. Every call of a layer draws a random priority, and the
`max_samples_per_layer` smallest stay: a uniform choice among all calls, whatever their number,
where keeping the first ones would see the first timesteps alone. The choice is made before the
tensors are touched, and it needs nothing but the priorities of the files that are there, so a
recording can be continued later. A session with a seed also needs its number, or it would draw
the priorities of an earlier one again: the file `sessions` counts them. The next call's number
would not do: a session of which nothing was kept leaves it as it was.
"""

from __future__ import annotations

import heapq
import inspect
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checks import LAYOUTS, Grid, check_choice, check_flag, check_grid_of, check_tensor
from ..module import SLA2Attention
from .samples import (
    list_files,
    read_priority,
    read_sessions,
    safetensors_files,
    write_sample,
    write_sessions,
)

_Kept = tuple[float, int, Path]  # priority, call, file
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class QKVRecorder:
    """Context manager: samples the q, k, v that the layers of `model` compute attention from.

    Args:
        model: holds the layers.
        folder: receives the files, created when absent; `read_samples` reads them.
        layers: what to record, by a forward pre-hook: names of modules of `model`, or a mapping
            from names of your own to modules of it. Their forward has to take q, k, v. None: every
            `SLA2Attention`. (): none, where attention code calls `record` itself.
        max_samples_per_layer: files kept of a layer, a uniform random choice among its calls. One
            takes 3 B N H D elements of disk.
        dtype: floating dtype of the files; None: as the tensors come. Inside a hooked module under
            autocast that may be wider than what attention computes in.
        layout: of the tensors, "BNHD" or "BHND"; an `SLA2Attention` has its own.
        seed: an int makes the choice reproducible: the same calls and seed, session by session,
            keep the same samples. None: another choice every time.
        append: continue the recording in `folder`; its samples count toward the limit. Without
            append, a folder with safetensors files is refused.

    A sample is on disk when the call that brought it goes on; that waits for the device. An
    exception, also one from here, ends the recording but damages no sample. Inputs are never
    written and not kept, neither is their autograd graph. Hooks exist inside the `with` alone, and
    a copy of the model made meanwhile is not recorded; on leaving it without an exception, hooked
    layers that were never called get a RuntimeWarning.
    Record an uncompiled model, outside CUDA graph capture, from one thread, without gradient
    checkpointing (its second forward would count again).

    Raises TypeError / ValueError for wrong arguments and for layers that cannot be recorded.
    Entering raises FileExistsError for a folder that holds files, ValueError for files that cannot
    be continued, OSError for a folder that cannot be made.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        layers: Mapping[str, nn.Module] | Iterable[str] | None = None,
        max_samples_per_layer: int = 16,
        dtype: torch.dtype | None = None,
        layout: str = "BNHD",
        seed: int | None = None,
        append: bool = False,
    ) -> None:
        if isinstance(max_samples_per_layer, bool) or not isinstance(max_samples_per_layer, int):
            raise TypeError(f"max_samples_per_layer must be an int; got {max_samples_per_layer!r}")
        if isinstance(seed, bool) or not (seed is None or isinstance(seed, int)):
            raise TypeError(f"seed must be an int or None; got {seed!r}")
        if max_samples_per_layer < 1:
            raise ValueError(f"max_samples_per_layer={max_samples_per_layer} is less than 1")
        if dtype is not None:
            _check_dtype("dtype", dtype)
        check_choice("layout", layout, LAYOUTS)
        check_flag("append", append)
        self._modules = _resolve_layers(model, layers)
        self._folder = Path(folder)
        self._limit = max_samples_per_layer
        self._dtype = dtype
        self._layout = layout
        self._given_seed = seed
        self._append = append
        self._active = False
        self._seed = ""
        self._timestep: float | None = None
        self._hooks: list[RemovableHandle] = []
        self._reservoirs: dict[str, _Reservoir] = {}
        self._called: set[str] = set()

    # ---- the with statement -------------------------------------------------------------------

    def __enter__(self) -> QKVRecorder:
        if self._active:
            raise RuntimeError("this QKVRecorder is already recording")
        self._folder.mkdir(parents=True, exist_ok=True)
        samples = self._existing_samples()
        self._seed = self._begin_session()
        self._reservoirs = {
            name: _Reservoir(self._seed, name, own) for name, own in samples.items()
        }
        self._timestep = None
        self._called.clear()
        for name, module in self._modules.items():
            hook = self._make_hook(name, module)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._active = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        missed = [name for name in self._modules if name not in self._called]
        if missed and kind is None:
            warnings.warn(
                f"nothing was recorded of {', '.join(missed)}: never called inside the with",
                RuntimeWarning,
                stacklevel=2,
            )

    def _begin_session(self) -> str:
        """The seed of this session. One that was given is another in each of them, also after a
        session that was killed."""
        if self._given_seed is None:
            return str(random.SystemRandom().getrandbits(64))
        session = read_sessions(self._folder) if self._append else 0
        write_sessions(self._folder, session + 1)
        return f"{self._given_seed}/{session}"

    def _existing_samples(self) -> dict[str, list[_Kept]]:
        if not self._append:
            present = safetensors_files(self._folder)
            if present:
                raise FileExistsError(
                    f"the folder {self._folder} already holds {len(present)} safetensors files, "
                    f"such as {present[0].name}: choose another folder, or continue a recording "
                    "with append=True"
                )
            return {}
        samples: dict[str, list[_Kept]] = {}
        for file in list_files(self._folder):
            entry = (read_priority(file), file.call, file.path)
            samples.setdefault(file.layer, []).append(entry)
        return samples

    # ---- recording ----------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        """Samples on disk of each layer, those of an earlier recording included."""
        return {name: len(reservoir) for name, reservoir in self._reservoirs.items()}

    def step(self, timestep: float | Tensor | None) -> None:
        """The diffusion timestep of the calls from here on: a number or a tensor of one element.

        None: unknown. Raises TypeError / ValueError for anything else and for what is not finite.
        """
        self._timestep = _as_timestep(timestep)

    def record(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, *, step: float | Tensor | None = None
    ) -> None:
        """Offers one call of attention, for code that no hook reaches (an attention processor).

        layer: a name of your own. q, k, v: of one shape, dtype and device, (B, N, H, D) or the
        recorder's layout, floating, of any strides. step: the timestep; None: that of `step()`.

        Raises RuntimeError outside the `with`, TypeError / ValueError for other tensors, OSError
        naming the file where it cannot be written.
        """
        self._offer(layer, (q, k, v), self._layout, step, None)

    def _make_hook(
        self, name: str, module: nn.Module
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        signature = inspect.signature(module.forward)
        layout = module.layout if isinstance(module, SLA2Attention) else self._layout

        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if called is not module or not self._active:
                return  # a copy of the model, which took the hook along
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()  # a q, k or v left out becomes an error that names it
            q, k, v = (bound.arguments[tensor] for tensor in "qkv")
            # GridAttention is told the grid of a call, where it is not its own.
            grid = bound.arguments.get("grid")
            grid = getattr(module, "grid", None) if grid is None else grid
            self._offer(name, (q, k, v), layout, None, grid)

        return hook

    def _offer(
        self,
        layer: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        layout: str,
        step: float | Tensor | None,
        grid: Any,
    ) -> None:
        if not self._active:
            raise RuntimeError("record() belongs inside the recorder's with statement")
        _check_layer_name(layer)
        _check_tensors(layer, qkv, layout)
        timestep = self._timestep if step is None else _as_timestep(step)
        self._called.add(layer)
        reservoir = self._reservoirs.setdefault(layer, _Reservoir(self._seed, layer, []))
        call, priority = reservoir.draw()
        if not reservoir.takes(priority, self._limit):
            return
        stored = [_as_stored(x, layout, self._dtype) for x in qkv]
        known = _as_grid(grid, stored[0].shape[1])
        path = write_sample(self._folder, call, priority, layer, timestep, known, stored)
        reservoir.add(priority, call, path, self._limit)


class _Reservoir:
    """The samples of one layer that are on disk; a heap with the largest priority first."""

    def __init__(self, seed: str, layer: str, samples: list[_Kept]) -> None:
        self._heap = [(-priority, call, path) for priority, call, path in samples]
        heapq.heapify(self._heap)
        self._next_call = 1 + max((call for _, call, _ in samples), default=-1)
        # A layer's own generator: the choice does not depend on how the calls of layers interleave.
        self._random = random.Random(f"{seed}/{layer}")

    def __len__(self) -> int:
        return len(self._heap)

    def draw(self) -> tuple[int, float]:
        """Number and priority of the next call."""
        call = self._next_call
        self._next_call += 1
        return call, self._random.random()

    def takes(self, priority: float, limit: int) -> bool:
        """Whether a sample of that priority is among the `limit` smallest."""
        return len(self) < limit or priority < -self._heap[0][0]

    def add(self, priority: float, call: int, path: Path, limit: int) -> None:
        """Adds a written sample, then deletes what is beyond the limit: a crash between the two
        leaves a sample too many, never one too few."""
        heapq.heappush(self._heap, (-priority, call, path))
        while len(self) > limit:
            heapq.heappop(self._heap)[2].unlink(missing_ok=True)


def _resolve_layers(
    model: nn.Module, layers: Mapping[str, nn.Module] | Iterable[str] | None
) -> dict[str, nn.Module]:
    """Name -> module of everything to hook."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    members = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[str, nn.Module]
    if layers is None:
        # The model itself has the empty name.
        chosen = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if isinstance(module, SLA2Attention)
        }
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} holds no SLA2Attention: name the modules whose forward "
                "takes q, k, v (layers=...), or pass layers=() and call record()"
            )
    elif isinstance(layers, Mapping):
        chosen = dict(layers)
    elif isinstance(layers, str):
        raise TypeError(f"layers must be a collection of names; did you mean [{layers!r}]?")
    else:
        names = list(layers)
        unknown = [name for name in names if name not in members]
        if unknown:
            raise ValueError(f"{type(model).__name__} has no modules named {unknown}")
        chosen = {name: members[name] for name in names}
    own = {id(module) for module in members.values()}
    for name, module in chosen.items():
        _check_layer_name(name)
        if not isinstance(module, nn.Module):
            raise TypeError(f"layers[{name!r}] must be a module; got {type(module).__name__}")
        if id(module) not in own:
            raise ValueError(f"layers[{name!r}] is not a module of {type(model).__name__}")
        parameters = list(inspect.signature(module.forward).parameters)
        if not {"q", "k", "v"} <= set(parameters):
            raise TypeError(
                f"the forward of layer {name!r}, a {type(module).__name__}, takes "
                f"({', '.join(parameters)}): q, k and v cannot be told from these. Name the module "
                "that takes q, k, v, or call record() where they are computed"
            )
    return chosen


def _check_layer_name(layer: str) -> None:
    if not isinstance(layer, str):
        raise TypeError(f"the name of a layer must be a str; got {type(layer).__name__}")
    if not layer:
        raise ValueError("the name of a layer must not be empty")


def _check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"{what} must be one of {', '.join(map(str, _DTYPES))}; got {dtype}")


def _check_tensors(layer: str, qkv: tuple[Tensor, Tensor, Tensor], layout: str) -> None:
    dims, q = f"({', '.join(layout)})", qkv[0]
    for name, x in zip("qkv", qkv, strict=True):
        check_tensor(f"layer {layer!r}: {name}", x)
        _check_dtype(f"layer {layer!r}: the dtype of {name}", x.dtype)
        if x.dim() != 4:
            raise ValueError(f"layer {layer!r}: {name} must be {dims}; got {tuple(x.shape)}")
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"layer {layer!r}: q, k and v must agree; got q {tuple(q.shape)} {q.dtype} on "
                f"{q.device} and {name} {tuple(x.shape)} {x.dtype} on {x.device}. SLA2 is "
                "self-attention: leave cross-attention layers out"
            )


def _as_timestep(timestep: float | Tensor | None) -> float | None:
    if timestep is None:
        return None
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            raise ValueError(f"a timestep has one element; got shape {tuple(timestep.shape)}")
        timestep = timestep.item()
    if isinstance(timestep, bool) or not isinstance(timestep, (int, float)):
        raise TypeError(f"a timestep must be a number; got {timestep!r}")
    if not math.isfinite(timestep):
        raise ValueError(f"a timestep must be finite; got {timestep}")
    return float(timestep)


def _as_grid(grid: Any, tokens: int) -> Grid | None:
    """`grid`, of a hooked module, where it is one of so many tokens: a module may have another
    thing by that name."""
    try:
        return check_grid_of(grid, tokens)
    except (TypeError, ValueError):
        return None


def _as_stored(x: Tensor, layout: str, dtype: torch.dtype | None) -> Tensor:
    """A contiguous CPU copy (B, N, H, D); always a copy, because a file takes no shared memory."""
    x = x.detach() if layout == "BNHD" else x.detach().transpose(1, 2)
    return x.to("cpu", dtype or x.dtype, copy=True, memory_format=torch.contiguous_format)
