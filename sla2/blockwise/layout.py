"""What the passes share: head groups, padded blocks, block lists, alpha, scratch memory."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..constants import BLOCK_K, BLOCK_Q

P = ParamSpec("P")
R = TypeVar("R")

# Elements of the scores of one step, on a CPU per thread. There they should stay in the caches, yet
# few large steps suffer less from a busy machine: 2^15, 16, .. 21: 243 237 221 199 195 193 202 ms
# (2 EPYC cores, B1 H2 N32760 D64, 97 %, float32). A GPU needs enough work per launch.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
# Elements of q, k and v that are held in the compute type at a time: whole heads, at least one.
GROUP_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


def chunk_elements(device: torch.device) -> int:
    """How many scores one step may hold on this device."""
    if device.type == "cpu":
        return CHUNK_ELEMENTS["cpu"] * torch.get_num_threads()
    return CHUNK_ELEMENTS["cuda"]


def group_elements(device: torch.device) -> int:
    """How many elements of q, k or v may be held in the compute type on this device."""
    return GROUP_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of the arithmetic: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def plain_math(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` without autograd and with autocast off: it would turn products to 16 bit."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


class Scratch:
    """Named buffers that live through all chunks of a pass.

    A fresh tensor of some MiB is a fresh mapping on a CPU: its page faults cost more than the
    product that fills it.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._dtype, self._device = dtype, device

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor; the previous one of this name is lost."""
        numel = 1
        for extent in shape:
            numel *= extent
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=self._dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:numel].view(shape)


# ---- heads and blocks -------------------------------------------------------------------------


def head_groups(x: Tensor, row_elements: int = 0) -> Iterator[tuple[int, slice]]:
    """(batch index, heads) in steps whose operands fit GROUP_ELEMENTS; nothing for an empty x.

    x: (B, N, H, D). row_elements: elements per token if more than D.
    """
    batch, tokens, heads, dim = x.shape
    if x.numel() == 0:
        return
    per_head = tokens * max(dim, row_elements)
    step = max(1, group_elements(x.device) // per_head)
    for b in range(batch):
        for h in range(0, heads, step):
            yield b, slice(h, min(h + step, heads))


def load_blocks(x: Tensor, block: int, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """(N, G, D), any strides -> (G * T + spare, block, D); tail and spare blocks are zero."""
    tokens, heads, dim = x.shape
    blocks = ceil_div(tokens, block)
    out = torch.empty(heads * blocks + spare, block, dim, dtype=dtype, device=x.device)
    rows = token_rows(out, heads, blocks)
    rows[:, :tokens].copy_(x.transpose(0, 1))
    rows[:, tokens:].zero_()
    out[heads * blocks :].zero_()
    return out


def token_rows(blocks: Tensor, heads: int, num_blocks: int) -> Tensor:
    """The blocks of `load_blocks` as rows: a (G, T * block, D) view without the spare blocks."""
    return blocks[: heads * num_blocks].view(heads, -1, blocks.shape[-1])


def store_blocks(blocks: Tensor, out: Tensor) -> None:
    """Inverse of `load_blocks`: blocks (G * T [+ spare], block, D) into out (N, G, D)."""
    tokens, heads, _ = out.shape
    rows = token_rows(blocks, heads, ceil_div(tokens, blocks.shape[1]))
    out.copy_(rows[:, :tokens].transpose(0, 1))


def load_rows(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """(G, N) -> (G * T, block, 1), the tail zero: one value per token."""
    return load_blocks(x.transpose(0, 1)[..., None], block, dtype)


def smooth_(rows: Tensor, tokens: int) -> None:
    """K <- K - colmean(K) in place: rows (G, T * block, D), the first `tokens` of them real."""
    real = rows[:, :tokens]
    real -= real.mean(1, keepdim=True)


# ---- alpha ------------------------------------------------------------------------------------


def load_alpha(alpha_logit: Tensor, heads: slice, tokens: int, dtype: torch.dtype) -> Tensor:
    """alpha = sigmoid(alpha_logit) of these heads: (G, T_m, 1 | BLOCK_Q, 1), BLOCK_Q per token.

    alpha_logit: (T_m,), (H, T_m) or (H, N).
    """
    blocks = ceil_div(tokens, BLOCK_Q)
    alpha = alpha_logit.to(dtype).sigmoid()
    if alpha.dim() == 1:
        return alpha.expand(heads.stop - heads.start, blocks)[..., None, None]
    alpha = alpha[heads]
    if alpha.shape[1] == blocks:
        return alpha[..., None, None]
    return load_rows(alpha, BLOCK_Q, dtype).view(alpha.shape[0], blocks, BLOCK_Q, 1)


def settle_alpha_(alpha: Tensor, empty: Tensor, full: Tensor) -> Tensor:
    """alpha where a branch is missing: 0 with nothing listed, 1 with an empty complement.

    empty, full: bool (G, T_m). Returns alpha as (G * T_m, 1 | BLOCK_Q, 1).
    """
    alpha = alpha.masked_fill(empty[..., None, None], 0.0)
    return alpha.masked_fill_(full[..., None, None], 1.0).flatten(0, 1)


def add_alpha_grad_(grad: Tensor, rows: Tensor, heads: slice, tokens: int) -> None:
    """Sum d(alpha_logit) per token, rows (G, T_m, BLOCK_Q), into grad, shaped like alpha_logit."""
    if grad.dim() == 1:
        grad += rows.sum((0, 2))
    elif grad.shape[1] == rows.shape[1]:
        grad[heads] += rows.sum(2)
    else:
        grad[heads] += rows.flatten(1)[:, :tokens]


# ---- block lists ------------------------------------------------------------------------------


class BlockLists:
    """The lists of a group of G heads, made safe: ascending, distinct, in range.

    Query blocks are numbered g * T_m + i and key blocks g * T_n + j; key block G * T_n is a spare
    one, all zero and hidden, that stands in where a list is shorter than its chunk.

    Attributes: counts (G, T_m) int64, unlisted (G, T_m, T_n) = 1 - M in `dtype`.
    """

    def __init__(self, lut: Tensor, counts: Tensor, tokens: int, dtype: torch.dtype) -> None:
        """lut: (G, T_m, K) uint16; counts: (G, T_m) int32. Entries >= T_n are ignored."""
        heads, blocks_q, width = lut.shape
        blocks_k = ceil_div(tokens, BLOCK_K)
        device = lut.device
        index = lut.to(torch.int64)
        used = torch.arange(width, device=device) < counts[..., None]
        index = index.where(used, blocks_k).clamp_(max=blocks_k).sort(-1).values
        repeated = (index[..., 1:] == index[..., :-1]) & (index[..., 1:] < blocks_k)
        if bool(repeated.any()):
            index[..., 1:].masked_fill_(repeated, blocks_k)
            index = index.sort(-1).values
        self.counts = (index < blocks_k).sum(-1)
        unlisted = torch.ones(heads, blocks_q, blocks_k + 1, dtype=dtype, device=device)
        self.unlisted = unlisted.scatter_(2, index, 0.0)[..., :blocks_k]

        self._spare = heads * blocks_k
        offsets = torch.arange(heads, device=device)[:, None, None] * blocks_k
        self._index = (index + offsets).where(index < blocks_k, self._spare).flatten(0, 1)
        self._hidden = torch.zeros(self._spare + 1, BLOCK_K, dtype=torch.bool, device=device)
        self._hidden[self._spare] = True
        tail = tokens - (blocks_k - 1) * BLOCK_K
        self._hidden[blocks_k - 1 : self._spare : blocks_k, tail:] = True
        self._partial = self._hidden.any(1)

    @property
    def empty(self) -> Tensor:
        """Bool (G, T_m): query blocks without any listed key block."""
        return self.counts == 0

    @property
    def full(self) -> Tensor:
        """Bool (G, T_m): query blocks whose complement is empty."""
        return self.counts == self.unlisted.shape[-1]

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(query blocks (R,), their key blocks (R, W)) that together cover every non-empty list.

        Lists of like length share a chunk, so that little of W is padding.
        """
        order = self.counts.flatten().argsort(stable=True)
        counts = self.counts.flatten()[order].tolist()
        budget = chunk_elements(order.device) // (BLOCK_Q * BLOCK_K)
        start = bisect_right(counts, 0)
        while start < len(counts):
            stop = start + 1
            widest = 2 * counts[start]
            while (
                stop < len(counts)
                and counts[stop] <= widest
                and (stop + 1 - start) * counts[stop] <= budget
            ):
                stop += 1
            rows = order[start:stop]
            yield rows, self._index[rows, : counts[stop - 1]]
            start = stop

    def hide_(self, scores: Tensor, blocks: Tensor) -> None:
        """Put -inf on padding: scores (R, BLOCK_Q, W * BLOCK_K) of key blocks (R, W), in place."""
        partial = self._partial[blocks].any(1).nonzero().flatten()
        # Few query blocks list the short last key block: mask those alone.
        if partial.numel():
            hidden = self._hidden[blocks[partial]].flatten(1)[:, None]
            scores[partial] = scores[partial].masked_fill_(hidden, float("-inf"))
