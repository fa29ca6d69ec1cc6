"""The forward kernels against the specification (T1, T2q, T3) and the router apart (T2r).

The reference takes the kernels' own block map, so that a block swapped at a near tie does not hide
the arithmetic's error. Every kernel instance (dtype, head_dim, precision) occurs in each group; the
core of it runs with either set of kernels (`path`).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import (
    HEAD_DIMS,
    KERNEL_DTYPES,
    LARGE_SEQLENS,
    QUANTS,
    SMALL_SEQLENS,
    Case,
    Inputs,
    make_inputs,
    sweep,
)
from compare import EMULATION_REL_L2, check_quant, rel_l2
from gpu_tools import (
    DEVICE,
    GPU,
    Parts,
    Problem,
    check_lse_by_format,
    check_parts,
    check_selection,
    exact_scores,
    need_memory,
    raw_route,
    run_parts,
    same_bits,
    settled_keys,
)
from torch import Tensor

import sla2
from sla2 import ops
from sla2.reference_math import hard_map

pytestmark = GPU

INSTANCES = list(itertools.product(KERNEL_DTYPES, HEAD_DIMS, QUANTS))
LOW_BIT = ("int8_fp16", "int8_fp8")


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    """Inputs on the device; a low-bit case gets keys whose quantisation is certain."""
    inputs = make_inputs(case, DEVICE, seed=seed)
    if case.quant != "none":
        inputs.k = settled_keys(inputs.k, case.layout, uneven=True)
    return inputs


def check_case(case: Case, **options: Any) -> None:
    """The whole operation, its map, and each branch alone on that map."""
    inputs = inputs_of(case)
    router = {name: options.pop(name) for name in ("pinned_kv",) if name in options}
    kwargs: dict[str, Any] = {**inputs.kwargs, **options, **router}
    out, aux = sla2.sla2_attention(*inputs.qkv, return_aux=True, **kwargs)
    assert out.shape == case.shape and out.dtype == case.dtype and out.is_contiguous()
    block_map = aux.block_map
    assert isinstance(block_map, sla2.BlockMap)
    block_map.validate()
    assert bool((block_map.counts == case.num_kv_blocks).all())

    smooth = {name: options[name] for name in ("smooth_k",) if name in options}
    alone = sla2.route(
        inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k,
        num_kv_blocks=case.num_kv_blocks, layout=case.layout, **smooth, **router,
    )  # fmt: skip
    assert same_bits(alone.lut, block_map.lut) and same_bits(alone.counts, block_map.counts)

    got = run_parts(inputs, block_map, quant=case.quant, layout=case.layout, **options)
    assert got.out is not None and got.lse is not None
    assert same_bits(got.out, ops.bnhd(out, case.layout)) and same_bits(got.lse, aux.lse)
    q, k, v = (ops.bnhd(x, case.layout) for x in inputs.qkv)
    dense = block_map.to_dense()
    check_parts(Problem(q, k, v, dense, inputs.alpha_logit, options), got, case.quant)

    rows = slice(None) if case.seqlen <= 20000 else slice(0, None, 97)
    scores = exact_scores(q, k, inputs.proj_q, inputs.proj_k, **smooth)[:, :, rows]
    pinned = router.get("pinned_kv")
    check_selection(dense[:, :, rows], scores, case.num_kv_blocks, pinned)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "head_dim", "quant"), INSTANCES, ids=str)
def test_instance(dtype: torch.dtype, head_dim: int, quant: str) -> None:
    """Several blocks each way, both tails short, more than one batch and head."""
    check_case(Case(2, 457, 3, head_dim, "2", dtype, "BNHD", quant))


@pytest.mark.parametrize("case", sweep((*SMALL_SEQLENS, 1560), max_rows=20_000, rounds=4), ids=str)
def test_short(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("case", sweep(LARGE_SEQLENS[1:], max_rows=120_000), ids=str)
def test_long(case: Case) -> None:
    need_memory_on_gpu(16)
    check_case(case)


def need_memory_on_gpu(gib: float) -> None:
    if DEVICE.type == "cuda":
        need_memory(gib)


OPTIONS: list[dict[str, Any]] = [
    {"smooth_k": False},
    {"phi_input": "raw"},
    {"phi_input": "raw", "smooth_k": False},
    {"scale": 0.3},
    {"pinned_kv": torch.tensor([7])},
    {"pinned_kv": torch.tensor([3, 0], dtype=torch.int64)},
]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("quant", QUANTS)
def test_options(options: dict[str, Any], quant: str) -> None:
    options = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
    case = Case(2, 520, 3, 64, "2", torch.bfloat16, "BHND", quant, "head", "token")
    check_case(case, **options)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "head_dim", "quant"), INSTANCES, ids=str)
def test_given_map(dtype: torch.dtype, head_dim: int, quant: str) -> None:
    """Lists of every length from none to all, in one map."""
    case = Case(2, 713, 2, head_dim, "1", dtype, "BNHD", quant, alpha="token")
    inputs = inputs_of(case)
    t_m, t_n = case.num_q_blocks, case.num_k_blocks
    generator = torch.Generator().manual_seed(1)
    # Row i of a head lists i / (T_m - 1) of the key blocks: the first none, the last all.
    order = torch.rand(2, 2, t_m, t_n, generator=generator).argsort(-1)
    width = torch.arange(t_m)[:, None] * t_n / (t_m - 1)
    dense = (order < width).to(DEVICE)
    assert not dense[:, :, 0].any() and dense[:, :, -1].all()
    block_map = sla2.BlockMap.from_dense(dense, case.seqlen)
    got = run_parts(inputs, block_map, quant=quant, layout="BNHD")
    assert got.o_s is not None and got.o_l is not None and got.lse is not None
    assert not got.o_s[:, :128].any() and bool((got.lse[..., :128] == -torch.inf).all())
    assert not got.o_l[:, (t_m - 1) * 128 :].any()
    check_parts(Problem(*inputs.qkv, dense, inputs.alpha_logit), got, quant)


def test_longest_sequence() -> None:
    """2^20 tokens: the largest block index, scores in several groups of rows."""
    need_memory_on_gpu(40)
    n, d, count = 1 << 20, 64, 5
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 1, d, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(3)
    )
    alpha, proj = torch.zeros(1, n // 128, device=DEVICE), torch.eye(d, device=DEVICE)
    out, aux = sla2.sla2_attention(
        q, k, v, proj_q=proj, proj_k=proj, alpha_logit=alpha, num_kv_blocks=count, return_aux=True
    )
    assert not isinstance(aux.block_map, Tensor)
    aux.block_map.validate()
    dense = aux.block_map.to_dense()
    assert int(aux.block_map.lut.to(torch.int64).max()) > 16000
    check_parts(Problem(q, k, v, dense, alpha), Parts(out, lse=aux.lse))
    rows = torch.tensor([0, 1, 2047, 4096, 6143, 8190, 8191], device=DEVICE)
    check_selection(dense[:, :, rows], exact_scores(q, k, proj, proj)[:, :, rows], count)


# ---- T2q: low bit on natural data ---------------------------------------------------------------


def check_low_bit(inputs: Inputs, quant: str, count: int) -> None:
    """Both parts of T2q, for O_s and the output: against emulation and unquantised result."""
    block_map = sla2.route(
        inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, num_kv_blocks=count
    )
    got = run_parts(inputs, block_map, quant=quant, layout="BNHD")
    problem = Problem(*inputs.qkv, block_map.to_dense(), inputs.alpha_logit)
    got = got.rows(problem.rows)
    emulation = problem.expected(torch.float32, quant)
    plain = problem.expected(torch.float32)
    for name in ("o_s", "out"):
        parts = [getattr(p, name) for p in (got, emulation, plain)]
        check_quant(*parts, quant=quant, name=name)
    assert got.lse is not None and emulation.lse is not None and plain.lse is not None
    check_lse_by_format(got.lse, emulation.lse, plain.lse)


LOW_BIT_INSTANCES = list(itertools.product(KERNEL_DTYPES, HEAD_DIMS, LOW_BIT))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "head_dim", "quant"), LOW_BIT_INSTANCES, ids=str)
@pytest.mark.parametrize("seqlen", [1560, 14040])
def test_low_bit(dtype: torch.dtype, head_dim: int, quant: str, seqlen: int) -> None:
    count = 5 if seqlen == 1560 else 22
    check_low_bit(make_inputs(Case(1, seqlen, 3, head_dim, "2", dtype), DEVICE), quant, count)


@pytest.mark.parametrize(("dtype", "head_dim", "quant"), LOW_BIT_INSTANCES, ids=str)
def test_low_bit_with_offset_channels(dtype: torch.dtype, head_dim: int, quant: str) -> None:
    """Channels of K far from zero, as trained models have them: smoothing saves int8."""
    inputs = make_inputs(Case(1, 1560, 3, head_dim, "2", dtype), DEVICE)
    for channel, offset in ((3, 30.0), (17, -50.0), (head_dim - 1, 80.0)):
        inputs.k[..., channel] += offset
    check_low_bit(inputs, quant, 5)


@pytest.mark.parametrize(("dtype", "head_dim", "quant"), LOW_BIT_INSTANCES, ids=str)
def test_low_bit_with_loud_channel(dtype: torch.dtype, head_dim: int, quant: str) -> None:
    """One channel of K 128 times the others takes nearly all of int8's range: the result is far
    from the unquantised one, and still the emulation's."""
    case = Case(1, 1560, 3, head_dim, "2", dtype, quant=quant)
    inputs = inputs_of(case)
    inputs.k[..., 5] *= 128
    dense = torch.rand(1, 3, case.num_q_blocks, case.num_k_blocks, device=DEVICE) < 0.2
    dense[..., 0] = True
    block_map = sla2.BlockMap.from_dense(dense, case.seqlen)
    got = run_parts(inputs, block_map, quant=quant, layout="BNHD")
    check_parts(Problem(*inputs.qkv, dense, inputs.alpha_logit), got._replace(o_l=None), quant)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_states_in_e4m3(dtype: torch.dtype, head_dim: int) -> None:
    """With alpha near 0 the output is O_l, and with peaked features no averaging over features
    hides that its states have three bits of mantissa."""
    case = Case(1, 1560, 3, head_dim, "2", dtype, quant="int8_fp8")
    inputs = inputs_of(case)
    inputs.q, inputs.k = 4 * inputs.q, 4 * inputs.k
    inputs.alpha_logit.fill_(-20.0)
    out, aux = sla2.sla2_attention(*inputs.qkv, return_aux=True, **inputs.kwargs)
    assert isinstance(aux.block_map, sla2.BlockMap)
    problem = Problem(*inputs.qkv, aux.block_map.to_dense(), inputs.alpha_logit)
    emulation, plain = (
        problem.expected(torch.float32, quant).out for quant in (case.quant, "none")
    )
    assert emulation is not None and plain is not None
    assert rel_l2(out, emulation) <= EMULATION_REL_L2
    assert 1e-2 < rel_l2(out, plain) < 4e-2


