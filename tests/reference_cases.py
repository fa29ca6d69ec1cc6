"""Small inputs for the tests of `sla2.reference`, with blocks of 8 and 4 rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCKS = {"block_q": 8, "block_k": 4}
F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_inputs(batch: int, heads: int, n: int, d: int, *, per_head: bool = False, alpha="head"):
    """float64 q, k, v in BHND with a mean in K, and router and alpha parameters."""
    t_m = ceil_div(n, BLOCKS["block_q"])
    lead = (heads,) if per_head else ()
    q, k, v = (randn(batch, heads, n, d, seed=i) for i in range(3))
    return (
        (q, k + 2.0 * randn(1, heads, 1, d, seed=3), v),
        {
            "proj_q": torch.eye(d, dtype=F64) + 0.3 * randn(*lead, d, d, seed=4),
            "proj_k": torch.eye(d, dtype=F64) + 0.3 * randn(*lead, d, d, seed=5),
            "alpha_logit": randn(
                *{"head": (heads, t_m), "shared": (t_m,), "token": (heads, n)}[alpha], seed=6
            ),
        },
    )


def random_map(batch: int, heads: int, n: int, keep: float = 0.5, seed: int = 7) -> Tensor:
    shape = (batch, heads, ceil_div(n, BLOCKS["block_q"]), ceil_div(n, BLOCKS["block_k"]))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


def to_numpy(*tensors: Tensor) -> list[np.ndarray]:
    return [t.numpy().astype(np.float64) for t in tensors]
