"""How much arithmetic an attention operation does, for the TFLOP/s columns.

"Executed" counts the matrix products that the method needs, two operations per multiply-add:
whatever a kernel recomputes or pads on top is its own loss. "Dense-equivalent" counts the products
of full attention instead, as papers do; it is a speed-up in disguise, and never the rate of a
machine.
"""

from __future__ import annotations

from typing import NamedTuple

from sla2.constants import BLOCK_K, BLOCK_Q


class Shape(NamedTuple):
    """B, H, N, D of q, k and v."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int

    @property
    def q_blocks(self) -> int:
        """T_m."""
        return -(-self.seqlen // BLOCK_Q)

    @property
    def kv_blocks(self) -> int:
        """T_n."""
        return -(-self.seqlen // BLOCK_K)

    def kept_blocks(self, topk: float) -> int:
        """K."""
        return max(1, int(topk * self.kv_blocks))


def dense_flop(shape: Shape, *, backward: bool = False) -> float:
    """Full attention: two products forward, five backward."""
    products = 7 if backward else 2
    return 2.0 * products * shape.batch * shape.heads * shape.seqlen**2 * shape.head_dim


def sparse_flop(shape: Shape, kept: int, *, backward: bool = False) -> float:
    """The sparse branch over `kept` key blocks per query block."""
    keys = min(kept * BLOCK_K, shape.seqlen)
    products = 7 if backward else 2
    return 2.0 * products * shape.batch * shape.heads * shape.seqlen * keys * shape.head_dim


def linear_flop(shape: Shape, *, backward: bool = False) -> float:
    """h_j = phi(K_j)^T V_j, H = (1 - M) h, phi(Q) H; each has two products backward."""
    square = shape.head_dim**2
    per_head = 4.0 * shape.seqlen * square + 2.0 * shape.q_blocks * shape.kv_blocks * square
    return shape.batch * shape.heads * per_head * (3 if backward else 1)


def route_flop(shape: Shape) -> float:
    """The router: both projections and the scores of all pairs of blocks."""
    projections = 2.0 * (shape.q_blocks + shape.kv_blocks) * shape.head_dim**2
    scores = 2.0 * shape.q_blocks * shape.kv_blocks * shape.head_dim
    return shape.batch * shape.heads * (projections + scores)


def sla2_flop(shape: Shape, kept: int, *, backward: bool = False) -> float:
    """The whole operation, with its backward pass or without; the hard map has no gradient."""
    branches = sparse_flop(shape, kept, backward=backward) + linear_flop(shape, backward=backward)
    return branches + route_flop(shape)