# ---- T2r: the router apart ----------------------------------------------------------------------


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("seqlen", "heads", "proj", "smooth_k"),
    [
        (1, 1, "shared", True),
        (65, 3, "head", True),
        (457, 3, "head", False),
        (1560, 12, "shared", True),
        (14040, 5, "head", True),
        (16417, 2, "shared", True),
    ],
)
def test_router_scores(
    dtype: torch.dtype, head_dim: int, seqlen: int, heads: int, proj: str, smooth_k: bool
) -> None:
    """float32 to 1e-5 of the largest score; one tile of scores and several."""
    inputs = make_inputs(Case(2, seqlen, heads, head_dim, "1", dtype, proj=proj), DEVICE)
    q, k, _ = inputs.qkv
    made = raw_route(q, k, inputs.proj_q, inputs.proj_k, 1, smooth_k=smooth_k)
    exact = exact_scores(q, k, inputs.proj_q, inputs.proj_k, smooth_k=smooth_k)
    if seqlen == 1 and smooth_k:
        assert not made["scores"].any()  # the only key is the mean
        return
    error = (made["scores"].double() - exact).abs().max().item()
    assert error <= 1e-5 * exact.abs().max().item()


def dense_of(lut: Tensor, t_n: int) -> Tensor:
    index = lut.to(torch.int64)
    assert bool((index < t_n).all()) and bool((index.diff(dim=-1) > 0).all())
    dense = torch.zeros(*index.shape[:3], t_n, dtype=torch.bool, device=index.device)
    return dense.scatter_(3, index, True)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("seqlen", [64, 1000, 2049, 14040, 65600])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_selection(seqlen: int, share: float) -> None:
    """From the kernel's own scores the selection is exact, and near enough from exact ones."""
    case = Case(1, seqlen, 2, 64, "1", torch.bfloat16, proj="head")
    count = max(1, int(share * case.num_k_blocks))
    inputs = make_inputs(case, DEVICE)
    q, k, _ = inputs.qkv
    made = raw_route(q, k, inputs.proj_q, inputs.proj_k, count)
    dense = dense_of(made["lut"], case.num_k_blocks)
    assert bool((made["counts"] == count).all())
    assert torch.equal(dense, hard_map(made["scores"], count))
    check_selection(dense, exact_scores(q, k, inputs.proj_q, inputs.proj_k), count)
    # Without the optional scores they pass through the workspace, in groups.
    again = raw_route(q, k, inputs.proj_q, inputs.proj_k, count, scores=False)
    assert same_bits(again["lut"], made["lut"]) and same_bits(again["counts"], made["counts"])


