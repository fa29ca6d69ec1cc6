"""Stage 1's map on its own: what CUDA shares with the CPU path, and what its threshold costs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from blockwise_cases import RAGGED, assert_close, generator, make_qkv
from package_tools import REPOSITORY
from torch import Tensor

from sla2 import ops_soft, reference
from sla2.blockwise import add_to_blocks_, soft_map, soft_map_backward, soft_scores
from sla2.blockwise import layout as blockwise_layout
from sla2.blockwise.router import pooled, soft_top_k
from sla2.constants import BLOCK_K, BLOCK_Q, SOFT_MAP_MIN
from sla2.reference_branches import sparse_branch
from sla2.reference_math import pool_blocks, router_scores, smooth_keys


def make_projs(heads: int | None, dim: int = 64) -> list[Tensor]:
    shape = (dim, dim) if heads is None else (heads, dim, dim)
    gen = generator(4)
    return [torch.randn(shape, generator=gen, dtype=torch.float64) / 4 for _ in range(2)]


def reference_scores(q: Tensor, k: Tensor, projs: list[Tensor], kind: str, smooth: bool) -> Tensor:
    """P_c of q, k (B, N, H, D)."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    k = smooth_keys(k) if smooth else k
    return router_scores(pool_blocks(q, BLOCK_Q), pool_blocks(k, BLOCK_K), *projs, kind)


# ---- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", RAGGED)
def test_pooled_means(tokens: int, dtype: torch.dtype) -> None:
    x = make_qkv((2, tokens, 3, 64), dtype)[1]
    wide = x.transpose(1, 2).double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for block in (BLOCK_Q, BLOCK_K):
        assert_close(pooled(x, block, centre=False), pool_blocks(wide, block), tolerance)
        error = pooled(x, block, centre=True) - pool_blocks(smooth_keys(wide), block)
        assert error.abs().max().item() < tolerance


