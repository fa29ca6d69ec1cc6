"""The processor that stands in for a layer's own, and what the processors of a model share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checks import Grid, num_tokens
from ..functional import sla2_attention
from ..module import SLA2Attention
from .adapter import Adapter
from .grid import resize_alpha

MISMATCHES = ("error", "interpolate", "dense")

_LOGGER = logging.getLogger("sla2")


class GridAttention(SLA2Attention):
    """`SLA2Attention` of a known grid, from which alpha can be carried to another."""

    grid: Grid

    def __init__(self, num_heads: int, head_dim: int, *, grid: Grid, **options: Any) -> None:
        super().__init__(num_heads, head_dim, seq_len=num_tokens(grid), grid=grid, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None = None) -> Tensor:
        """As `SLA2Attention.forward`; `grid`: of the tokens, where it is not the module's own."""
        if grid is None or grid == self.grid:
            return super().forward(q, k, v)
        soft = self.stage == 1
        proj_q, proj_k = self.proj_q, self.proj_k
        out = sla2_attention(
            q,
            k,
            v,
            proj_q=proj_q if soft else proj_q.detach(),
            proj_k=proj_k if soft else proj_k.detach(),
            alpha_logit=resize_alpha(self.alpha_logit, self.grid, grid),
            topk=self.topk,
            quant="none" if soft else self.quant,
            mode="soft" if soft else "hard",
            tau=self.tau,
            router_score=self.router_score,
            smooth_k=self.smooth_k,
            phi_input=self.phi_input,
            layout=self.layout,
        )
        return cast(Tensor, out)


class Dispatch:
    """Decides for each call of one model how its layers run; shared by the model's processors.

    A processor sees a sequence of tokens and not their grid, and grids with as many tokens may
    order them differently. So the decision is made once a call, where the model is entered, and
    kept until the next call.
    """

    def __init__(self, adapter: Adapter, grid: Grid, min_tokens: int, on_mismatch: str) -> None:
        self.adapter = adapter
        self.grid = grid
        self.min_tokens = min_tokens
        self.on_mismatch = on_mismatch
        self.dense_scopes = 0
        """How many `sla2.dense` blocks are open."""
        self.call_dense = False
        self.call_grid: Grid | None = None
        """Where it is not `grid`."""
        self._told = False
        self._handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        self._handle = model.register_forward_pre_hook(self.enter, with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    @property
    def runs_dense(self) -> bool:
        return self.call_dense or self.dense_scopes > 0

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model's forward pre-hook. Raises ValueError for a grid that does not fit."""
        self.call_dense, self.call_grid = False, None
        if self.dense_scopes > 0:
            return
        sizes = self.adapter.call_grid(model, args, kwargs)
        grid = None if sizes is None else (sizes[0], sizes[1], sizes[2])  # also of a torch.Size
        if grid is not None and num_tokens(grid) < self.min_tokens:
            self.call_dense = True
            if not self._told:
                self._told = True
                self._tell(grid)
        elif grid != self.grid:
            if self.on_mismatch == "error" or (grid is None and self.on_mismatch == "interpolate"):
                raise ValueError(self._mismatch(grid))
            self.call_dense = self.on_mismatch == "dense"
            self.call_grid = grid

    def _tell(self, grid: Grid) -> None:
        _LOGGER.info(
            "grid %s has %d tokens, fewer than min_tokens=%d: its calls run dense attention "
            "(said once)",
            grid,
            num_tokens(grid),
            self.min_tokens,
        )

    def _mismatch(self, grid: Grid | None) -> str:
        own = f"{self.grid}, N={num_tokens(self.grid)}"
        if grid is None:
            return (
                f"the order of this call's tokens cannot be told from its arguments; SLA2 was "
                f"applied for the grid {own}. Run the call inside sla2.dense(model), or apply with "
                "on_mismatch='dense'"
            )
        return (
            f"this call has the grid {grid}, N={num_tokens(grid)} tokens; SLA2 was applied for "
            f"{own}, and alpha belongs to that grid, also where N is the same. Either (1) generate "
            f"at that size; or (2) sla2.remove(model) and sla2.apply(model, grid={grid}) with a "
            "router trained or calibrated for it; or (3) apply with on_mismatch='interpolate' "
            "(alpha carried over, an approximation) or on_mismatch='dense'"
        )


class SLA2Processor(nn.Module):
    """Attention processor of one self-attention layer: SLA2, or the layer's own on dense calls.

    `sla2`: the layer's `SLA2Attention`, the only parameters. `original`: the processor it replaces.
    """

    def __init__(self, sla2: GridAttention, original: Any, dispatch: Dispatch) -> None:
        super().__init__()
        self.sla2 = sla2
        self.original = original
        self.dispatch = dispatch

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C). Raises ValueError for cross-attention and for a mask."""
        dispatch = self.dispatch
        if dispatch.runs_dense:
            inputs = (hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return cast(Tensor, self.original(attn, *inputs))
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "SLA2 is self-attention without a mask; this call has encoder_hidden_states or "
                "attention_mask. Run it inside sla2.dense(model)"
            )
        q, k, v = dispatch.adapter.project(attn, hidden_states, rotary_emb)
        return dispatch.adapter.merge(attn, self.sla2(q, k, v, grid=dispatch.call_grid))

    # diffusers writes these two to every processor that has them.

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        # set_attention_backend picks a kernel of dense attention: that of this layer's dense calls.
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise RuntimeError(
                "a model with SLA2 does not run under diffusers' context parallelism: each rank "
                "has a part of the tokens, and the router ranks all of them (ring attention has no "
                "meaning for SLA2 at all). Call sla2.remove(model) before enable_parallelism"
            )
