"""Inputs, block lists and comparisons that the tests of sla2.blockwise share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sla2 import reference
from sla2.constants import BLOCK_K, BLOCK_Q

RAGGED = (1, 2, 17, 63, 64, 65, 127, 128, 129, 193, 700)
BRANCHES = ("both", "sparse", "linear")
ALPHA_SHAPES = ("shared", "block", "token")
OPTIONS = ((True, "smoothed"), (True, "raw"), (False, "smoothed"))  # smooth_k, phi_input


# ---- cases ------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(tokens: int) -> tuple[int, int]:
    return -(-tokens // BLOCK_Q), -(-tokens // BLOCK_K)


def sizes(tokens: int) -> tuple[int, int, int, int]:
    """(B, N, H, D), over the cases both values of B, of H and of D."""
    i = RAGGED.index(tokens)
    return 1 + i % 2, tokens, 1 if i % 3 == 0 else 3, 128 if i % 4 == 1 else 64


def make_qkv(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    gen = generator(seed)
    q, k, v = (torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(3))
    # A common part of the keys, so that smoothing matters.
    return [q.to(dtype), (k + torch.randn(shape[-1], generator=gen)).to(dtype), v.to(dtype)]


def make_alpha(kind: str, heads: int, tokens: int, seed: int = 1) -> Tensor:
    blocks_q, _ = blocks_of(tokens)
    shape = {"shared": (blocks_q,), "block": (heads, blocks_q), "token": (heads, tokens)}[kind]
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def make_mask(shape: tuple[int, ...], seed: int = 2) -> Tensor:
    """Random map with lists of every length: the first empty, the last full (if there are two)."""
    batch, tokens, heads, _ = shape
    blocks_q, blocks_k = blocks_of(tokens)
    gen = generator(seed)
    scores = torch.rand(batch, heads, blocks_q, blocks_k, generator=gen)
    mask = scores < torch.rand(batch, heads, blocks_q, 1, generator=gen)
    rows = mask.view(-1, blocks_k)
    rows[0], rows[-1] = False, True
    return mask


def to_lists(mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """lut, counts of a bool map; unused entries repeat a block, as they may hold anything."""
    width = int(mask.sum(-1).max()) if width is None else width
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    counts = mask.sum(-1)
    used = torch.arange(width) < counts[..., None]
    lut = order.where(used, torch.tensor(0))
    return lut.to(torch.uint16), counts.to(torch.int32)


def to_mask(lut: Tensor, counts: Tensor, blocks_k: int) -> Tensor:
    mask = torch.zeros(*lut.shape[:3], blocks_k, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, counts.shape)).view(-1, 3).tolist():
        mask[b, h, i, lut[b, h, i, : counts[b, h, i]].long()] = True
    return mask


def expected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alpha: Tensor | None, branch: str, **opts: Any
) -> Tensor:
    out: Any
    scale, smooth_k, phi_input = opts["scale"], opts["smooth_k"], opts["phi_input"]
    quant, compute_dtype = opts.get("quant", "none"), opts.get("compute_dtype")
    if branch == "sparse":
        out = reference.block_sparse_attention(
            q, k, v, mask, scale=scale, smooth_k=smooth_k, quant=quant, compute_dtype=compute_dtype
        )
    elif branch == "linear":
        out = reference.complement_linear_attention(
            q, k, v, mask, smooth_k=smooth_k, phi_input=phi_input, compute_dtype=compute_dtype
        )
    else:
        assert alpha is not None
        out = reference.sla2_attention(
            q, k, v, proj_q=None, proj_k=None, alpha_logit=alpha, block_map=mask, scale=scale,
            smooth_k=smooth_k, phi_input=phi_input, quant=quant, compute_dtype=compute_dtype,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


# ---- comparison -------------------------------------------------------------------------------


def assert_close(actual: Tensor, wanted: Tensor, relative: float) -> None:
    """Largest error against the largest value; the infinities must agree."""
    assert actual.shape == wanted.shape
    assert torch.equal(actual.isinf(), wanted.isinf())
    a, w = (x.detach().double().masked_fill(x.isinf(), 0.0) for x in (actual, wanted))
    if a.numel() == 0:
        return
    bound = relative * max(w.abs().max().item(), 1e-30)
    error = (a - w).abs().max().item()
    assert error <= bound, f"error {error:.3e}, allowed {bound:.3e}"


def autograd(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