@pytest.mark.parametrize("tokens", RAGGED)
def test_every_token_gets_the_share_of_its_block(tokens: int) -> None:
    blocks = -(-tokens // BLOCK_K)
    shares = torch.randn(2, 3, blocks, 8, generator=generator(0), dtype=torch.float64)
    start = torch.randn(2, tokens, 3, 8, generator=generator(1)).bfloat16()
    heads_first = start.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    per_token = shares.repeat_interleave(BLOCK_K, 2)[:, :, :tokens].transpose(1, 2)
    expected = (start.double() + per_token).bfloat16()
    add_to_blocks_(start, shares, BLOCK_K)
    add_to_blocks_(heads_first.transpose(1, 2), shares, BLOCK_K)
    assert torch.equal(start, expected) and torch.equal(heads_first.transpose(1, 2), expected)


def test_soft_top_k_where_no_lambda_exists() -> None:
    """All that is kept pinned, all kept, both; pinned blocks out of range do not count."""
    p_c = torch.randn(3, 7, generator=generator(0), dtype=torch.float64)
    ones, rows = torch.ones(7, dtype=torch.float64), p_c.new_zeros(3, 7)
    assert torch.equal(soft_top_k(p_c, 7, 0.1, None), ones.expand(3, 7))
    assert torch.equal(soft_top_k(p_c, 7, 0.1, torch.tensor([2])), ones.expand(3, 7))
    assert torch.equal(soft_top_k(p_c, 7, 0.1, torch.arange(7)), ones.expand(3, 7))
    rows[:, [1, 4]] = 1.0
    assert torch.equal(soft_top_k(p_c, 2, 0.1, torch.tensor([4, 1])), rows)
    inside = soft_top_k(p_c, 3, 0.1, torch.tensor([4]))
    assert torch.equal(soft_top_k(p_c, 3, 0.1, torch.tensor([-1, 4, 7, 1 << 20])), inside)
    assert_close(inside.sum(-1), torch.full((3,), 3.0), 1e-12)
    assert torch.equal(soft_top_k(p_c, 3, 0.1, torch.tensor([], dtype=torch.int32)),
                       soft_top_k(p_c, 3, 0.1, None))  # fmt: skip


CASES = [
    # tokens, count, score, smooth_k, pinned, projections of each head
    (1, 1, "scaled", True, None, False),
    (65, 1, "scaled", True, None, True),
    (193, 3, "softmax", False, None, True),
    (193, 2, "raw", True, [3], False),
    (700, 3, "scaled", True, [1, 10], True),
    (700, 3, "softmax", True, None, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_map_and_gradient(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through the reference; a few rows at a time."""
    tokens, count, kind, smooth, pinned, per_head = case
    q, k, _ = make_qkv((2, tokens, 3, 64), torch.float64)
    projs = make_projs(3 if per_head else None)
    pins = None if pinned is None else torch.tensor(pinned)
    options: dict[str, Any] = {"tau": 0.05, "router_score": kind, "smooth_k": smooth}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(blockwise_layout.CHUNK_ELEMENTS, "cpu", 5 * (tokens // 64 + 1))

    m = soft_map(q, k, *projs, pins, count, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, *projs)]
    scores = reference_scores(leaves[0], leaves[1], leaves[2:], kind, smooth)
    expected, log_m = reference.soft_topk_with_log(scores, count, 0.05, pins)
    assert_close(m, expected, 1e-9)

    grad_log = torch.randn(m.shape, generator=generator(9), dtype=torch.float64)
    wanted = torch.autograd.grad(log_m, leaves, grad_log)
    *grad_projs, dq, dk = soft_map_backward(q, k, *projs, m, grad_log.clone(), **options)
    grads = [torch.zeros_like(q), torch.zeros_like(k)]
    add_to_blocks_(grads[0], dq, BLOCK_Q)
    add_to_blocks_(grads[1], dk, BLOCK_K)
    for actual, exact in zip((*grads, *grad_projs), wanted, strict=True):
        error = (actual - exact).abs().max().item()
        assert error <= 1e-9 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("kind", ["raw", "scaled", "softmax"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_scores_are_contiguous(kind: str, heads_first: bool) -> None:
    """The kernel writes its map in their place."""
    q, k, _ = make_qkv((2, 300, 3, 64), torch.bfloat16)
    if heads_first:
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    for projs in (make_projs(None), make_projs(3)):
        scores = soft_scores(q, k, *projs, router_score=kind, smooth_k=True)
        assert scores.shape == (2, 3, 3, 5) and scores.dtype == torch.float32
        assert scores.is_contiguous()
        exact = reference_scores(q.double(), k.double(), projs, kind, True)
        assert_close(scores, exact, 1e-5)


def test_arguments_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the compiled module: in place, int32 pins, the stream."""
    extension = mock.Mock()
    monkeypatch.setattr(ops_soft, "_extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    q = torch.zeros(2, 3, 300, 64, dtype=torch.float16)
    shape = ops_soft._shape(q, "BHND")
    assert shape == (2, 300, 3, 64, 1)
    m, grad = torch.zeros(2, 2, 3, 3, 5)
    common = {"shape": shape, "tau": 0.2, "stream": 77, "soft_map": m.data_ptr()}

    ops_soft._soft_top_k_cuda_(m, shape, None, 2, 0.2)
    no_pins = {"pinned_kv": 0, "num_pinned": 0}
    given = {**common, **no_pins, "scores": m.data_ptr(), "num_kv_blocks": 2}
    extension.soft_map.assert_called_once_with(**given)
    pinned = torch.tensor([4, 1], dtype=torch.int32)
    ops_soft._soft_top_k_cuda_(m, shape, pinned, 2, 0.2)
    given.update(pinned_kv=pinned.data_ptr(), num_pinned=2)
    extension.soft_map.assert_called_with(**given)

    ops_soft._soft_top_k_bwd_cuda_(grad, m, shape, 0.2)
    both = dict.fromkeys(("grad_log_map", "grad_scores"), grad.data_ptr())
    extension.soft_map_bwd.assert_called_once_with(**common, **both)


# ---- the threshold ------------------------------------------------------------------------------


def test_the_header_has_the_same_threshold() -> None:
    header = (REPOSITORY / "csrc" / "include" / "sla2" / "sla2.h").read_text()
    (denominator,) = re.findall(r"#define SLA2_SOFT_MAP_MIN \(1\.0f / (\d+)\.0f\)", header)
    assert 1.0 / int(denominator) == SOFT_MAP_MIN


def test_no_row_is_left_without_a_block() -> None:
    """The flattest map of the longest sequence: every m is 1 / 16384."""
    m = soft_top_k(torch.zeros(1, 1 << 14), 1, 0.1, None)
    assert bool((m >= SOFT_MAP_MIN).all())


def test_a_block_left_out_counts_whole_in_the_linear_branch() -> None:
    m = torch.tensor(SOFT_MAP_MIN)
    assert (1.0 - torch.nextafter(m, torch.tensor(0.0))).bfloat16().item() == 1.0
    assert (1.0 - m).bfloat16().item() == 1.0


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("tau", [0.1, 2.5e-3, 1e-3])
@pytest.mark.parametrize("count", [2, 6])
def test_what_the_threshold_leaves_out(count: int, tau: float, spread: float) -> None:
    """O_s without the blocks below it, against O_s of all: weight less than SOFT_MAP_MIN T_n / K.

    Of every row where scores are alike, of their mean where a few keys have most of the weight:
    these may be in a block that the router gives next to none.
    """
    q, k, v = (x.transpose(1, 2) for x in make_qkv((1, 2600, 2, 64), torch.float64))
    q, k = q * spread, smooth_keys(k)
    scores = router_scores(
        pool_blocks(q, BLOCK_Q), pool_blocks(k, BLOCK_K), torch.eye(64), torch.eye(64)
    )
    m, log_m = reference.soft_topk_with_log(scores / spread, count, tau)
    listed = m >= SOFT_MAP_MIN
    assert bool(listed.all()) == (tau == 0.1)
    whole, lse = sparse_branch(q, k, v, m > 0, scale=0.125, bias=log_m)
    part, part_lse = sparse_branch(q, k, v, listed, scale=0.125, bias=log_m)
    left_out = -torch.expm1(part_lse - lse)
    figure = left_out.max() if spread == 1.0 else left_out.mean()
    assert figure.item() < SOFT_MAP_MIN * m.shape[-1] / count
    error = (whole - part).abs().amax(-1)
    assert bool((error <= 2 * left_out * v.abs().max() + 1e-12).all())
