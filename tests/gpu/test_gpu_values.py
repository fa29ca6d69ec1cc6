"""Values at the edges of the formats, degenerate shapes, hostile block maps (T9, T10)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import grad_problem
import pytest
import torch
import torch.nn.functional as F
from cases import HEAD_DIMS, KERNEL_DTYPES, QUANTS, Case, Inputs, make_inputs
from compare import (
    EMULATION_FACTOR,
    FORWARD_FACTOR,
    check_forward,
    check_lse,
    max_err,
    rounding_atol,
)
from gpu_tools import DEVICE, GPU, Parts, Problem, check_parts, run_parts, same_bits, settled_keys
from torch import Tensor

import sla2
from sla2.reference_branches import alpha_per_token

pytestmark = GPU

BF16, FP16 = torch.bfloat16, torch.float16
MODES = list(itertools.product(KERNEL_DTYPES, QUANTS))
LOW_BIT = ("int8_fp16", "int8_fp8")
SEQLEN = 457
CHANNEL = 7


def make(dtype: torch.dtype, head_dim: int = 64, seqlen: int = SEQLEN) -> tuple[Inputs, Tensor]:
    """B 2, H 3, settled keys; a random map with both branches in every query block."""
    case = Case(2, seqlen, 3, head_dim, "2", dtype)
    inputs = make_inputs(case, DEVICE)
    inputs.k = settled_keys(inputs.k)
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(2, 3, case.num_q_blocks, case.num_k_blocks, generator=generator) < 0.4
    dense[..., 0], dense[..., 1] = True, False
    return inputs, dense.to(DEVICE)


def attend(inputs: Inputs, dense: Tensor, quant: str, **options: Any) -> Parts:
    block_map = sla2.BlockMap.from_dense(dense, inputs.q.shape[1])
    return run_parts(inputs, block_map, quant=quant, layout="BNHD", **options)


def check(
    inputs: Inputs, dense: Tensor, quant: str, *, lse: bool = True, linear: bool = True,
    apart: int | None = None, **options: Any,
) -> Parts:  # fmt: skip
    """Against the reference. In float16 the sparse branch alone: the linear one, computed in
    bfloat16, is compared where the output is bfloat16."""
    got = attend(inputs, dense, quant, **options)
    linear = linear and inputs.q.dtype == BF16
    compared = got if linear else got._replace(out=None, o_l=None)
    if not lse:
        compared = compared._replace(lse=None)
    problem = Problem(*inputs.qkv, dense, inputs.alpha_logit, options)
    check_parts(problem, compared, quant, apart=apart)
    for name, x in zip(Parts._fields, got, strict=True):
        assert x is not None and bool(x.isfinite().all()), name
    return got


def backward(
    inputs: Inputs, dense: Tensor, quant: str = "none", branch: str = "both", **options: Any
) -> grad_problem.Problem:
    """The gradient of the branch for a random one of its output."""
    b, n, h, d = inputs.q.shape
    case = Case(b, n, h, d, dtype=inputs.q.dtype, quant=quant)
    grad_out = torch.randn(case.shape, generator=torch.Generator().manual_seed(4))
    return grad_problem.make_problem(
        case, branch, inputs, sla2.BlockMap.from_dense(dense, n), grad_out.to(DEVICE, case.dtype),
        **options,
    )  # fmt: skip


# ---- T9: logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_saturated_softmax(dtype: torch.dtype, quant: str, head_dim: int) -> None:
    """Logits of standard deviation 100: nearly every row has one key that counts.

    30 in int8_fp8: the last bits of a logit of some hundreds decide how P rounds to three bits of
    mantissa, and a row's one P that rounds the other way costs that row up to 12 %.
    """
    inputs, dense = make(dtype, head_dim)
    inputs.q = inputs.q * (30 if quant == "int8_fp8" else 100)
    check(inputs, dense, quant)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("branch", grad_problem.BRANCHES)
def test_gradient_of_saturated_softmax(
    dtype: torch.dtype, quant: str, head_dim: int, branch: str
) -> None:
    inputs, dense = make(dtype, head_dim)
    inputs.q = inputs.q * (30 if quant == "int8_fp8" else 100)
    grad_problem.check_extreme(backward(inputs, dense, quant, branch))


def test_saturated_softmax_of_large_keys() -> None:
    """Logits of standard deviation 10,000, where float32 has no 1e-3 left for lse.

    The linear branch is finite and no more: phi of both q and k is one-hot, and where no unlisted
    key has a query's feature its weights are ratios of numbers below float32's smallest.
    """
    inputs, dense = make(BF16)
    inputs.q, inputs.k = inputs.q * 100, inputs.k * 100
    check(inputs, dense, "none", lse=False, linear=False)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("branch", grad_problem.BRANCHES)
def test_gradient_of_large_keys(branch: str) -> None:
    """Finite and no more, in the sparse branch too: its P sees what float32 has left of a logit."""
    inputs, dense = make(BF16)
    inputs.q, inputs.k = inputs.q * 100, inputs.k * 100
    assert all(bool(x.isfinite().all()) for x in backward(inputs, dense, branch=branch).run())


def _zero_queries(x: Inputs) -> None:
    x.q.zero_()


def _equal_keys(x: Inputs) -> None:
    x.k.fill_(1.703125)


def _zero_keys(x: Inputs) -> None:
    x.k.zero_()


def _zero_queries_and_keys(x: Inputs) -> None:
    x.q.zero_()
    x.k.zero_()


def _denormal_queries_and_keys(x: Inputs) -> None:
    small = 1e-39 if x.q.dtype == BF16 else 2e-7
    x.q = (x.q.double() * small).to(x.q.dtype)
    x.k = (x.k.double() * small).to(x.k.dtype)
    assert bool(x.q.any()) and bool(x.k.any())


FLAT = (_zero_queries, _equal_keys, _zero_keys, _zero_queries_and_keys, _denormal_queries_and_keys)


@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("edit", FLAT, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("seqlen", [65, SEQLEN])
def test_equal_logits(
    edit: Callable[[Inputs], None], dtype: torch.dtype, quant: str, seqlen: int
) -> None:
    """Every weight is the same; int8 blocks without any content; short tails."""
    inputs, dense = make(dtype, 64, seqlen)
    edit(inputs)
    got = check(inputs, dense, quant)
    listed = dense.clone().float() * 64
    listed[..., -1] *= ((seqlen - 1) % 64 + 1) / 64
    keys = listed.sum(-1).repeat_interleave(128, -1)[..., :seqlen]
    assert got.lse is not None
    check_lse(got.lse, keys.log())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("edit", FLAT, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("seqlen", [65, SEQLEN])
def test_gradient_of_equal_logits(
    edit: Callable[[Inputs], None], dtype: torch.dtype, quant: str, seqlen: int
) -> None:
    """Equal keys have no gradient in q, queries of zero none in k."""
    inputs, dense = make(dtype, 64, seqlen)
    ordinary = backward(inputs, dense, quant)
    inputs, _ = make(dtype, 64, seqlen)
    edit(inputs)
    grad_problem.check_extreme(backward(inputs, dense, quant), ordinary)


def very_negative(
    dtype: torch.dtype, quant: str, head_dim: int, seqlen: int
) -> tuple[Inputs, Tensor, float]:
    """All listed logits near -200 (-120 in int8_fp8, whose P sees the last bits of a logit), below
    the -88.7 where exp() ends; N % 128 == 64. With the map and the scale."""
    inputs, _ = make(dtype, head_dim, seqlen)
    inputs.q = (8 + 0.1 * inputs.q.float()).to(dtype)
    inputs.k = settled_keys(-3.5 + 0.1 * inputs.k.float()).to(dtype)  # the second half +3.5
    dense = torch.zeros(2, 3, -(-seqlen // 128), seqlen // 64, dtype=torch.bool, device=DEVICE)
    dense[..., : seqlen // 128] = True
    return inputs, dense, (120 if quant == "int8_fp8" else 200) / (8 * 3.5 * head_dim)


@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seqlen", [192, 320, 448])
@pytest.mark.parametrize("smooth_k", [True, False])
def test_very_negative_lse(
    dtype: torch.dtype, quant: str, head_dim: int, seqlen: int, smooth_k: bool
) -> None:
    inputs, dense, scale = very_negative(dtype, quant, head_dim, seqlen)
    got = check(inputs, dense, quant, smooth_k=smooth_k, scale=scale)
    assert got.lse is not None and got.lse.max().item() < -88.7


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seqlen", [192, 448])
@pytest.mark.parametrize("branch", grad_problem.BRANCHES)
def test_gradient_of_very_negative_lse(
    dtype: torch.dtype, quant: str, head_dim: int, seqlen: int, branch: str
) -> None:
    inputs, dense, scale = very_negative(dtype, quant, head_dim, seqlen)
    grad_problem.check_extreme(backward(inputs, dense, quant, branch, scale=scale))


# ---- T9: values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_zero_values(dtype: torch.dtype, quant: str, head_dim: int) -> None:
    inputs, dense = make(dtype, head_dim)
    inputs.v.zero_()
    for x in attend(inputs, dense, quant)[:3]:
        assert x is not None and not x.any()


@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_channel(dtype: torch.dtype, quant: str, head_dim: int, value: float) -> None:
    inputs, dense = make(dtype, head_dim)
    inputs.v[..., CHANNEL] = value
    got = check(inputs, dense, quant, apart=CHANNEL)
    if value == 0.0:
        for x in got[:3]:
            assert x is not None and not x[..., CHANNEL].any()


@pytest.mark.parametrize(("dtype", "quant"), MODES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_loud_channel(dtype: torch.dtype, quant: str, head_dim: int) -> None:
    """Near the end of float16; in bfloat16 as large as sums over the tokens stay in float32."""
    inputs, dense = make(dtype, head_dim)
    inputs.v[..., CHANNEL] = inputs.v[..., CHANNEL].sign() * (6e4 if dtype == FP16 else 1e33)
    check(inputs, dense, quant, apart=CHANNEL)


@pytest.mark.parametrize("quant", LOW_BIT)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_channel_near_the_end_of_float32(quant: str, head_dim: int) -> None:
    """1e38 in one channel: the low-bit sparse branch, which scales each channel of V, stays finite
    and leaves the others alone."""
    inputs, dense = make(BF16, head_dim)
    block_map = sla2.BlockMap.from_dense(dense, SEQLEN)
    quiet = sla2.block_sparse_attention(*inputs.qkv, block_map, quant=quant)
    inputs.v[..., CHANNEL] = inputs.v[..., CHANNEL].sign() * 1e38
    loud = sla2.block_sparse_attention(*inputs.qkv, block_map, quant=quant)
    assert isinstance(quiet, Tensor) and isinstance(loud, Tensor)
    others = torch.arange(head_dim, device=DEVICE) != CHANNEL
    assert same_bits(loud[..., others], quiet[..., others])
    assert bool(loud.isfinite().all()) and loud[..., CHANNEL].abs().max().item() > 1e37
    # The reference's linear branch overflows: it takes no part, as nothing is compared with it.
    problem = Problem(*inputs.qkv, dense, inputs.alpha_logit)
    check_parts(problem, Parts(None, loud), quant, apart=CHANNEL)


@pytest.mark.parametrize("quant", QUANTS)
def test_denormal_values(quant: str) -> None:
    """float16 subnormals, on whose fixed grid the result lies too: half a step is its rounding."""
    inputs, dense = make(FP16)
    inputs.v = (inputs.v.float() * 1e-5).half()
    got = attend(inputs, dense, quant)
    problem = Problem(*inputs.qkv, dense, inputs.alpha_logit)
    plain = problem.expected(torch.float64)
    assert got.o_s is not None and plain.o_s is not None
    if quant == "none":
        low = problem.expected(FP16)
        assert low.o_s is not None
        limit = FORWARD_FACTOR * max_err(low.o_s, plain.o_s)
        assert max_err(got.o_s, plain.o_s) <= limit
    else:
        emulation = problem.expected(torch.float32, quant)
        assert emulation.o_s is not None
        half_step = torch.finfo(FP16).smallest_normal * torch.finfo(FP16).eps / 2
        limit = EMULATION_FACTOR * max_err(emulation.o_s, plain.o_s) + half_step
        assert max_err(got.o_s, emulation.o_s) <= limit
    assert bool(got.o_s.any())
    for x in got:
        assert x is not None and bool(x.isfinite().all())


def one_hot(head_dim: int, logit: float) -> tuple[Inputs, Tensor]:
    """phi(Q) and phi(K) on different features: phi(Q) Z is e^-logit or underflows to zero."""
    inputs, dense = make(BF16, head_dim)
    inputs.q, inputs.k = inputs.q * 0.5, inputs.k * 0.5
    inputs.q[..., 0] = logit
    inputs.k[..., 1] = logit
    return inputs, dense


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("logit", [60.0, 80.0, 200.0])
def test_one_hot_features(head_dim: int, logit: float) -> None:
    """Above e^-69, the 1e-30 that bounds the denominator, O_l is the weighted mean of V it should
    be; below, it fades out, and must stay within V's range.
    """
    inputs, dense = one_hot(head_dim, logit)
    if logit == 60.0:
        check(inputs, dense, "none", smooth_k=False)
    got = attend(inputs, dense, "none", smooth_k=False)
    assert got.o_l is not None and got.out is not None
    assert bool(got.o_l.isfinite().all()) and bool(got.out.isfinite().all())
    assert got.o_l.abs().max().item() <= 1.01 * inputs.v.abs().max().item()
    # However small the denominator, the output keeps its share of the sparse branch.
    assert got.o_s is not None
    alpha = alpha_per_token(inputs.alpha_logit, 3, SEQLEN, 128, torch.float32).T[..., None]
    blend = alpha * got.o_s.float() + (1 - alpha) * got.o_l.float()
    assert max_err(got.out, blend) <= rounding_atol(blend, BF16)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("logit", [60.0, 80.0, 200.0])
@pytest.mark.parametrize("branch", ["both", "linear"])
def test_gradient_of_one_hot_features(head_dim: int, logit: float, branch: str) -> None:
    """The reference's where O_l is the weighted mean; finite where it fades out."""
    problem = backward(*one_hot(head_dim, logit), branch=branch, smooth_k=False)
    assert all(bool(x.isfinite().all()) for x in problem.run())
    if logit == 60.0:
        grad_problem.check_extreme(problem)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("whole_row", [True, False])
