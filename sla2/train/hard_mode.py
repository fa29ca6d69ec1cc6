"""SLA2 in hard mode on a layer's samples: the best alpha for its router, and the error left."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..constants import BLOCK_Q
from ..functional import block_sparse_attention, complement_linear_attention, route
from ..module import SLA2Attention, sum_alpha_rows
from .fit_data import Problem

# What least squares leaves alpha: nearer to 0 or 1 its gradient would be too small for stage 2.
_MARGIN = 0.01


class HardMode:
    """How far SLA2 in hard mode is from full attention, as a function of alpha.

    O = O_l + alpha (O_s - O_l), so the squared error is a quadratic function of each alpha; a
    constant where every block is listed, as O = O_s there. One pass over the samples, unquantised,
    finds its coefficients for the router of `module`.
    Nothing is read from the device before `error` or `set_best_alpha`.
    """

    @torch.no_grad()
    def __init__(self, module: SLA2Attention, problems: Iterable[Problem]) -> None:
        self._module = module
        shape = (module.num_heads, module.seq_len)
        zeros = torch.zeros(shape, dtype=torch.float64, device=module.alpha_offset.device)
        self._cross, self._square, self._constant = zeros, zeros.clone(), zeros.clone()
        self._energy = zeros.sum()
        for problem in problems:
            self._add(problem)

    def _add(self, problem: Problem) -> None:
        module = self._module
        q, k, v, full = problem
        block_map = route(
            q, k, proj_q=module.proj_q, proj_k=module.proj_k, topk=module.topk,
            smooth_k=module.smooth_k,
        )  # fmt: skip
        sparse = block_sparse_attention(q, k, v, block_map, smooth_k=module.smooth_k)
        assert isinstance(sparse, Tensor)
        if block_map.sparsity > 0.0:
            linear = complement_linear_attention(
                q, k, v, block_map, smooth_k=module.smooth_k, phi_input=module.phi_input
            )
        else:  # no complement in any row: the router's lists are of one length
            linear = sparse
        wide = torch.promote_types(q.dtype, torch.float32)
        missing = full.to(wide) - linear.to(wide)
        between = sparse.to(wide) - linear.to(wide)
        self._cross += _per_row(missing * between)
        self._square += _per_row(between.square())
        self._constant += _per_row(missing.square())
        self._energy += full.to(wide).square().sum(dtype=torch.float64)

    def error(self) -> float:
        """||SLA2 - full|| / ||full|| over the samples, with the module's alpha."""
        alpha = self._module.alpha_logit.detach().double().sigmoid()
        if alpha.shape != self._cross.shape:  # one for a query block
            alpha = alpha.repeat_interleave(BLOCK_Q, -1)[..., : self._cross.shape[1]]
        squares = self._constant - 2 * alpha * self._cross + alpha.square() * self._square
        # clamp: a difference of large sums, near 0 below it by rounding. NaN stays NaN.
        error, energy = torch.stack((squares.sum().clamp_min(0.0), self._energy)).tolist()
        return math.sqrt(error / energy) if energy else 0.0  # full attention is 0: so is SLA2

    @torch.no_grad()
    def set_best_alpha(self) -> None:
        """alpha <- argmin of the error in [0.01, 0.99]; unchanged where nothing depends on it."""
        module = self._module
        offset = module.alpha_offset
        cross, square = (sum_alpha_rows(x, offset.shape) for x in (self._cross, self._square))
        alpha = (cross / square).clamp(_MARGIN, 1.0 - _MARGIN)
        best = torch.logit(alpha) - module.initial_logit
        offset.copy_(torch.where(square > 0, best, offset.double()))


def _per_row(x: Tensor) -> Tensor:
    """Sums of (B, N, H, D) over samples and channels: (H, N) float64."""
    return x.sum((0, 3), dtype=torch.float64).T
