"""Parameter groups for an optimiser: router and alpha have rates of their own and no decay."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .checkpoint import find_layers


def param_groups(
    model: nn.Module,
    *,
    lr_router: float = 1e-3,
    lr_alpha: float | None = None,
    lr_model: float = 1e-5,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Groups `router`, `alpha` and `model` of the trainable parameters, for torch.optim.

    Every parameter that requires grad is in exactly one group; a group without parameters is left
    out. So call `set_stage` first: it decides what is trainable, and a parameter that is unfrozen
    later is not in the optimiser. `lr_alpha` None is the rate of what alpha trains beside:
    `lr_router` where a router is trainable (stage 1), else `lr_model` (stage 2).

    `weight_decay` holds for `model` alone: decay would pull the router back to the identity and
    alpha to alpha_init. Raises ValueError where `model` has no SLA2Attention and for rates that are
    negative or not finite, TypeError for those that are no numbers.
    """
    rates = {"lr_router": lr_router, "lr_model": lr_model, "weight_decay": weight_decay}
    if lr_alpha is not None:
        rates["lr_alpha"] = lr_alpha
    for name, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float; got {type(value).__name__}")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value} is out of range: allowed are finite values from 0 on")
    layers = find_layers(model).values()
    router = {id(p) for layer in layers for p in (layer.proj_q_delta, layer.proj_k_delta)}
    alpha = {id(layer.alpha_offset) for layer in layers}
    members: dict[str, list[nn.Parameter]] = {"router": [], "alpha": [], "model": []}
    for parameter in model.parameters():  # each once, also where modules share it
        if parameter.requires_grad:
            key = id(parameter)
            name = "router" if key in router else "alpha" if key in alpha else "model"
            members[name].append(parameter)
    if lr_alpha is None:
        lr_alpha = lr_router if members["router"] else lr_model
    return [
        {"name": name, "params": members[name], "lr": lr, "weight_decay": decay}
        for name, lr, decay in (
            ("router", lr_router, 0.0),
            ("alpha", lr_alpha, 0.0),
            ("model", lr_model, weight_decay),
        )
        if members[name]
    ]
