"""SLA, the method before SLA2, on this package's block-sparse attention; a baseline.

SLA (arXiv 2509.24006): the router is not learned, and O = O_s + proj(O_l) with a linear branch over
all tokens, as in its released code, where SLA2 blends by alpha with the exact complement.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import sla2

_EPSILON = 1e-5  # added to the linear branch's denominator, as SLA does


class SLAAttention(nn.Module):
    """q, k, v (B, N, H, D) -> (B, N, H, D); unquantised. `proj` is zero at the start: O = O_s."""

    def __init__(self, head_dim: int, *, topk: float, device: torch.device) -> None:
        super().__init__()
        self.topk = topk
        self.proj = nn.Linear(head_dim, head_dim, device=device)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        identity = torch.eye(q.shape[-1], device=q.device)
        block_map = sla2.route(
            q.detach(), k.detach(), proj_q=identity, proj_k=identity, topk=self.topk
        )
        sparse: Any = sla2.block_sparse_attention(q, k, v, block_map)
        with torch.autocast(q.device.type, enabled=False):
            linear = linear_attention(q.float(), k.float(), v.float())
            return cast(Tensor, sparse + self.proj(linear).to(sparse.dtype))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """phi(Q) (phi(K)^T V) over all tokens, normalised; phi is the softmax over the channels."""
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    state = torch.einsum("bnhd,bnhe->bhde", phi_k, v)
    weights = torch.einsum("bnhd,bhd->bnh", phi_q, phi_k.sum(1))
    return torch.einsum("bnhd,bhde->bnhe", phi_q, state) / (weights[..., None] + _EPSILON)
