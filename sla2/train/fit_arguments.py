"""Arguments of `fit_router` that take more than a line to check."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import checks
from ..module import SLA2Attention

# What a fit knows of a layer by itself: from the samples, from its own topk and device.
_OWN = ("num_heads", "head_dim", "seq_len", "grid", "topk", "layout", "device")
_PLAIN = (bool, int, float, str)


def check_topk_fractions(topk: Sequence[float]) -> tuple[float, ...]:
    """The fractions; their range is checked by the layers. Raises TypeError / ValueError."""
    if isinstance(topk, (str, bytes)) or not isinstance(topk, Sequence):
        raise TypeError(f"topk must be a sequence of floats such as (0.05, 0.04); got {topk!r}")
    if not topk:
        raise ValueError("topk is empty: there is nothing to fit")
    for fraction in topk:
        if not isinstance(fraction, float):
            raise TypeError(f"topk must hold floats, fractions of the key blocks; got {fraction!r}")
    if any(after >= before for before, after in zip(topk, topk[1:], strict=False)):
        raise ValueError(
            f"topk={tuple(topk)} must descend: each router starts from the one that keeps more"
        )
    return tuple(topk)


def check_layer_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options as a dictionary of plain values, which the settings of a fit can hold.

    Names and types alone; the ranges are checked by the layers. Raises TypeError.
    """
    checked = checks.check_layer_options(
        options, inspect.signature(SLA2Attention).parameters, _OWN, "fit_router"
    )
    for name, value in checked.items():
        if not isinstance(value, _PLAIN):
            raise TypeError(
                f"layer_options has {value!r} for {name!r}, a {type(value).__name__}: a bool, int, "
                "float or str is allowed, for the settings are written to a file"
            )
    return checked


def pick_device(device: torch.device | str | None) -> torch.device:
    """`device`; None: the current GPU if there is one, else the CPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
