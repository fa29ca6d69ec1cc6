"""What `sla2.apply` did."""

from __future__ import annotations

import dataclasses

from ..checks import Grid, num_k_blocks, num_q_blocks, num_tokens


@dataclasses.dataclass(frozen=True, repr=False)
class ApplyReport:
    """What `sla2.apply` replaced and what it left; its repr is meant to be printed."""

    model: str
    """Class of the model."""
    adapter: str
    grid: Grid
    topk: float
    quant: str
    replaced: tuple[str, ...]
    """Names of the self-attention layers that are SLA2 now."""
    dense: tuple[str, ...]
    """Self-attention layers that `dense_blocks` left as they were."""
    skipped: tuple[str, ...]
    """Other attention layers: cross-attention."""
    parameters: int
    """Parameters added to the model, float32."""
    runs_dense: bool
    """Whether `min_tokens` makes even calls at `grid` dense."""

    @property
    def bytes(self) -> int:
        """Memory of the parameters."""
        return 4 * self.parameters

    def __repr__(self) -> str:
        tokens = num_tokens(self.grid)
        lines = [
            f"SLA2 in {self.model} (adapter {self.adapter}), topk={self.topk}, quant={self.quant}",
            f"  grid      {self.grid}: N={tokens}, T_m={num_q_blocks(tokens)}, "
            f"T_n={num_k_blocks(tokens)}",
            f"  replaced  {_count(self.replaced)}",
            f"  dense     {_count(self.dense)}",
            f"  skipped   {_count(self.skipped)}",
            f"  added     {self.parameters} parameters, {self.bytes / 2**20:.2f} MiB in float32",
        ]
        if self.runs_dense:
            lines.append("  note      the grid is below min_tokens: every call runs dense")
        return "\n".join(lines)


def _count(names: tuple[str, ...]) -> str:
    if len(names) <= 2:
        return f"{len(names)} layers{': ' if names else ''}{', '.join(names)}"
    return f"{len(names)} layers: {names[0]} to {names[-1]}"
