"""The gradient operator: every length, kind of list, option and stride; bits that repeat.

The oracle is in `grad_problem`. `test_gpu_gradients` goes through autograd instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import grad_problem
import pytest
import torch
from cases import KERNEL_DTYPES, LARGE_SEQLENS, SMALL_SEQLENS, Case, make_inputs
from compare import BACKWARD_REL_L2, max_err, rel_l2
from gpu_tools import (
    DEVICE,
    GPU,
    Guarded,
    current_stream,
    need_memory,
    same_bits,
    why_not_sm90,
)
from grad_problem import BRANCHES, NAMES, Problem, check
from torch import Tensor

import sla2
from sla2 import ops

pytestmark = GPU

ListMaker = Callable[[Case, torch.Generator], Tensor]


def cyclic(case: Case, generator: torch.Generator) -> Tensor:
    """K blocks a row, from the last, short one backwards, a step further each row: the complement
    of one listed block is never a single token, whose O_l has no gradient in q."""
    i, t = torch.arange(case.num_q_blocks), torch.arange(case.num_kv_blocks)
    index = (case.num_k_blocks - 1 - i[:, None] - t) % case.num_k_blocks
    dense = torch.zeros(case.num_q_blocks, case.num_k_blocks, dtype=torch.bool)
    return dense.scatter_(1, index, True).expand(case.batch, case.num_heads, -1, -1)


def uneven(case: Case, generator: torch.Generator) -> Tensor:
    """Rows of any length, one empty and one full; a column that only the full row lists."""
    size = (case.batch, case.num_heads, case.num_q_blocks, case.num_k_blocks)
    share = torch.rand(size[:3], generator=generator)[..., None]
    dense = torch.rand(size, generator=generator) < share
    dense[..., case.num_k_blocks // 2] = False
    dense[:, :, 0] = False
    dense[:, :, 1] = True
    return dense


def hot_column(case: Case, generator: torch.Generator) -> Tensor:
    """One key block that every query block lists, another that every second does."""
    dense = cyclic(case, generator).clone()
    dense[..., 3] = True
    dense[:, :, ::2, -1] = True
    return dense


def every(case: Case, generator: torch.Generator) -> Tensor:
    return torch.ones(case.batch, case.num_heads, case.num_q_blocks, case.num_k_blocks).bool()


def nothing(case: Case, generator: torch.Generator) -> Tensor:
    return ~every(case, generator)


def make_problem(
    case: Case, branch: str, lists: ListMaker = cyclic, *, seed: int = 0, **options: Any
) -> Problem:
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = make_inputs(case, DEVICE, seed=seed)
    block_map = sla2.BlockMap.from_dense(lists(case, generator), case.seqlen).to(DEVICE)
    grad_out = torch.randn(case.shape, generator=generator).to(DEVICE, case.dtype)
    return grad_problem.make_problem(case, branch, inputs, block_map, grad_out, **options)


# ---- numbers ------------------------------------------------------------------------------------


def test_the_oracle() -> None:
    """Autograd through the reference in float64 gives what the operator gives in float64."""
    problem = make_problem(Case(1, 200, 2, 64, "1", torch.float16), "both")
    wide = ops.attn_fwd(
        problem.q.double().cpu(), problem.k.double().cpu(), problem.v.double().cpu(),
        problem.lut.cpu(), problem.counts.cpu(), problem.alpha_logit.double().cpu(),  # type: ignore
        problem.scale, "none", "both", True, "smoothed", "BNHD", True,
    )  # fmt: skip
    problem.lse, problem.out_sparse = wide[1].to(DEVICE), wide[2].to(DEVICE)
    for a, b in zip(problem.exact(), problem.reference(torch.float64), strict=True):
        assert max_err(a, b) < 1e-9 * b.abs().max().item()


LENGTHS = (*SMALL_SEQLENS, 200, 1000)
COMBINATIONS = list(itertools.product(LENGTHS, (64, 128), BRANCHES))


@pytest.mark.parametrize("seqlen, head_dim, branch", COMBINATIONS, ids=lambda value: str(value))
def test_lengths(seqlen: int, head_dim: int, branch: str) -> None:
    """The other options take turns."""
    n = COMBINATIONS.index((seqlen, head_dim, branch))
    case = Case(
        2 if seqlen < 100 else 1, seqlen, 2, head_dim, "2" if seqlen > 129 else "1",
        KERNEL_DTYPES[n % 2], ("BNHD", "BHND")[n // 2 % 2],
        alpha=("head", "shared", "token")[n % 3],
    )  # fmt: skip
    check(
        make_problem(
            case, branch, smooth_k=n % 5 != 0, phi_input=("smoothed", "raw")[n % 4 // 3], seed=n
        )
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("seqlen", LARGE_SEQLENS)
def test_long_sequences(seqlen: int) -> None:
    need_memory(24)
    n = LARGE_SEQLENS.index(seqlen)
    case = Case(1, seqlen, 2, (128, 64)[n % 2], "2", KERNEL_DTYPES[n // 2 % 2])
    problem = make_problem(case, "both", seed=n)
    for name, a, b in zip(NAMES, problem.run(), problem.exact(), strict=True):
        assert bool(a.isfinite().all()), name
        assert rel_l2(a, b) <= BACKWARD_REL_L2 / 2, name


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("lists", [uneven, every, nothing])
def test_lists(lists: ListMaker, branch: str, head_dim: int, dtype: torch.dtype) -> None:
    check(make_problem(Case(1, 457, 2, head_dim, "2", dtype), branch, lists))


@pytest.mark.parametrize("phi_input", ["smoothed", "raw"])
@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("alpha", ["head", "shared", "token"])
def test_options(alpha: str, smooth_k: bool, phi_input: str) -> None:
    case = Case(2, 457, 3, 128, "2", torch.bfloat16, alpha=alpha)
    check(make_problem(case, "both", smooth_k=smooth_k, phi_input=phi_input, scale=0.2))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_column_in_parts(dtype: torch.dtype, head_dim: int) -> None:
    """80 query blocks list one key block: more than one part works on it."""
    problem = make_problem(Case(1, 80 * 128 - 70, 2, head_dim, "1", dtype), "both", hot_column)
    got = problem.run()
    for name, a, b in zip(NAMES, got, problem.exact(), strict=False):
        assert rel_l2(a, b) <= BACKWARD_REL_L2 / 2, name
    assert all(map(same_bits, got, problem.run()))


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_after_a_low_bit_forward_pass(quant: str) -> None:
    """O_s and lse of quantised operands: rows of P no longer sum to one, and dQ sees the keys'
    mean unless smoothing takes it out."""
    problem = make_problem(Case(1, 1000, 2, 64, "2", torch.bfloat16, quant=quant), "both")
    for name, a, b in zip(NAMES, problem.run(), problem.exact(), strict=False):
        assert rel_l2(a, b) <= BACKWARD_REL_L2, name


@pytest.mark.parametrize("phi_input", ["smoothed", "raw"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_paths(dtype: torch.dtype, head_dim: int, phi_input: str) -> None:
    """The Hopper kernels beside the portable ones. Several groups of heads, that end within a batch
    entry; a second tile of key blocks with four rows in it."""
    if (reason := why_not_sm90()) is not None:
        pytest.skip(reason)
    case = Case(3, 260 * 64 - 7, 11, head_dim, "2", dtype)
    problem = make_problem(case, "both", uneven, phi_input=phi_input)
    with ops.kernel_path("portable"):
        want = problem.run()
    with ops.kernel_path("sm90"):
        got = problem.run()
        assert all(map(same_bits, got, problem.run()))
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert rel_l2(a, b) <= BACKWARD_REL_L2 / 2, name


# ---- memory -------------------------------------------------------------------------------------


def test_strides() -> None:
    """Views of a fused QKV tensor, a transposed O_s and a broadcast gradient: the same bits."""
    problem = make_problem(Case(2, 457, 3, 64, "2", torch.bfloat16), "both")
    fused = torch.stack([problem.q, problem.k, problem.v], dim=2)
    expanded = torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16, device=DEVICE)
    problem.grad_out = expanded.expand(problem.grad_out.shape).contiguous()
    want = problem.run()
    got = problem.run(
        q=fused[:, :, 0], k=fused[:, :, 1], v=fused[:, :, 2],
        out_sparse=problem.out_sparse.transpose(1, 2).contiguous().transpose(1, 2),
        grad_out=expanded.expand(problem.grad_out.shape),
    )  # fmt: skip
    assert all(map(same_bits, want, got))
    padded = torch.zeros(2, 457, 3, 72, dtype=torch.bfloat16, device=DEVICE)
    padded[..., :64] = problem.k
    assert all(map(same_bits, want, problem.run(k=padded[..., :64])))
    odd = torch.zeros(problem.v.numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:]
    odd.copy_(problem.v.flatten())
    assert all(map(same_bits, want, problem.run(v=odd.view(problem.v.shape))))


def raw_attn_bwd(problem: Problem, pattern: int) -> dict[str, Tensor]:
    """sla2_attn_bwd with guarded buffers, of a BNHD problem."""
    ext = ops._extension()
    b, n, h, d = problem.q.shape
    count = problem.lut.shape[3]
    shape = (b, n, h, d, ops._DTYPES[problem.q.dtype])
    options = (
        ops._BRANCHES[problem.branch], ops._PATHS[ops.current_path()],
        problem.phi_input == "raw", problem.smooth_k, problem.scale,
    )  # fmt: skip
    alpha = ops._alpha_operand(problem.alpha_logit, n)
    size = ext.attn_bwd_workspace(
        shape=shape, options=options, alpha_per_token=alpha is not None and alpha[2],
        max_kv_blocks=count,
    )  # fmt: skip
    made = {name: Guarded((b, n, h, d), problem.q.dtype, pattern) for name in NAMES[:3]}
    if problem.alpha_logit is not None:
        made["dalpha"] = Guarded(tuple(problem.alpha_logit.shape), torch.float32, pattern)
    made["workspace"] = Guarded((size,), torch.uint8, pattern)
    tensors = {name: buffer.tensor for name, buffer in made.items()}
    ext.attn_bwd(
        shape=shape, options=options,
        q=ops._operand(problem.q), k=ops._operand(problem.k), v=ops._operand(problem.v),
        grad_out=ops._operand(problem.grad_out),
        out_sparse=ops._operand(problem.out_sparse) if problem.branch != "linear" else None,
        lse=problem.lse.data_ptr(), alpha=alpha,
        lists=(problem.lut.data_ptr(), problem.counts.data_ptr(), count),
        grad_q=ops._operand(tensors["dq"]), grad_k=ops._operand(tensors["dk"]),
        grad_v=ops._operand(tensors["dv"]),
        grad_alpha_logit=tensors["dalpha"].data_ptr() if "dalpha" in tensors else 0,
        workspace=(tensors["workspace"].data_ptr(), size), stream=current_stream(),
    )  # fmt: skip
    for name, buffer in made.items():
        buffer.check(name)
    del tensors["workspace"]
    return tensors


@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("seqlen, lists", [(129, cyclic), (457, uneven), (9000, hot_column)])
def test_poisoned_buffers(seqlen: int, lists: ListMaker, branch: str) -> None:
    """Outputs and workspace full of NaN or zeros give the same bits; nothing around is written."""
    problem = make_problem(Case(1, seqlen, 2, 128, "1", torch.bfloat16), branch, lists)
    want = raw_attn_bwd(problem, 0x00)
    for pattern in (0xFF, 0x7F):
        got = raw_attn_bwd(problem, pattern)
        assert got.keys() == want.keys()
        for name, x in got.items():
            assert bool(x.isfinite().all()) and same_bits(x, want[name]), name


@pytest.mark.gpu
def test_lists_of_any_kind_are_safe() -> None:
    """Entries out of range, in disorder or repeated count as the set of those in range."""
    problem = make_problem(Case(1, 457, 2, 64, "2", torch.bfloat16), "both")
    want = problem.run()
    lut = problem.lut.to(torch.int32)
    wild = torch.cat([lut.flip(-1), torch.full_like(lut, 60000), lut], dim=-1).to(torch.uint16)
    counts = torch.full_like(problem.counts, wild.shape[-1])
    counts[0, 0, 0] = 1 << 30
    assert all(map(same_bits, want, problem.run(lut=wild, counts=counts)))


# ---- heads are independent ----------------------------------------------------------------------


@pytest.mark.parametrize("branch", BRANCHES)
def test_not_a_number_stays_in_its_head(branch: str) -> None:
    problem = make_problem(Case(2, 457, 3, 64, "2", torch.bfloat16), branch)
    want = problem.run()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    for name in ("q", "k", "v", "grad_out"):
        spoiled = getattr(problem, name).clone()
        spoiled[1, 400, 1, 5] = float("nan")
        got = problem.run(**{name: spoiled})
        for a, b in zip(got[:3], want[:3], strict=True):
            assert same_bits(a.transpose(1, 2)[others], b.transpose(1, 2)[others]), name
        assert any(bool(x[1, :, 1].isnan().any()) for x in got[:3]), name


@pytest.mark.gpu  # the CPU path sums in another order where there are fewer heads
def test_a_head_alone_and_among_others() -> None:
    """The same bits whatever the neighbours, the batch and the groups that heads are worked on in;
    96 heads are two groups."""
    problem = make_problem(Case(4, 1000, 24, 128, "2", torch.bfloat16), "both")
    got = problem.run()
    b, h = 2, 17
    one = (slice(b, b + 1), slice(None), slice(h, h + 1))
    assert problem.alpha_logit is not None
    tensors = {
        name: getattr(problem, name)[one] for name in ("grad_out", "q", "k", "v", "out_sparse")
    }
    lists = {
        name: getattr(problem, name)[b : b + 1, h : h + 1] for name in ("lse", "lut", "counts")
    }
    alone = problem.run(**tensors, **lists, alpha_logit=problem.alpha_logit[h : h + 1])
    for a, x in zip(got[:3], alone[:3], strict=True):
        assert same_bits(a[one], x)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("batch, heads", [(13107, 5), (16384, 4), (14000, 5)])
def test_many_heads(batch: int, heads: int) -> None:
    need_memory(16)
    problem = make_problem(Case(batch, 65, heads, 64, "1", torch.float16), "both")
    got = problem.run()
    last = slice(batch - 1, batch)
    small = Problem(
        Case(1, 65, heads, 64, "1", torch.float16), "both",
        *(x[last] for x in (problem.grad_out, problem.q, problem.k, problem.v)),
        *(x[last] for x in (problem.out_sparse, problem.lse, problem.dense)),
        problem.lut[last], problem.counts[last], problem.alpha_logit, problem.scale,
    )  # fmt: skip
    for a, b in zip(got[:3], small.exact()[:3], strict=True):
        assert rel_l2(a[last], b) <= BACKWARD_REL_L2
