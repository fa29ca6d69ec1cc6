"""SLA2 attention in plain PyTorch that does only the selected work, on any device.

The default path where there is no GPU. Unlike `sla2.reference` it never forms an (N, N) matrix: the
listed key blocks of each query block are gathered and multiplied in batches, and the complement is
read from per-block states, H = (1 - M) h. Source: "SLA2: Sparse-Linear Attention with Learnable
Routing and QAT", arXiv 2602.12675.

All tensors are (B, N, H, D) with any strides, in a 16-bit type, float32 or float64. The arithmetic
is float32 (float64 for float64 inputs), whatever autocast says. Inputs are never written, results
are contiguous and never share memory. Nothing here records an autograd graph: gradients are
explicit functions, which `sla2.ops` registers.
"""

from .backward import attn_bwd
from .forward import attn_fwd
from .router import (
    add_to_blocks_,
    route,
    soft_map,
    soft_map_backward,
    soft_scores,
    soft_scores_backward,
)
from .soft import soft_bwd, soft_fwd

__all__ = [
    "add_to_blocks_",
    "attn_bwd",
    "attn_fwd",
    "route",
    "soft_bwd",
    "soft_fwd",
    "soft_map",
    "soft_map_backward",
    "soft_scores",
    "soft_scores_backward",
]
