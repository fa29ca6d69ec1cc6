"""The linear branch: O_l,i = phi(Q_i) H_i / (phi(Q_i) Z_i), H = W h, Z = W z, and its gradient.

W is 1 - M for the hard map and 1 - m for the soft mask, (G, T_m, T_n); h_j = phi(K_j)^T V_j and
z_j = the sum over the rows of phi(K_j).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..constants import BLOCK_Q, EPS
from .layout import chunk_elements, token_rows
from .quantize import channel_amax, round_states_


def feature_map(blocks: Tensor) -> Tensor:
    """phi(X): softmax over the features of each row."""
    return blocks.softmax(-1)


def feature_map_backward_(phi: Tensor, grad: Tensor) -> Tensor:
    """Gradient of X from that of phi(X); overwrites `grad`."""
    return grad.sub_((grad * phi).sum(-1, keepdim=True)).mul_(phi)


class LinearBranch:
    """phi(K), h and z of a group of G heads, and the passes over its query blocks."""

    def __init__(
        self, keys: Tensor, values: Tensor, weights: Tensor, tokens: int, *, fp8: bool = False
    ) -> None:
        """keys, values: (>= G * T_n, BLOCK_K, D) padded; weights: (G, T_m, T_n).

        fp8: phi(K) in bfloat16 and h in e4m3, as quant "int8_fp8" has them; forward only.
        """
        heads, _, blocks_k = weights.shape
        self.weights = weights
        self.values = values[: heads * blocks_k]
        self.phi_k = feature_map(keys[: heads * blocks_k])
        if fp8:
            self.phi_k = self.phi_k.bfloat16().to(keys.dtype)
        token_rows(self.phi_k, heads, blocks_k)[:, tokens:] = 0.0
        dim = keys.shape[-1]
        self.h = torch.bmm(self.phi_k.mT, self.values).view(heads, blocks_k, dim * dim)
        if fp8:
            round_states_(self.h, channel_amax(self.values, heads))
        self.z = self.phi_k.sum(1).view(heads, blocks_k, dim)

    def _chunks(self) -> Iterator[slice]:
        """Query blocks per step, such that H stays small; W h wants many rows to reuse h."""
        heads, blocks_q, _ = self.weights.shape
        step = max(1, 4 * chunk_elements(self.h.device) // (heads * self.h.shape[-1]))
        for start in range(0, blocks_q, step):
            yield slice(start, min(start + step, blocks_q))

    def _apply(self, q: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """phi(Q) (R, BLOCK_Q, D), H (R, D, D), Z (R, D, 1), the denominator and O_l of R blocks."""
        dim = q.shape[-1]
        weights = self.weights[:, rows]
        phi_q = feature_map(q[:, rows]).flatten(0, 1)
        h_sum = torch.bmm(weights, self.h).view(-1, dim, dim)
        z_sum = torch.bmm(weights, self.z).view(-1, dim, 1)
        # An empty complement has H = 0 and Z = 0: O_l = 0, no NaN.
        norm = torch.bmm(phi_q, z_sum).clamp_min_(EPS)
        return phi_q, h_sum, z_sum, norm, torch.bmm(phi_q, h_sum).div_(norm)

    def forward(self, q: Tensor) -> Tensor:
        """O_l (G * T_m, BLOCK_Q, D) of q (G * T_m, BLOCK_Q, D)."""
        heads, blocks_q, _ = self.weights.shape
        queries = q.view(heads, blocks_q, BLOCK_Q, -1)
        out = torch.empty_like(queries)
        for rows in self._chunks():
            out[:, rows] = self._apply(queries, rows)[-1].view_as(out[:, rows])
        return out.view_as(q)

    def backward(
        self, q: Tensor, grad_out: Tensor, gain: Tensor, dq: Tensor, dv: Tensor, *, want_map: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds to dq and dv, shaped like q and the padded values.

        grad_out: dL/dO (G * T_m, BLOCK_Q, D); dL/dO_l = gain * grad_out, gain broadcastable to
        (G * T_m, BLOCK_Q, 1) and 0 where the complement is empty. Returns <dO, O_l> per row
        (G * T_m, BLOCK_Q, 1), the gradient of what phi saw as K (G * T_n, BLOCK_K, D), and with
        want_map that of W (G, T_m, T_n).
        """
        heads, blocks_q, blocks_k = self.weights.shape
        dim = q.shape[-1]
        shape = (heads, blocks_q, BLOCK_Q, -1)
        queries, grads, dqueries = q.view(shape), grad_out.view(shape), dq.view(shape)
        gains = gain.expand(-1, BLOCK_Q, 1).view(shape)
        dots = torch.empty_like(grads[..., :1])
        dh, dz = torch.zeros_like(self.h), torch.zeros_like(self.z)
        dw = torch.empty_like(self.weights) if want_map else None
        for rows in self._chunks():
            phi_q, h_sum, z_sum, norm, out = self._apply(queries, rows)
            grad = grads[:, rows].flatten(0, 1)
            dot = (grad * out).sum(-1, keepdim=True)
            dots[:, rows] = dot.view_as(dots[:, rows])
            grad = grad * gains[:, rows].flatten(0, 1)
            dot = dot * gains[:, rows].flatten(0, 1)
            # dphi(Q) = (dO_l H^T - D_l Z^T) / (phi(Q) Z)
            dphi = torch.bmm(grad, h_sum.mT).sub_(dot * z_sum.mT).div_(norm)
            dqueries[:, rows] += feature_map_backward_(phi_q, dphi).view_as(dqueries[:, rows])
            # dH = w^T dO_l, dZ = -w^T D_l with w = phi(Q) / (phi(Q) Z)
            w = phi_q.div_(norm)
            dh_sum = torch.bmm(w.mT, grad).view(heads, -1, dim * dim)
            dz_sum = torch.bmm(w.mT, dot).neg_().view(heads, -1, dim)
            dh.baddbmm_(self.weights[:, rows].mT, dh_sum)
            dz.baddbmm_(self.weights[:, rows].mT, dz_sum)
            if dw is not None:
                dw[:, rows] = torch.bmm(dh_sum, self.h.mT).baddbmm_(dz_sum, self.z.mT)
        dh, dz = dh.view(-1, dim, dim), dz.view(-1, 1, dim)
        dv[: heads * blocks_k].baddbmm_(self.phi_k, dh)
        dphi = torch.bmm(self.values, dh.mT).add_(dz)
        return dots.view(-1, BLOCK_Q, 1), feature_map_backward_(self.phi_k, dphi), dw
