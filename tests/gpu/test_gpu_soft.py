"""Soft mode (stage 1) by the kernels: results and gradients, the threshold of the map, bits that
repeat, no wait for the device.

Results are held against the reference, which lists every block, in float64. Gradients: the oracle
is `sla2.blockwise` in float64 on the same 16-bit tensors, O_s, lse and map; the yardstick is the
error of autograd through the low-precision reference (see `compare`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KERNEL_DTYPES, Case, Inputs, make_inputs
from compare import BACKWARD_REL_L2, check_backward, check_forward, check_lse, max_err, rel_l2
from gpu_tools import DEVICE, GPU, Guarded, current_stream, same_bits
from soft_problem import Problem, make_problem
from torch import Tensor

import sla2
from sla2 import blockwise, ops, ops_bwd, reference
from sla2.constants import SOFT_MAP_MIN
from sla2.reference_branches import sparse_branch
from sla2.reference_math import smooth_keys

pytestmark = GPU

NAMES = ("dq", "dk", "dv", "dproj_q", "dproj_k", "dalpha")
# Block scores of random q and k differ by about 0.01: with the first tau the map is flat and every
# block listed, with the second some of it is below the threshold, the third makes it nearly hard.
TAUS = (0.1, 2e-3, 2e-4)


def check(problem: Problem) -> None:
    case = problem.case
    out, lse, out_sparse, mask = problem.forward()
    o_s, exact_lse, exact_mask, low_o_s = problem.sparse_reference()
    assert max_err(mask, exact_mask) < 1e-3  # x / tau of float32 scores
    check_lse(lse, exact_lse)
    check_forward(out_sparse, o_s, low_o_s, name="o_s")

    # The linear branch's products, and its weights, are bfloat16 whatever the inputs are.
    exact_out, exact_grads = problem.reference(torch.float64)
    low = [problem.reference(dtype) for dtype in {case.dtype, torch.bfloat16}]
    yardstick = max((x[0] for x in low), key=lambda x: max_err(x, exact_out))
    check_forward(out.bfloat16(), exact_out, yardstick)

    got, exact = problem.backward(), problem.exact_backward()
    for i, (name, a, b) in enumerate(zip(NAMES, got, exact, strict=True)):
        errors = [x[1][i] - exact_grads[i] for x in low]
        error = max(errors, key=lambda x: x.abs().max().item())
        if b.abs().max().item() < 1e-9:  # one key: dP - delta is zero but for rounding
            assert a.abs().max().item() < 1e-3, name
        elif name in NAMES[3:]:
            # Sums of thousands of products, and few of them: the largest error is no measure.
            assert rel_l2(a, b) <= BACKWARD_REL_L2, (name, rel_l2(a, b))
        else:
            check_backward(a, b, b + error, name=name)
    assert all(map(same_bits, got, problem.backward()))


# ---- numbers ------------------------------------------------------------------------------------

LENGTHS = (1, 63, 64, 65, 127, 129, 200, 457, 1000)
COMBINATIONS = list(itertools.product(LENGTHS, (64, 128), TAUS))


@pytest.mark.parametrize("seqlen, head_dim, tau", COMBINATIONS, ids=str)
def test_lengths(seqlen: int, head_dim: int, tau: float) -> None:
    """The other options take turns."""
    n = COMBINATIONS.index((seqlen, head_dim, tau))
    case = Case(
        2 if seqlen < 100 else 1, seqlen, 2, head_dim, "2" if seqlen > 129 else "1",
        KERNEL_DTYPES[n // 3 % 2], ("BNHD", "BHND")[n % 2], proj=("shared", "head")[n // 2 % 2],
        alpha=("head", "shared", "token")[n % 3],
    )  # fmt: skip
    check(make_problem(case, tau=tau, smooth_k=n % 5 != 0, seed=n))


OPTIONS: list[dict[str, Any]] = [
    {"phi_input": "raw"},
    {"smooth_k": False},
    {"router_score": "raw", "tau": 0.05},
    {"router_score": "softmax", "tau": 1e-4},
    {"pinned": [7]},  # the short block
    {"pinned": [0, 3]},  # all that are kept: the map is hard
    {"scale": 0.2},  # with 0.4 a row's lse lacks 0.02, what the threshold may leave out
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case(2, 457, 3, 128, "2", dtype, proj="head")
    check(make_problem(case, **{"tau": 2e-3, **options}))


@pytest.mark.parametrize("kv_blocks", ["-1", "all"])
@pytest.mark.parametrize("tau", TAUS[:2])
def test_many_or_all_blocks_kept(kv_blocks: str, tau: float) -> None:
    """With all of them m is 1, and neither router nor alpha has a gradient."""
    problem = make_problem(Case(1, 457, 2, 64, kv_blocks, torch.bfloat16), tau=tau)
    check(problem)
    if kv_blocks == "all":
        assert not any(bool(x.any()) for x in problem.backward()[3:])


def test_pinned_blocks_out_of_range() -> None:
    case = Case(1, 457, 2, 64, "2", torch.bfloat16)
    want = make_problem(case, tau=2e-3, pinned=[3]).forward()
    if DEVICE.type == "cuda":
        got = make_problem(case, tau=2e-3, pinned=[3, 1 << 20]).forward()
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tau", TAUS[:2])
def test_a_longer_sequence(tau: float, dtype: torch.dtype) -> None:
    """71 query and 141 key blocks: more than one tile of every product."""
    problem = make_problem(Case(1, 9000, 2, 128, "2", dtype), tau=tau)
    out, lse, out_sparse, mask = problem.forward()
    wide = [ops.bnhd(x, "BNHD").float() for x in problem.inputs.qkv]
    expected = blockwise.soft_fwd(
        *wide, *problem.learned, num_kv_blocks=problem.case.num_kv_blocks, pinned_kv=None,
        **problem.options,
    )  # fmt: skip
    assert rel_l2(out, expected[0]) < 1e-2 and rel_l2(out_sparse, expected[2]) < 1e-2
    check_lse(lse, expected[1])
    assert max_err(mask, expected[3]) < 1e-5
    for name, a, b in zip(NAMES, problem.backward(), problem.exact_backward(), strict=True):
        assert rel_l2(a, b) <= BACKWARD_REL_L2, (name, rel_l2(a, b))


# ---- a map of one's own -------------------------------------------------------------------------


def attend(problem: Problem, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ops._attn_fwd_cuda(
        *problem.inputs.qkv, None, None, problem.inputs.alpha_logit, None, problem.scale, "none",
        "both", problem.smooth_k, problem.phi_input, problem.case.layout, True, m,
    )  # fmt: skip


def differentiate(problem: Problem, m: Tensor, out_sparse: Tensor, lse: Tensor) -> list[Tensor]:
    """dq, dk, dv, dalpha and the gradient of log m."""
    return list(
        ops_bwd._attn_bwd_cuda(
            problem.grad_out, *problem.inputs.qkv, out_sparse, lse, None, None,
            problem.inputs.alpha_logit, problem.scale, "both", problem.smooth_k, problem.phi_input,
            problem.case.layout, m,
        )
    )  # fmt: skip


def random_map(case: Case, seed: int = 3) -> Tensor:
    """m in (0, 1), some of it far below the threshold."""
    size = (case.batch, case.num_heads, case.num_q_blocks, case.num_k_blocks)
    generator = torch.Generator().manual_seed(seed)
    return torch.sigmoid(torch.randn(size, generator=generator) * 10).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_threshold(head_dim: int) -> None:
    """A block below it counts as m = 0, one at it does not."""
    problem = make_problem(Case(1, 1000, 2, head_dim, "2", torch.bfloat16), tau=1.0)
    m = random_map(problem.case)
    below = m < SOFT_MAP_MIN
    assert 0.05 < below.double().mean().item() < 0.5
    results = [attend(problem, x) for x in (m, m.masked_fill(below, 0.0))]
    assert all(map(same_bits, *results))
    _, lse, out_sparse = results[0]
    grads, dropped = (
        differentiate(problem, x, out_sparse, lse) for x in (m, m.masked_fill(below, 0.0))
    )
    assert all(map(same_bits, grads[:4], dropped[:4]))
    assert same_bits(grads[4][~below], dropped[4][~below]) and not dropped[4][below].any()
    assert bool(grads[4][below].any())  # -m dW: the linear branch's share is left

    column = torch.zeros_like(m)  # beside blocks of more weight, this one would not show
    for value, seen in ((SOFT_MAP_MIN, True), (SOFT_MAP_MIN * (1 - 2.0**-20), False)):
        column[..., 5] = value
        log_m = torch.where(column < SOFT_MAP_MIN, 0.0, column).log()
        q, k, v = (x.transpose(1, 2).double() for x in problem.inputs.qkv)
        _, expected = sparse_branch(
            q, smooth_keys(k), v, log_m > -torch.inf, scale=problem.scale, bias=log_m.double()
        )
        assert bool((log_m[..., 5] > -torch.inf).all()) == seen
        check_lse(attend(problem, column)[1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_map_of_zeros_and_ones_is_hard(head_dim: int, dtype: torch.dtype) -> None:
    """Rows of any length, one empty and one full."""
    problem = make_problem(Case(1, 1000, 2, head_dim, "2", dtype), tau=1.0)
    m = (random_map(problem.case) > 0.5).float()
    m[:, :, 0], m[:, :, 1] = 0.0, 1.0
    block_map = sla2.BlockMap.from_dense(m.bool(), 1000)
    lut, counts = block_map.lut, block_map.counts
    out, lse, out_sparse = attend(problem, m)
    with ops.kernel_path("portable"):
        hard = ops.attn_fwd(
            *problem.inputs.qkv, lut, counts, problem.inputs.alpha_logit, problem.scale, "none",
            "both", True, "smoothed", "BNHD", True,
        )  # fmt: skip
    assert same_bits(lse, hard[1]) and same_bits(out_sparse, hard[2])
    assert max_err(out, hard[0]) <= 2.0**-7 * hard[0].abs().max().item()
    expected = ops_bwd.attn_bwd(
        problem.grad_out, *problem.inputs.qkv, out_sparse, lse, lut, counts,
        problem.inputs.alpha_logit, problem.scale, "both", True, "smoothed", "BNHD",
    )  # fmt: skip
    grads = differentiate(problem, m, out_sparse, lse)
    for name, a, b in zip(("dq", "dk", "dv", "dalpha"), grads, expected, strict=False):
        assert rel_l2(a, b) < 1e-3, name
    assert not grads[4][m == 0.0].any()


@pytest.mark.gpu
def test_the_gradient_of_log_m() -> None:
    """Against autograd of the branches in float64 with the same map."""
    problem = make_problem(Case(2, 457, 3, 128, "2", torch.bfloat16), tau=1.0)
    m = random_map(problem.case)
    _, lse, out_sparse = attend(problem, m)
    grad = differentiate(problem, m, out_sparse, lse)[4]

    log_m = torch.where(m < SOFT_MAP_MIN, 0.0, m).double().log().requires_grad_()
    q, k, v = (x.transpose(1, 2).double() for x in problem.inputs.qkv)
    k = smooth_keys(k)
    o_s, _ = sparse_branch(q, k, v, m >= SOFT_MAP_MIN, scale=problem.scale, bias=log_m)
    weights = 1.0 - log_m.exp()
    o_l = reference.linear_branch(q, k, v, weights)
    out = reference.blend(o_s, o_l, tokens_alpha(problem))
    (exact,) = torch.autograd.grad(out, log_m, problem.grad_out.transpose(1, 2).double())
    listed = m >= SOFT_MAP_MIN
    assert rel_l2(grad[listed], exact[listed]) <= BACKWARD_REL_L2


def tokens_alpha(problem: Problem) -> Tensor:
    """alpha (1, H, N, 1) in float64."""
    alpha = problem.inputs.alpha_logit.double().sigmoid()
    return alpha.repeat_interleave(128, -1)[None, :, : problem.case.seqlen, None]


# ---- memory -------------------------------------------------------------------------------------


def raw_soft(problem: Problem, m: Tensor, pattern: int) -> dict[str, Tensor]:
    """sla2_attn_fwd and sla2_attn_bwd with guarded buffers, of a BNHD problem."""
    ext, (q, k, v) = ops._extension(), problem.inputs.qkv
    b, n, h, d = q.shape
    shape = (b, n, h, d, ops._DTYPES[q.dtype])
    flags = (problem.phi_input == "raw", problem.smooth_k, problem.scale)
    forward, backward = ((*x, ops._PATHS["portable"], *flags) for x in ((0, 0), (0,)))
    sizes = (
        ext.attn_fwd_workspace(
            shape=shape, options=forward, routed=False, soft=True, max_kv_blocks=0
        ),
        ext.attn_bwd_workspace(
            shape=shape, options=backward, alpha_per_token=False, soft=True, max_kv_blocks=0
        ),
    )
    made = {name: Guarded((b, n, h, d), q.dtype, pattern) for name in ("out", "o_s", *NAMES[:3])}
    made["lse"] = Guarded((b, h, n), torch.float32, pattern)
    made["dalpha"] = Guarded(tuple(problem.inputs.alpha_logit.shape), torch.float32, pattern)
    made["dlog_m"] = Guarded(tuple(m.shape), torch.float32, pattern)
    spaces = [Guarded((size,), torch.uint8, pattern) for size in sizes]
    x = {name: buffer.tensor for name, buffer in made.items()}
    common: dict[str, Any] = {
        "shape": shape, "q": ops._operand(q), "k": ops._operand(k), "v": ops._operand(v),
        "out_sparse": ops._operand(x["o_s"]), "lse": x["lse"].data_ptr(), "lists": (0, 0, 0),
        "alpha": ops._alpha_operand(problem.inputs.alpha_logit, n), "soft_map": m.data_ptr(),
        "stream": current_stream(),
    }  # fmt: skip
    ext.attn_fwd(
        options=forward, out=ops._operand(x["out"]), router=None,
        workspace=(spaces[0].tensor.data_ptr(), sizes[0]), **common,
    )  # fmt: skip
    ext.attn_bwd(
        options=backward, grad_out=ops._operand(problem.grad_out), grad_q=ops._operand(x["dq"]),
        grad_k=ops._operand(x["dk"]), grad_v=ops._operand(x["dv"]),
        grad_alpha_logit=x["dalpha"].data_ptr(), grad_log_map=x["dlog_m"].data_ptr(),
        workspace=(spaces[1].tensor.data_ptr(), sizes[1]), **common,
    )  # fmt: skip
    for name, buffer in (*made.items(), *zip(("forward", "backward"), spaces, strict=True)):
        buffer.check(name)
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [1, 129, 457, 9000])
def test_poisoned_buffers(seqlen: int, head_dim: int) -> None:
    """Outputs and workspaces full of NaN or zeros give the same bits; nothing around is written."""
    problem = make_problem(Case(1, seqlen, 2, head_dim, "1", torch.bfloat16), tau=1.0)
    m = random_map(problem.case)
    want = raw_soft(problem, m, 0x00)
    for pattern in (0xFF, 0x7F):
        for name, x in raw_soft(problem, m, pattern).items():
            assert same_bits(x, want[name]), name


@pytest.mark.gpu
def test_strides() -> None:
    """Views of a fused QKV tensor: the same bits."""
    problem = make_problem(Case(2, 457, 3, 64, "2", torch.bfloat16), tau=2e-3)
    want = [*problem.forward(), *problem.backward()]
    fused = torch.stack(problem.inputs.qkv, dim=2)
    problem.inputs.q, problem.inputs.k, problem.inputs.v = fused.unbind(2)
    assert all(map(same_bits, want, [*problem.forward(), *problem.backward()]))


@pytest.mark.gpu
def test_memory_of_a_training_step() -> None:
    """No tensor of N x N entries, nor of the states of all heads."""
    problem = make_problem(Case(1, 20000, 8, 64, "2", torch.bfloat16), tau=0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.forward()
    problem.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 20000 * 20000 * 2


# ---- streams, graphs, heads ---------------------------------------------------------------------


def step(inputs: Inputs, **options: Any) -> list[Tensor]:
    """Output and gradients through autograd."""
    leaves = [
        x.detach().requires_grad_()
        for x in (*inputs.qkv, inputs.proj_q, inputs.proj_k, inputs.alpha_logit)
    ]
    out: Any = sla2.sla2_attention(
        *leaves[:3], proj_q=leaves[3], proj_k=leaves[4], alpha_logit=leaves[5], mode="soft",
        num_kv_blocks=2, tau=2e-3, **options,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def test_the_same_bits_20_times() -> None:
    inputs = make_inputs(Case(2, 1560, 8, 128, "2", torch.bfloat16), DEVICE)
    want = step(inputs)
    for _ in range(20):
        assert all(map(same_bits, step(inputs), want))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [None, [3, 1]])
def test_nothing_waits_for_the_device(pinned: list[int] | None) -> None:
    inputs = make_inputs(Case(2, 457, 3, 64, "2", torch.bfloat16), DEVICE)
    pinned_kv = None if pinned is None else torch.tensor(pinned, device=DEVICE)
    step(inputs, pinned_kv=pinned_kv)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, pinned_kv=pinned_kv)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_graph_replays_with_other_inputs(head_dim: int) -> None:
    case = Case(2, 457, 3, head_dim, "2", torch.bfloat16)
    static, others = make_inputs(case, DEVICE), [make_inputs(case, DEVICE, seed=s) for s in (1, 2)]
    pinned = torch.tensor([1], device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(static, pinned_kv=pinned)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static, pinned_kv=pinned)
    names = ("q", "k", "v", "proj_q", "proj_k", "alpha_logit")
    for other in others:
        for name in names:
            getattr(static, name).copy_(getattr(other, name))
        graph.replay()
        for name, a, b in zip(("out", *NAMES), results, step(other, pinned_kv=pinned), strict=True):
            assert rel_l2(a, b) < 1e-5, name


@pytest.mark.gpu  # the CPU path sums in another order where there are fewer heads
def test_a_head_alone_and_among_others() -> None:
    """The same bits whatever the neighbours and the groups that heads are worked on in."""
    case = Case(4, 1000, 24, 128, "2", torch.bfloat16)
    problem = make_problem(case, tau=1.0)
    m = random_map(case)
    out, lse, out_sparse = attend(problem, m)
    got = [out, *differentiate(problem, m, out_sparse, lse)[:3]]
    one, b, h = (slice(2, 3), slice(None), slice(17, 18)), slice(2, 3), slice(17, 18)
    alone = make_problem(Case(1, 1000, 1, 128, "2", torch.bfloat16), tau=1.0)
    alone.inputs.q, alone.inputs.k, alone.inputs.v = (x[one] for x in problem.inputs.qkv)
    alone.inputs.alpha_logit = problem.inputs.alpha_logit[h]
    single = attend(alone, m[b, h].contiguous())
    assert same_bits(single[0], out[one]) and same_bits(single[1], lse[b, h])
    grad_out = problem.grad_out[one]
    run: Callable[..., Any] = ops_bwd._attn_bwd_cuda
    grads = run(
        grad_out, *alone.inputs.qkv, single[2], single[1], None, None, alone.inputs.alpha_logit,
        alone.scale, "both", True, "smoothed", "BNHD", m[b, h].contiguous(),
    )  # fmt: skip
    for a, x in zip(got[1:], grads[:3], strict=True):
        assert same_bits(a[one], x)


def test_not_a_number_stays_in_its_head() -> None:
    case = Case(2, 457, 3, 64, "2", torch.bfloat16, proj="head")
    problem = make_problem(case, tau=2e-3)
    want = [problem.forward()[0], *problem.backward()[:3]]
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    for name in ("q", "k", "v"):
        clean = getattr(problem.inputs, name)
        spoiled = clean.clone()
        spoiled[1, 400, 1, 5] = float("nan")
        setattr(problem.inputs, name, spoiled)
        got = [problem.forward()[0], *problem.backward()[:3]]
        setattr(problem.inputs, name, clean)
        for a, b in zip(got, want, strict=True):
            assert same_bits(a.transpose(1, 2)[others], b.transpose(1, 2)[others]), name
        assert bool(got[0][1, :, 1].isnan().any()), name
        assert any(bool(x[1, :, 1].isnan().any()) for x in got[1:]), name