@pytest.mark.usefixtures("path")
def test_selection_in_groups_of_heads() -> None:
    """More scores than one group of the portable router holds: the first and the last head are
    right."""
    need_memory_on_gpu(24)
    n, heads, d, count = 111600, 12, 64, 3
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k = (
        torch.randn(1, n, heads, d, generator=generator, device=DEVICE, dtype=torch.float16)
        for _ in range(2)
    )
    proj = torch.eye(d, device=DEVICE)
    dense = sla2.route(q, k, proj_q=proj, proj_k=proj, num_kv_blocks=count).to_dense()
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        scores = exact_scores(q[:, :, one], k[:, :, one], proj, proj)
        check_selection(dense[:, one], scores, count)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("quant", ["none", "int8_fp8"])
def test_states_in_groups_of_heads(quant: str) -> None:
    """More linear states than one portable group holds: one head of 1744 blocks takes 58 MB of
    64."""
    need_memory_on_gpu(24)
    n, heads, d, count = 111600, 3, 128, 3
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, heads, d, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(3)
    )
    eye, alpha = torch.eye(d, device=DEVICE), torch.zeros(heads, 872, device=DEVICE)
    inputs = Inputs(q, settled_keys(k), v, eye, eye, alpha, {})
    block_map = sla2.route(q, inputs.k, proj_q=eye, proj_k=eye, num_kv_blocks=count)
    got = run_parts(inputs, block_map, quant=quant, layout="BNHD")
    check_parts(Problem(*inputs.qkv, block_map.to_dense(), alpha), got, quant)


