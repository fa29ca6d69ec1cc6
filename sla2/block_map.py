"""Which key blocks each query block attends to exactly: what the router finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_lists, check_tensor, num_k_blocks, num_q_blocks
from .constants import BLOCK_K, BLOCK_Q

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Fills the unused end of a list. It is no key block for any supported length, so that even a reader
# that overlooks `counts` cannot take it for one.
_UNUSED = 0xFFFF


class BlockMap:
    """Lists of selected key blocks, M of "SLA2, arXiv 2602.12675" in compressed form.

    lut: (B, H, T_m, K) uint16, per query block the selected key blocks, ascending.
    counts: (B, H, T_m) int32, how many entries of each list are used; 0 means that the query block
    attends to no
        key exactly.
    seqlen: N, from which T_m = ceil(N / 128) and T_n = ceil(N / 64) follow.

    Made by `sla2.route`, by `BlockMap.from_dense`, or from lists of your own. The constructor
    checks shapes and dtypes (ValueError, TypeError); `validate` checks the entries. Entries outside
    [0, T_n) are ignored by every operation, never followed. The tensors must not be written to
    while the map is in use.
    """

    def __init__(self, lut: Tensor, counts: Tensor, *, seqlen: int) -> None:
        check_lists(lut, counts, seqlen)
        self.lut = lut
        self.counts = counts
        self.seqlen = seqlen
        # Listed blocks of all lists together; None: ask `counts`.
        self._num_listed: int | None = None

    @classmethod
    def _from_router(cls, lut: Tensor, counts: Tensor, seqlen: int) -> BlockMap:
        """The router fills every list, so the total is known without asking the device."""
        block_map = cls.__new__(cls)  # nothing to check
        block_map.lut = lut
        block_map.counts = counts
        block_map.seqlen = seqlen
        block_map._num_listed = lut.numel()
        return block_map

    @classmethod
    def from_dense(cls, mask: Tensor, seqlen: int) -> BlockMap:
        """The map with mask[b, h, i, j] = "query block i attends exactly to key block j".

        mask: (B, H, T_m, T_n) bool. K is the length of the longest list, which the host has to wait
        for. Raises TypeError for another dtype, ValueError for another shape."""
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool; got {mask.dtype}")
        t_m, t_n = num_q_blocks(seqlen), num_k_blocks(seqlen)
        if mask.dim() != 4 or mask.shape[2:] != (t_m, t_n):
            raise ValueError(
                f"mask must have shape (B, H, T_m, T_n) = (B, H, {t_m}, {t_n}) for "
                f"seqlen={seqlen}; got {tuple(mask.shape)}"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max())) if counts.numel() else min(1, t_n)
        # A stable sort of "not selected" moves the selected indices to the front in ascending
        # order.
        order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)[..., :width]
        unused = torch.arange(width, device=mask.device) >= counts.unsqueeze(-1)
        lut = order.masked_fill(unused, _UNUSED).to(torch.uint16)
        block_map = cls(lut, counts, seqlen=seqlen)
        block_map._num_listed = int(counts.sum())
        return block_map

    @property
    def num_kv_blocks(self) -> int:
        """K, the width of the lists."""
        return self.lut.shape[3]

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.lut.device

    @property
    def sparsity(self) -> float:
        """The share of (query block, key block) pairs that are not listed; 0.0 for an empty map.

        For maps from `sla2.route` and `from_dense` this is known from shapes; for lists of your own
        the first use waits for the device once."""
        total = self.counts.numel() * num_k_blocks(self.seqlen)
        if total == 0:
            return 0.0
        if self._num_listed is None:
            self._num_listed = int(self.counts.sum())
        return 1.0 - self._num_listed / total

    def to(self, device: torch.device | str) -> BlockMap:
        """The map on `device`; itself if it is there already."""
        lut, counts = self.lut.to(device), self.counts.to(device)
        if lut is self.lut and counts is self.counts:
            return self
        block_map = BlockMap(lut, counts, seqlen=self.seqlen)
        block_map._num_listed = self._num_listed
        return block_map

    def to_dense(self) -> Tensor:
        """(B, H, T_m, T_n) bool; entries outside [0, T_n) are ignored, as the kernels do."""
        t_n = num_k_blocks(self.seqlen)
        index = self.lut.to(torch.int64)
        used = torch.arange(index.shape[3], device=index.device) < self.counts.unsqueeze(-1)
        # Unused and invalid entries go to a column of their own, cut off afterwards.
        index = torch.where(used & (index < t_n), index, t_n)
        dense = torch.zeros(*index.shape[:3], t_n + 1, dtype=torch.bool, device=index.device)
        return dense.scatter_(3, index, True)[..., :t_n].contiguous()

    def to_flex(self) -> BlockMask:
        """The same selection as a FlexAttention BlockMask, for comparison with `flex_attention`.

        Whole key blocks become full blocks; the last, short key block becomes a partial one, whose
        mask_mod looks the selection up. Raises ValueError when there is no token."""
        from torch.nn.attention.flex_attention import BlockMask

        if self.seqlen == 0:
            raise ValueError("a map of zero tokens has no BlockMask")
        dense = self.to_dense()
        partial = torch.zeros_like(dense)
        if self.seqlen % BLOCK_K:
            partial[..., -1] = dense[..., -1]

        def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
            return mask.sum(-1, dtype=torch.int32), order.to(torch.int32)

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return dense[b, h, q_idx // BLOCK_Q, kv_idx // BLOCK_K]

        return BlockMask.from_kv_blocks(
            *lists(partial),
            *lists(dense & ~partial),
            BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
            mask_mod=mask_mod,
            seq_lengths=(self.seqlen, self.seqlen),
        )

    def validate(self) -> None:
        """Checks the entries: counts in [0, K]; used entries in [0, T_n), ascending and distinct.

        Raises ValueError naming everything that is wrong and where it occurs first. Waits for the
        device.
        """
        t_n, width = num_k_blocks(self.seqlen), self.num_kv_blocks
        index, counts = self.lut.to(torch.int64), self.counts.unsqueeze(-1)
        used = torch.arange(width, device=index.device) < counts
        descents = torch.zeros_like(used)
        descents[..., 1:] = used[..., 1:] & (index[..., 1:] <= index[..., :-1])
        problems = []
        for what, values, wrong in (
            (f"counts outside 0..{width}", counts, (counts < 0) | (counts > width)),
            (f"entries outside 0..{t_n - 1}", index, used & (index >= t_n)),
            ("entries not above the entry before (must be ascending, distinct)", index, descents),
        ):
            places = wrong.nonzero()
            if len(places):
                b, h, i, n = places[0].tolist()
                problems.append(
                    f"{len(places)} {what}, first {int(values[b, h, i, n])} at batch {b}, "
                    f"head {h}, query block {i}, position {n}"
                )
        if problems:
            raise ValueError(f"invalid block map (T_n={t_n}, K={width}): " + "; ".join(problems))

    def __repr__(self) -> str:
        b, h, t_m, width = self.lut.shape
        return (
            f"BlockMap(batch={b}, heads={h}, q_blocks={t_m}, kv_blocks={width} of "
            f"{num_k_blocks(self.seqlen)}, seqlen={self.seqlen}, device={str(self.device)!r})"
        )
