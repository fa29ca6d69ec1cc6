"""Other attention, timed on the same inputs: dense SDPA, and FlexAttention on the same map."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sla2

SDPA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


class PeerUnavailable(Exception):
    """The peer does not run on this device, or not with these inputs; the message says why."""


def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Full attention by one backend of torch's SDPA; q, k, v are (B, N, H, D)."""
    backend = SDPA_BACKENDS[name]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            )

    _try(call, name)
    return call


def flex(block_map: sla2.BlockMap, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Compiled FlexAttention over the listed key blocks: the sparse branch alone, its map given."""
    if q.device.type != "cuda":
        raise PeerUnavailable("flex is timed on GPUs only")
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")
    attend = torch.compile(module.flex_attention, fullgraph=True)
    mask = block_map.to_flex()
    options: dict[str, Any] = {"block_mask": mask}

    def call() -> Tensor:
        out: Tensor = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
        return out

    _try(call, "flex")
    return call


def with_backward(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """`call` and the gradient of its result to `leaves`, for a fixed random incoming gradient."""
    grad_out = torch.randn_like(call().detach())

    def step() -> object:
        return torch.autograd.grad(call(), leaves, grad_out)

    return step


def _try(call: Callable[[], Tensor], name: str) -> None:
    """One call, for compilation and to see whether the peer runs here at all."""
    try:
        call()
    except Exception as error:  # backends raise whatever they like when they lack support
        first_line = str(error).strip().splitlines()
        raise PeerUnavailable(
            f"{name}: {first_line[0] if first_line else type(error).__name__}"
        ) from error
