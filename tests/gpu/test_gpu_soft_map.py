"""SoftTop-k by its kernels, on scores alone: the map and its gradient against float64.

The oracle is `sla2.blockwise.router` on the same scores. With SLA2_TEST_DEVICE=cpu it is held
against itself, on float32 tensors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import max_err
from gpu_tools import DEVICE, GPU, Guarded, current_stream, need_memory, same_bits
from torch import Tensor

from sla2 import ops, ops_soft
from sla2.blockwise.router import soft_top_k, soft_top_k_backward
from sla2.constants import SOFT_MAP_MIN

pytestmark = GPU

HALF_ULP = 2.0**-24  # of a number near 1, rounded to float32: relative error 6e-8
LIMIT = 1.1 * HALF_ULP


def shape_of(scores: Tensor) -> tuple[int, ...]:
    """The problem whose map has this shape, (B, H, ceil(T_n / 2), T_n)."""
    b, h, t_m, t_n = scores.shape
    assert t_m == -(-t_n // 2)
    return b, 64 * t_n, h, 64, 0


def top_k(scores: Tensor, k: int, tau: float, pinned: Tensor | None = None) -> Tensor:
    if DEVICE.type == "cpu":
        return soft_top_k(scores, k, tau, pinned)
    m = scores.clone()
    ops_soft._soft_top_k_cuda_(m, shape_of(scores), pinned, k, tau)
    return m


def top_k_backward(m: Tensor, grad_log: Tensor, tau: float) -> Tensor:
    if DEVICE.type == "cpu":
        return soft_top_k_backward(m, grad_log, tau)
    grad = grad_log.clone()
    ops_soft._soft_top_k_bwd_cuda_(grad, m, shape_of(m), tau)
    return grad


def random_scores(t_n: int, heads: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, -(-t_n // 2), t_n, generator=generator).to(DEVICE)


def check_map(m: Tensor, exact: Tensor, k: int) -> None:
    """m is the float64 one, rounded; its rows sum to k."""
    assert max_err(m, exact) <= LIMIT
    # Of a small m too; where all others are near 0 and 1 it is what they leave of the sum.
    error, listed = (m.double() - exact).abs(), exact >= SOFT_MAP_MIN
    assert bool((error <= LIMIT * exact + 1e-13 * k)[listed].all())
    assert bool(((m.double().sum(-1) - k).abs() <= LIMIT * k).all())


# ---- the map ------------------------------------------------------------------------------------

LENGTHS = (1, 2, 3, 31, 127, 128, 129, 512, 1182)
# From a flat map to a hard one; with the last ones float32 cannot tell where a row's root is.
TAUS = (100.0, 1.0, 0.1, 1e-2, 1e-3, 1e-5)


@pytest.mark.parametrize("t_n, tau", list(itertools.product(LENGTHS, TAUS)), ids=str)
def test_lengths(t_n: int, tau: float) -> None:
    """The number of blocks kept: least, 3 %, half, most, all."""
    scores = random_scores(t_n, seed=t_n)
    for k in sorted({1, max(1, 3 * t_n // 100), max(1, t_n // 2), max(1, t_n - 1), t_n}):
        m = top_k(scores, k, tau)
        check_map(m, soft_top_k(scores.double(), k, tau, None), k)
        if k == t_n:
            assert bool((m == 1.0).all())


@pytest.mark.parametrize("tau", [1.0, 1e-3])
def test_the_longest_row(tau: float) -> None:
    """2^20 tokens: 16384 key blocks, 64 KiB of shared memory."""
    if DEVICE.type == "cpu":
        pytest.skip("8192 rows of 16384 blocks take the CPU a minute")
    need_memory(4)
    scores = random_scores(1 << 14, heads=1)
    rows = [0, 1, 4095, 8191]
    m = top_k(scores, 491, tau)
    check_map(m[:, :, rows], soft_top_k(scores[:, :, rows].double(), 491, tau, None), 491)


@pytest.mark.parametrize("offset", [0.0, 100.0, -3e4])
def test_scores_far_from_zero(offset: float) -> None:
    scores = random_scores(129) + offset
    check_map(top_k(scores, 7, 0.05), soft_top_k(scores.double(), 7, 0.05, None), 7)


@pytest.mark.parametrize("tau", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("pinned", [[0], [128, 5], [5, 5, 9], [-1, 7, 129, 1 << 20]], ids=str)
def test_pinned(pinned: list[int], tau: float) -> None:
    """Repeated ones count once, those out of range not at all; in either integer type."""
    scores = random_scores(129)
    index = torch.tensor(pinned, device=DEVICE)
    exact = soft_top_k(scores.double(), 6, tau, index)
    m = top_k(scores, 6, tau, index)
    check_map(m, exact, 6)
    assert bool((m[..., [j for j in pinned if 0 <= j < 129]] == 1.0).all())
    assert same_bits(m, top_k(scores, 6, tau, index.int()))
    none = torch.tensor([], dtype=torch.int32, device=DEVICE)
    assert same_bits(top_k(scores, 6, tau, none), top_k(scores, 6, tau))


def test_where_no_lambda_exists() -> None:
    """All that is kept pinned, all kept, both."""
    scores = random_scores(7)
    ones, rows = torch.ones_like(scores), torch.zeros_like(scores)
    rows[..., [1, 4]] = 1.0
    for pinned in (None, [2], list(range(7))):
        index = None if pinned is None else torch.tensor(pinned, device=DEVICE)
        assert same_bits(top_k(scores, 7, 0.1, index), ones)
    assert same_bits(top_k(scores, 2, 0.1, torch.tensor([4, 1], device=DEVICE)), rows)
    spoiled = scores.clone()
    spoiled[0, 0, 0, 3] = float("nan")
    assert same_bits(top_k(spoiled, 7, 0.1), ones)


def test_ties() -> None:
    """Equal scores have equal m; a row of them k / T_n."""
    flat = torch.full((1, 1, 65, 129), 3.7, device=DEVICE)
    m = top_k(flat, 10, 1e-3)
    assert bool((m == m[0, 0, 0, 0]).all()) and abs(m[0, 0, 0, 0].item() - 10 / 129) < 1e-8
    steps = random_scores(129).round()
    for tau in (1.0, 1e-2, 1e-5):
        m = top_k(steps, 10, tau)
        check_map(m, soft_top_k(steps.double(), 10, tau, None), 10)
        same = steps[..., :, None] == steps[..., None, :]
        assert bool((m[..., :, None] == m[..., None, :])[same].all())


def test_extreme_scores_end() -> None:
    """What no search can resolve is left unresolved, in [0, 1]."""
    scores = random_scores(129)
    scores = torch.where(scores > 0.0, 3e38, scores.clamp(min=-3.0) * 1e38)
    for tau in (1e30, 1.0, 1e-30):
        m = top_k(scores, 5, tau)
        assert bool(((m >= 0.0) & (m <= 1.0)).all())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_not_a_number_fills_its_row_alone(value: str) -> None:
    if DEVICE.type == "cpu" and value != "nan":
        pytest.skip("a bisection to infinity may end in anything")
    scores, pinned = random_scores(129), torch.tensor([5, 60], device=DEVICE)
    want = top_k(scores, 9, 0.1, pinned)
    scores[0, 1, 17, 100] = float(value)
    scores[0, 0, 3, 5] = float(value)  # of a pinned block: not looked at
    m = top_k(scores, 9, 0.1, pinned)
    others = torch.ones(129, dtype=torch.bool)
    others[pinned.cpu()] = False
    assert bool(m[0, 1, 17, others].isnan().all()) and bool((m[0, 1, 17, pinned] == 1.0).all())
    m[0, 1, 17] = want[0, 1, 17]
    assert same_bits(m, want)


# ---- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("t_n, tau", list(itertools.product((1, 31, 129, 1182), TAUS)), ids=str)
def test_gradient(t_n: int, tau: float) -> None:
    scores, k = random_scores(t_n), max(1, t_n // 10)
    pinned = torch.tensor([t_n - 1], device=DEVICE)
    m = top_k(scores, k, tau, pinned)
    grad_log = random_scores(t_n, seed=1) * m
    exact = soft_top_k_backward(m.double(), grad_log.double(), tau)
    grad = top_k_backward(m, grad_log, tau)
    # Where a single m of a row is neither 0 nor 1, exact is 0: what cancels leaves its rounding.
    rounding = 1e-14 * (grad_log.double() / tau).norm()
    assert bool((grad - exact).norm() <= 2 * HALF_ULP * exact.norm() + rounding)
    assert not grad[..., -1].any()


def test_gradient_of_rows_without_any() -> None:
    """All m 0 or 1: zeros, not 0 / 0; NaN of the map or the gradient fills its row alone."""
    m = (random_scores(129) > 0.5).float()
    grad_log = random_scores(129, seed=1)
    grad_log = torch.where(m == 0.0, 0.0, grad_log)
    assert not top_k_backward(m, grad_log, 0.1).any()
    m = torch.sigmoid(random_scores(129))
    want = top_k_backward(m, grad_log, 0.1)
    m[0, 0, 4] = float("nan")
    grad_log[0, 1, 9, 77] = float("nan")
    grad = top_k_backward(m, grad_log, 0.1)
    assert bool(grad[0, 0, 4].isnan().all()) and bool(grad[0, 1, 9].isnan().all())
    grad[0, 0, 4], grad[0, 1, 9] = want[0, 0, 4], want[0, 1, 9]
    assert same_bits(grad, want)


# ---- bits and memory ----------------------------------------------------------------------------


def test_the_same_bits_wherever_a_row_is() -> None:
    scores = random_scores(1182, heads=4)
    grad_log = random_scores(1182, heads=4, seed=1)
    m = top_k(scores, 35, 1e-2)
    grad = top_k_backward(m, grad_log, 1e-2)
    for _ in range(5):
        assert same_bits(top_k(scores, 35, 1e-2), m)
        assert same_bits(top_k_backward(m, grad_log, 1e-2), grad)
    order = torch.randperm(591, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(top_k(scores[:, 2:3, order], 35, 1e-2), m[:, 2:3, order])
    moved = top_k_backward(*(x[:, 2:3, order].contiguous() for x in (m, grad_log)), 1e-2)
    assert same_bits(moved, grad[:, 2:3, order])


@pytest.mark.gpu
@pytest.mark.parametrize("t_n", [1, 2, 31, 129, 1182])
def test_buffers_of_their_own(t_n: int) -> None:
    """Inputs are left alone, outputs written whole and nothing around them."""
    ext, scores = ops._extension(), random_scores(t_n)
    k, tau, shape = max(1, t_n // 10), 0.1, shape_of(scores)
    pinned = torch.tensor([0], dtype=torch.int32, device=DEVICE)
    want = top_k(scores, k, tau, pinned)
    want_grad = top_k_backward(want, scores, tau)
    m, grad = (Guarded(tuple(scores.shape), torch.float32, 0xFF) for _ in range(2))
    given = scores.clone()
    ext.soft_map(
        shape=shape, tau=tau, scores=given.data_ptr(), pinned_kv=pinned.data_ptr(), num_pinned=1,
        num_kv_blocks=k, soft_map=m.tensor.data_ptr(), stream=current_stream(),
    )  # fmt: skip
    ext.soft_map_bwd(
        shape=shape, tau=tau, soft_map=m.tensor.data_ptr(), grad_log_map=given.data_ptr(),
        grad_scores=grad.tensor.data_ptr(), stream=current_stream(),
    )  # fmt: skip
    m.check("map")
    grad.check("gradient")
    assert same_bits(given, scores)
    assert same_bits(m.tensor, want) and same_bits(grad.tensor, want_grad)


@pytest.mark.gpu
def test_refused_arguments() -> None:
    ext, x = ops._extension(), random_scores(4)
    right = {
        "shape": shape_of(x), "tau": 0.1, "scores": x.data_ptr(), "pinned_kv": 0, "num_pinned": 0,
        "num_kv_blocks": 2, "soft_map": x.data_ptr(), "stream": current_stream(),
    }  # fmt: skip
    for name, value in (
        ("tau", 0.0), ("tau", float("nan")), ("scores", 0), ("soft_map", 0), ("num_kv_blocks", 0),
        ("num_kv_blocks", 5), ("num_pinned", 3), ("num_pinned", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            ext.soft_map(**{**right, name: value})
    with pytest.raises(ValueError, match="pinned_kv is null"):
        ext.soft_map(**{**right, "num_pinned": 1})