def test_not_finite(name: str, value: float, quant: str, whole_row: bool) -> None:
    """In one row (or element) of one head: visible there, no bit of another head changes."""
    case = Case(2, SEQLEN, 3, 64, "2", BF16, quant=quant)
    inputs = make_inputs(case, DEVICE)
    clean, aux = sla2.sla2_attention(*inputs.qkv, return_aux=True, **inputs.kwargs)
    columns = slice(None) if whole_row else 5
    getattr(inputs, name)[1, SEQLEN // 2, 1, columns] = value
    out, after = sla2.sla2_attention(*inputs.qkv, return_aux=True, **inputs.kwargs)
    assert isinstance(aux.block_map, sla2.BlockMap) and isinstance(after.block_map, sla2.BlockMap)
    after.block_map.validate()
    assert not bool(out[1, :, 1].isfinite().all())
    every = torch.ones(2, 3, T_M, T_N, dtype=torch.bool, device=DEVICE)
    o_s = attend(inputs, every, quant).o_s
    assert o_s is not None and not bool(o_s[1, :, 1].isfinite().all())
    others = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    others[1, 1] = False
    assert same_bits(out.transpose(1, 2)[others], clean.transpose(1, 2)[others])
    assert same_bits(after.lse[others], aux.lse[others])
    got, expected = (x.lut.to(torch.int32)[others] for x in (after.block_map, aux.block_map))
    assert same_bits(got, expected)


# ---- T10: degenerate problems -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 300), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, seqlen: int, layout: str, mode: str) -> None:
    """Empty results and zero gradients."""
    inputs = make_inputs(Case(batch, seqlen, 3, 64, "1", BF16, layout), DEVICE)
    leaves = [x.requires_grad_() for x in (*inputs.qkv, inputs.alpha_logit)]
    out, aux = sla2.sla2_attention(
        *inputs.qkv, proj_q=inputs.proj_q, proj_k=inputs.proj_k, alpha_logit=inputs.alpha_logit,
        layout=layout, mode=mode, return_aux=True,
    )  # fmt: skip
    assert out.shape == inputs.q.shape and aux.lse.shape == (batch, 3, seqlen)
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == x.shape and not grad.any()
    block_map = sla2.route(
        inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, layout=layout
    )
    for quant in QUANTS:
        o_s = sla2.block_sparse_attention(*inputs.qkv, block_map, quant=quant, layout=layout)
        assert isinstance(o_s, Tensor) and o_s.shape == inputs.q.shape
    o_l = sla2.complement_linear_attention(*inputs.qkv, block_map, layout=layout)
    assert o_l.shape == inputs.q.shape


def test_one_block_at_least_and_all_at_most() -> None:
    inputs = make_inputs(Case(1, SEQLEN, 1, 64, "1", BF16), DEVICE)
    options: dict[str, Any] = {
        "proj_q": inputs.proj_q, "proj_k": inputs.proj_k, "alpha_logit": inputs.alpha_logit,
        "return_aux": True,
    }  # fmt: skip
    out, aux = sla2.sla2_attention(*inputs.qkv, topk=1e-9, **options)
    assert isinstance(aux.block_map, sla2.BlockMap)
    assert aux.block_map.num_kv_blocks == 1 and bool(out.isfinite().all())
    with pytest.raises(ValueError, match="num_kv_blocks=9 is out of range"):
        sla2.sla2_attention(*inputs.qkv, num_kv_blocks=9, **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 64, 65, 1000])
