"""SLA2 attention of one layer as a module: router and alpha parameters, the two stages.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .block_map import BlockMap
from .checks import (
    LAYOUTS,
    PHI_INPUTS,
    ROUTER_SCORES,
    Shape,
    check_choice,
    check_flag,
    check_grid_of,
    check_quant,
    check_tau,
    num_q_blocks,
    resolve_num_kv_blocks,
)
from .constants import BLOCK_K, BLOCK_Q
from .functional import route, sla2_attention

# calibrate_alpha keeps alpha off 0 and 1, whose logits are infinite.
_ALPHA_MARGIN = 1e-4
# Scores that calibrate_alpha holds at a time.
_CALIBRATION_ELEMENTS = 1 << 24


class SLA2Attention(nn.Module):
    """`sla2_attention` of one layer with its learned router and alpha.

    Args:
        num_heads, head_dim: H and D.
        seq_len: N, the tokens of the grid that alpha belongs to.
        grid: its (frames, rows, columns), so that a router file of another grid with as many tokens
            is refused; None: unknown.
        topk: fraction of the key blocks kept, a float in (0, 1].
        quant: "none", "int8_fp16" or "int8_fp8", of stage 2.
        per_head_router: projections (H, D, D) instead of (D, D).
        per_head_alpha: alpha (H, T_m); False: (T_m,), shared by the heads.
        alpha_per_token: alpha (H, N), one per token instead of one per query block.
        alpha_init: alpha at the start, in (0, 1).
        tau, router_score, smooth_k, phi_input, layout: as in `sla2_attention`.

    Parameters are float32 and zero at the start, so a weight initialiser that zeroes or skips them
    does no harm, and weight decay pulls toward the start: proj_q_delta, proj_k_delta (the
    projections are I + delta) and alpha_offset (the logit is logit(alpha_init) + offset; alpha_init
    is no part of the state_dict). They stay float32 under `.to(dtype)`, `.half()` and the like: in
    16 bit the router would choose other blocks.

    A new module is in stage 2; see `set_stage`. Raises TypeError / ValueError for arguments out of
    range.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int = 128,
        *,
        seq_len: int,
        grid: Sequence[int] | None = None,
        topk: float = 0.03,
        quant: str = "none",
        per_head_router: bool = False,
        per_head_alpha: bool = True,
        alpha_per_token: bool = False,
        alpha_init: float = 0.85,
        tau: float = 0.1,
        router_score: str = "scaled",
        smooth_k: bool = True,
        phi_input: str = "smoothed",
        layout: str = "BNHD",
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("seq_len", seq_len)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not 0.0 < alpha_init < 1.0:
            raise ValueError(f"alpha_init={alpha_init} is out of range: allowed is (0, 1)")
        if alpha_per_token and not per_head_alpha:
            raise ValueError(
                "alpha_per_token=True needs per_head_alpha=True: allowed shapes of alpha are "
                "(T_m,), (H, T_m) and (H, N)"
            )
        resolve_num_kv_blocks(topk, None, Shape(1, seq_len, num_heads, head_dim))
        check_quant(quant)
        check_choice("router_score", router_score, ROUTER_SCORES)
        check_choice("phi_input", phi_input, PHI_INPUTS)
        check_choice("layout", layout, LAYOUTS)
        check_flag("smooth_k", smooth_k)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.seq_len = seq_len
        self.grid = check_grid_of(grid, seq_len)
        self.topk = topk
        self.quant = quant
        self.alpha_init = alpha_init
        self.tau = check_tau(tau)
        self.router_score = router_score
        self.smooth_k = smooth_k
        self.phi_input = phi_input
        self.layout = layout

        proj_shape = (num_heads, head_dim, head_dim) if per_head_router else (head_dim, head_dim)
        alpha_width = seq_len if alpha_per_token else num_q_blocks(seq_len)
        alpha_shape = (num_heads, alpha_width) if per_head_alpha else (alpha_width,)

        def zeros(shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

        # Raw parameters, no nn.Linear: adapters and casting hooks look for those and would change
        # them.
        self.proj_q_delta = zeros(proj_shape)
        self.proj_k_delta = zeros(proj_shape)
        self.alpha_offset = zeros(alpha_shape)
        self.set_stage(2)

    # ---- parameters ---------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Back to the start: identity projections, alpha = alpha_init."""
        for parameter in (self.proj_q_delta, self.proj_k_delta, self.alpha_offset):
            nn.init.zeros_(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SLA2Attention:
        # Module.to, .half, .cuda and the like come here with a function of one tensor. Whatever it
        # does to the dtype is undone by moving the original, so no bit is lost on the way.
        def keep_float32(x: Tensor) -> Tensor:
            moved = fn(x)
            if moved.dtype == torch.float32 or not moved.is_floating_point():
                return moved
            return x.to(device=moved.device, dtype=torch.float32)

        return cast(SLA2Attention, super()._apply(keep_float32, recurse))

    def _identity(self) -> Tensor:
        # Not a buffer: one that is no part of the state_dict would be lost by meta-device loading.
        delta = self.proj_q_delta
        return torch.eye(self.head_dim, dtype=delta.dtype, device=delta.device)

    @property
    def proj_q(self) -> Tensor:
        """The query projection, (D, D) or (H, D, D)."""
        return self._identity() + self.proj_q_delta

    @property
    def proj_k(self) -> Tensor:
        """The key projection, (D, D) or (H, D, D)."""
        return self._identity() + self.proj_k_delta

    @property
    def initial_logit(self) -> float:
        """logit(alpha_init): what alpha_offset is added to."""
        return math.log(self.alpha_init / (1.0 - self.alpha_init))

    @property
    def alpha_logit(self) -> Tensor:
        """(H, T_m), (T_m,) or (H, N)."""
        return self.initial_logit + self.alpha_offset

    # ---- stages -------------------------------------------------------------------------------

    def set_stage(self, stage: int) -> None:
        """1 trains the router: soft map, 16-bit. 2 (inference, fine-tuning): hard map, `quant`.

        Stage 1 makes all three parameters trainable; freezing the backbone is the caller's part.
        Stage 2 freezes the projections and leaves alpha trainable. The hard map has no gradient, so
        in stage 2 the projections get none even where requires_grad was set again.
        Raises ValueError for another stage.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage={stage!r} is not 1 (soft router) or 2 (hard router)")
        self.stage = int(stage)
        self.proj_q_delta.requires_grad_(self.stage == 1)
        self.proj_k_delta.requires_grad_(self.stage == 1)
        self.alpha_offset.requires_grad_(True)

    def _check_grid(self, q: Tensor) -> None:
        if not isinstance(q, Tensor) or q.dim() != 4:
            return  # reported by the function's own checks
        tokens, heads = (
            (q.shape[1], q.shape[2]) if self.layout == "BNHD" else (q.shape[2], q.shape[1])
        )
        if heads != self.num_heads or q.shape[3] != self.head_dim:
            raise ValueError(
                f"this module has {self.num_heads} heads of head_dim {self.head_dim}; q has "
                f"{heads} of {q.shape[3]} (shape {tuple(q.shape)}, layout={self.layout!r})"
            )
        if tokens != self.seq_len:
            raise ValueError(
                f"q has N={tokens} tokens, T_m={num_q_blocks(tokens)} query blocks; alpha of this "
                f"module has shape {tuple(self.alpha_offset.shape)} and was made for the grid of "
                f"seq_len={self.seq_len}, T_m={num_q_blocks(self.seq_len)}. Either (1) bring the "
                "input to that grid; or (2) make a SLA2Attention(seq_len=...) for this one, copy "
                "proj_q_delta and proj_k_delta, and call calibrate_alpha on samples; or (3) also "
                "copy alpha_offset, interpolated along the query blocks, and fine-tune it"
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, N, H, D) -> (B, N, H, D); (B, H, N, D) with layout="BHND".

        Raises ValueError for other heads, head_dim or tokens than the module's, and what
        `sla2_attention` raises.
        """
        self._check_grid(q)
        soft = self.stage == 1
        identity = self._identity()
        proj_q, proj_k = identity + self.proj_q_delta, identity + self.proj_k_delta
        out = sla2_attention(
            q,
            k,
            v,
            proj_q=proj_q if soft else proj_q.detach(),
            proj_k=proj_k if soft else proj_k.detach(),
            alpha_logit=self.alpha_logit,
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

    # ---- calibration --------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate_alpha(self, q: Tensor, k: Tensor) -> None:
        """alpha <- the mean share of full attention's mass on the selected blocks (eq. 7).

        q, k: samples (B, N, H, D) in the module's layout, the dtypes of `forward`. The mean is over
        the samples and over the rows that share an alpha. Computes full attention's probabilities
        in
        chunks: 2 N^2 D H operations a sample. Raises what `forward` raises.
        """
        self._check_grid(q)
        with torch.autocast(q.device.type, enabled=False):
            block_map = route(
                q,
                k,
                proj_q=self.proj_q,
                proj_k=self.proj_k,
                topk=self.topk,
                smooth_k=self.smooth_k,
                layout=self.layout,
            )
            if self.layout == "BHND":
                q, k = q.transpose(1, 2), k.transpose(1, 2)
            alpha = self._pool_alpha(_selected_mass(q, k, block_map))
        alpha = alpha.clamp(_ALPHA_MARGIN, 1.0 - _ALPHA_MARGIN)
        self.alpha_offset.copy_(torch.logit(alpha) - self.initial_logit)

    def _pool_alpha(self, mass: Tensor) -> Tensor:
        """Mass per row (H, N) -> one mean for each entry of alpha."""
        shape = self.alpha_offset.shape
        return sum_alpha_rows(mass, shape) / sum_alpha_rows(torch.ones_like(mass), shape)

    def extra_repr(self) -> str:
        text = (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, seq_len={self.seq_len}, "
            f"topk={self.topk}, quant={self.quant!r}, stage={self.stage}"
        )
        return text if self.grid is None else f"{text}, grid={self.grid}"


def sum_alpha_rows(x: Tensor, shape: torch.Size) -> Tensor:
    """Sums of x (H, N) over the rows that share an entry of an alpha of `shape`."""
    heads, tokens = x.shape
    if x.shape == shape:  # one for each token; of a single one it is the same
        return x
    blocks = num_q_blocks(tokens)
    padded = torch.nn.functional.pad(x, (0, blocks * BLOCK_Q - tokens))
    total = padded.view(heads, blocks, BLOCK_Q).sum(-1)  # no atomics: the same bits every time
    return total if len(shape) == 2 else total.sum(0)


def _selected_mass(q: Tensor, k: Tensor, block_map: BlockMap) -> Tensor:
    """Mean over the batch of the softmax mass on the listed blocks: q, k (B, N, H, D) -> (H, N)."""
    batch, tokens, heads, head_dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    listed = block_map.to_dense()
    mass = torch.zeros(heads, tokens, dtype=dtype, device=q.device)
    rows = max(1, _CALIBRATION_ELEMENTS // (tokens * BLOCK_Q)) * BLOCK_Q
    for b in range(batch):
        for h in range(heads):
            queries = q[b, :, h].to(dtype) / math.sqrt(head_dim)
            keys = k[b, :, h].to(dtype)
            keys = keys - keys.mean(0)  # the probabilities do not change, their rounding does
            for start in range(0, tokens, rows):
                scores = queries[start : start + rows] @ keys.T
                full = scores.logsumexp(1)
                blocks = listed[b, h, start // BLOCK_Q : (start + rows) // BLOCK_Q]
                tiles = blocks.repeat_interleave(BLOCK_Q, 0)[: scores.shape[0]]
                keep = tiles.repeat_interleave(BLOCK_K, 1)[:, :tokens]
                part = scores.masked_fill_(~keep, -math.inf).logsumexp(1)
                mass[h, start : start + rows] += (part - full).exp() / batch
    return mass