def tied_keys(t_n: int, seqlen: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys (1, N, 1, 64) whose block scores against e_0 are small integers, and these (T_n,)."""
    values = torch.randint(-2, 3, (t_n,), generator=generator)
    k = torch.zeros(1, seqlen, 1, 64)
    k[0, :, 0, 0] = values.repeat_interleave(64)[:seqlen].float()
    return k.to(DEVICE, torch.bfloat16), values.to(DEVICE)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("seqlen", [1, 64, 129, 2050, 2560, 8300, 65600])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 0.9, 1.0])
def test_ties_go_to_the_lowest_index(seqlen: int, share: float) -> None:
    """Five different scores for all blocks: every list ends within a tie."""
    t_n = -(-seqlen // 64)
    count = max(1, int(share * t_n))
    k, values = tied_keys(t_n, seqlen, torch.Generator().manual_seed(seqlen))
    q = torch.zeros(1, seqlen, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    q[..., 0] = 1.0
    proj = torch.eye(64, device=DEVICE)
    block_map = sla2.route(q, k, proj_q=proj, proj_k=proj, num_kv_blocks=count, smooth_k=False)
    block_map.validate()
    dense = block_map.to_dense()
    expected = hard_map(values.double(), count)
    assert torch.equal(dense, expected.expand_as(dense))
    q.zero_()
    block_map = sla2.route(q, k, proj_q=proj, proj_k=proj, num_kv_blocks=count)
    first = torch.arange(count, device=DEVICE)
    assert bool((block_map.lut.to(torch.int64) == first).all())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("pinned", [[0], [40], [40, 3, 17, 39], list(range(20, 33))])
def test_pinned_blocks_are_always_listed(pinned: list[int]) -> None:
    """Also where all scores tie, and where the pinned blocks are all that fits."""
    case = Case(2, 2600, 2, 64, "1", torch.bfloat16)
    inputs = make_inputs(case, DEVICE)
    index = torch.tensor(pinned, device=DEVICE)
    options: dict[str, Any] = {
        "proj_q": inputs.proj_q, "proj_k": inputs.proj_k, "pinned_kv": index,
    }  # fmt: skip
    scores = exact_scores(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k)
    for count in (len(pinned), len(pinned) + 5, case.num_k_blocks):
        block_map = sla2.route(inputs.q, inputs.k, num_kv_blocks=count, **options)
        block_map.validate()
        check_selection(block_map.to_dense(), scores, count, index)
        flat = sla2.route(
            torch.zeros_like(inputs.q), inputs.k, num_kv_blocks=count, **options
        ).to_dense()
        assert torch.equal(flat, hard_map(torch.zeros_like(scores), count, index))


@pytest.mark.gpu
def test_pinned_blocks_out_of_range_are_ignored() -> None:
    """On CUDA values are not looked at before the launch; the kernel must not follow them."""
    inputs = make_inputs(Case(1, 2600, 2, 64, "1", torch.bfloat16), DEVICE)
    options: dict[str, Any] = {
        "proj_q": inputs.proj_q, "proj_k": inputs.proj_k, "num_kv_blocks": 9,
    }  # fmt: skip
    wild = torch.tensor([-1, 41, 5, 2**31 - 1, -(2**31)], device=DEVICE)
    block_map = sla2.route(inputs.q, inputs.k, pinned_kv=wild, **options)
    block_map.validate()
    expected = sla2.route(inputs.q, inputs.k, pinned_kv=wild[2:3], **options)
    assert same_bits(block_map.lut, expected.lut)
