"""What a fit learns from: recorded samples of one layer, each with full attention's output."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Grid
from .samples import SampleFile, fingerprint, list_files, read_form, read_sample


class RecordedLayer(NamedTuple):
    """The files of a layer and what they have in common; batch sizes may differ."""

    name: str
    files: tuple[SampleFile, ...]
    dtype: torch.dtype
    tokens: int
    heads: int
    head_dim: int
    grid: Grid | None

    def fingerprints(self) -> dict[str, str]:
        """Of the samples, by the recorder's numbers."""
        return {str(file.call): fingerprint(file) for file in self.files}


class Problem(NamedTuple):
    """q, k, v and what SLA2 should compute of them, each (B, N, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    target: Tensor


def scan_layers(folder: str | os.PathLike[str], names: Iterable[str] | None) -> list[RecordedLayer]:
    """The layers recorded in `folder`, or those of `names`, in the order of `read_samples`.

    Reads the headers of all their files: what does not fit is found before hours of work. Raises
    ValueError for no samples, layers that are not there, samples of one layer that differ in N, H,
    D, dtype or grid, empty ones, and damaged files; TypeError for a str in place of names; OSError.
    """
    if isinstance(names, str):
        raise TypeError(f"layers must be a collection of names; did you mean [{names!r}]?")
    files: dict[str, list[SampleFile]] = {}
    for file in list_files(folder):
        files.setdefault(file.layer, []).append(file)
    if not files:
        raise ValueError(f"the folder {folder} holds no samples")
    chosen = set(files) if names is None else set(names)
    if not chosen:
        raise ValueError("layers is empty: there is nothing to fit")
    if unknown := sorted(chosen - set(files)):
        raise ValueError(
            f"the folder {folder} holds no samples of layers {unknown}, only: {', '.join(files)}"
        )
    return [_describe(name, tuple(own)) for name, own in files.items() if name in chosen]


def _describe(name: str, files: tuple[SampleFile, ...]) -> RecordedLayer:
    first = read_form(files[0])
    grid, grid_file = first.grid, files[0]
    for file in files:
        form = read_form(file)
        if math.prod(form.shape) == 0:
            raise ValueError(f"layer {name!r}: {file.path} is empty: q has shape {form.shape}")
        if form.shape[1:] != first.shape[1:] or form.dtype != first.dtype:
            raise ValueError(
                f"layer {name!r}: its samples must agree in dtype, N, H and D. {files[0].path} has "
                f"{first.dtype} (B, N, H, D) = {first.shape}, {file.path} has {form.dtype} "
                f"{form.shape}. A router file belongs to one token grid: record each into a folder "
                "of its own"
            )
        if grid is None:
            grid, grid_file = form.grid, file
        if form.grid not in (None, grid):
            raise ValueError(
                f"layer {name!r}: its samples must agree in their grid. {grid_file.path} has "
                f"{grid}, {file.path} has {form.grid}: record each into a folder of its own"
            )
    _, tokens, heads, head_dim = first.shape
    return RecordedLayer(name, files, first.dtype, tokens, heads, head_dim, grid)


class ProblemLoader:
    """The samples of a layer as problems on `device`, by index.

    The first ones that fit into `cache_bytes` stay there with their targets. The others are read
    again every time, one at a time, and full attention is computed again: with the same bits.
    """

    def __init__(
        self,
        layer: RecordedLayer,
        device: torch.device,
        dtype: torch.dtype | None,
        cache_bytes: int,
    ) -> None:
        self._files = layer.files
        self._device = device
        self._dtype = dtype
        self._cache: dict[int, Problem] = {}
        self._free = cache_bytes

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The name of the sample's file."""
        return self._files[index].path.name

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Problem:
        if index in self._cache:
            return self._cache[index]
        sample = read_sample(self._files[index])
        q, k, v = (x.to(self._device, self._dtype) for x in (sample.q, sample.k, sample.v))
        problem = Problem(q, k, v, full_attention(q, k, v))
        size = sum(x.numel() * x.element_size() for x in problem)
        if size <= self._free:
            self._free -= size
            self._cache[index] = problem
        return problem


@torch.no_grad()
def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V: q, k, v (B, N, H, D) -> (B, N, H, D), contiguous."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def draw_batch(seed: str, step: int, batch: int, count: int) -> list[int]:
    """The samples of step 0, 1, ..: every epoch is a permutation of all `count` of its own.

    A function of its arguments alone, so a resumed fit needs no generator's state.
    """
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, count)
        if epoch not in order:
            order[epoch] = list(range(count))
            random.Random(f"{seed}/{epoch}").shuffle(order[epoch])
        chosen.append(order[epoch][place])
    return chosen
