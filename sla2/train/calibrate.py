"""alpha from data: the share of full attention's mass that the router's blocks hold."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..module import SLA2Attention
from .samples import Sample


def calibrate_alpha(
    layer: SLA2Attention, samples: Iterable[Sample], *, dtype: torch.dtype | None = None
) -> None:
    """alpha <- the mean mass that full attention puts on the blocks the router selects (eq. 7).

    `SLA2Attention.calibrate_alpha` over many samples, one of them in memory at a time. The mean is
    over the samples, weighted by their batch sizes, and over the rows that share an alpha. Only
    `alpha_offset` changes, and where an error is raised nothing does.

    Args:
        layer: on any device, in either layout; its own topk and projections select the blocks.
        samples: of this layer, such as `read_samples(folder, name)`; q and k (B, N, H, D).
        dtype: what q and k are cast to; None: as recorded. CUDA takes bfloat16 and float16 alone.

    Raises ValueError for no samples, samples of several layers or of another shape than the
    layer's, and samples whose mass is not finite; TypeError for other types and dtypes.
    """
    if not isinstance(layer, SLA2Attention):
        raise TypeError(f"layer must be a SLA2Attention; got {type(layer).__name__}")

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        first: str | None = None
        for sample in samples:
            first = sample.layer if first is None else first
            if sample.layer != first:
                raise ValueError(
                    f"samples of the layers {first!r} and {sample.layer!r}: alpha belongs to one; "
                    "pass read_samples(folder, layer)"
                )
            yield sample.q, sample.k

    set_mean_alpha(layer, pairs(), dtype)


@torch.no_grad()
def set_mean_alpha(
    layer: SLA2Attention,
    pairs: Iterable[tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """`calibrate_alpha` on pairs of q and k, each (B, N, H, D)."""
    probe = copy.deepcopy(layer)
    total = torch.zeros_like(layer.alpha_offset, dtype=torch.float64)
    count = 0
    for index, (q, k) in enumerate(pairs):
        batch = q.shape[0]
        q, k = (x.to(layer.alpha_offset.device, dtype) for x in (q, k))
        if layer.layout == "BHND":
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        probe.calibrate_alpha(q, k)
        alpha = probe.alpha_logit.double().sigmoid()
        if not bool(alpha.isfinite().all()):
            raise ValueError(
                "the mass on the selected blocks is not finite: q or k has NaN or infinity in "
                f"sample {index}, counted from 0"
            )
        total += batch * alpha
        count += batch
    if count == 0:
        raise ValueError("there are no samples to calibrate alpha on")
    # SLA2Attention.calibrate_alpha keeps alpha off 0 and 1: the mean has a finite logit.
    layer.alpha_offset.copy_(torch.logit(total / count) - layer.initial_logit)