def test_all_blocks_are_dense_attention(dtype: torch.dtype, seqlen: int) -> None:
    """Whatever alpha is, as the complement is empty. The oracle is PyTorch's, in float64."""
    inputs = make_inputs(Case(2, seqlen, 3, 128, "all", dtype), DEVICE)
    out, aux = sla2.sla2_attention(
        *inputs.qkv, proj_q=inputs.proj_q, proj_k=inputs.proj_k, alpha_logit=inputs.alpha_logit,
        topk=1.0, return_aux=True,
    )  # fmt: skip
    assert isinstance(aux.block_map, sla2.BlockMap) and aux.sparsity == 0.0
    q, k, v = (x.double().transpose(1, 2) for x in inputs.qkv)
    exact = F.scaled_dot_product_attention(q, k, v)
    dense = aux.block_map.to_dense()
    problem = Problem(*inputs.qkv, dense, inputs.alpha_logit)
    low = problem.low_precision(problem.expected(torch.float64))
    assert dense.all() and low.out is not None
    check_forward(out, exact.transpose(1, 2), low.out)


# ---- hostile block maps -------------------------------------------------------------------------

T_N = -(-SEQLEN // 64)  # 8
T_M = -(-SEQLEN // 128)


def lists(rows: list[int], count: int) -> sla2.BlockMap:
    """The same list for every query block of B 2, H 3."""
    lut = torch.tensor(rows).expand(2, 3, T_M, -1).contiguous().to(torch.uint16)
    counts = torch.full((2, 3, T_M), count, dtype=torch.int32)
    return sla2.BlockMap(lut.to(DEVICE), counts.to(DEVICE), seqlen=SEQLEN)


HOSTILE = {
    "past the end": (lists, [1, 3, 7, T_N, 0xFFFF, 40000], 6, [1, 3, 7, 0, 0, 0], 3),
    "in between": (lists, [T_N, 1, 0xFFFF, 3, 9, 7], 6, [1, 3, 7, 0, 0, 0], 3),
    "nothing valid": (lists, [T_N, 60000, 0xFFFF], 3, [0, 0, 0], 0),
    "count too large": (lists, [1, 3, 7], 2**31 - 1, [1, 3, 7], 3),
    "count one too large": (lists, [1, 3, 7], 4, [1, 3, 7], 3),
    "count negative": (lists, [1, 3, 7], -1, [1, 3, 7], 0),
    "count most negative": (lists, [1, 3, 7], -(2**31), [1, 3, 7], 0),
    "repeated": (lists, [2, 2, 2, 5, 5, 0, 2], 7, [0, 2, 5, 0, 0, 0, 0], 3),
    "descending": (lists, [7, 3, 1], 3, [1, 3, 7], 3),
    "as wide as all blocks": (
        lists, [0, 1, 2, 4, 5, 6, 7, 0xFFFF], T_N, [0, 1, 2, 4, 5, 6, 7, 0], T_N - 1
    ),
    "wide, invalid first": (
        lists, [0xFFFF, 0, 1, 2, 4, 5, 6, 7], T_N, [0, 1, 2, 4, 5, 6, 7, 0], T_N - 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hostile_block_map(kind: str, quant: str, head_dim: int) -> None:
    """A list counts as the set of its entries that name a block: the bits of the clean map."""
    inputs = make_inputs(Case(2, SEQLEN, 3, head_dim, "2", BF16), DEVICE)
    build, rows, count, clean_rows, clean_count = HOSTILE[kind]
    hostile, clean = build(rows, count), build(clean_rows, clean_count)
    with pytest.raises(ValueError, match="invalid block map"):
        hostile.validate()
    assert torch.equal(hostile.to_dense(), clean.to_dense())
    got, expected = (
        run_parts(inputs, block_map, quant=quant, layout="BNHD") for block_map in (hostile, clean)
    )
    for name, a, b in zip(Parts._fields, got, expected, strict=True):
        assert a is not None and b is not None
        assert same_bits(a, b), name


@pytest.mark.parametrize("kind", ["past the end", "in between", "count too large", "repeated"])
def test_gradient_with_a_hostile_block_map(kind: str) -> None:
    inputs = make_inputs(Case(2, SEQLEN, 3, 64, "2", BF16), DEVICE)
    build, rows, count, _, _ = HOSTILE[kind]
    leaves = [x.requires_grad_() for x in (*inputs.qkv, inputs.alpha_logit)]
    out = sla2.sla2_attention(
        *inputs.qkv, proj_q=None, proj_k=None, alpha_logit=inputs.alpha_logit,
        block_map=build(rows, count),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    for grad in torch.autograd.grad(out.float().square().sum(), leaves):
        assert bool(grad.isfinite().all()) and bool(grad.any())
