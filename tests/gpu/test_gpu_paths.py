"""The Hopper kernels beside the portable ones: the same lists, and numbers that differ by the order
of float32 sums (what both must come near to is `test_gpu_forward.py`'s matter); then which of the
two a call takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HEAD_DIMS, KERNEL_DTYPES, Case, Inputs, make_inputs
from compare import LSE_ATOL, max_err, rel_l2
from gpu_tools import (
    DEVICE,
    need_memory,
    raw_attn_fwd,
    raw_route,
    same_bits,
    why_not_sm90,
)
from torch import Tensor

import sla2
from sla2 import ops
from sla2.cli.bench_timing import kernel_times

pytestmark = pytest.mark.gpu

QUANTS = ("none", "int8_fp8")  # that both paths have
INSTANCES = list(itertools.product(KERNEL_DTYPES, HEAD_DIMS, QUANTS))
PATHS = ("portable", "sm90")
OWN_KERNEL = re.compile(r"\bsla2::.*?(\w+_kernel)\b")
# Between two results that are both rounded to bfloat16; float16's rounding is an eighth of it, but
# H is bfloat16 there too.
PATHS_REL_L2 = 5e-3


@pytest.fixture
def _needs_sm90() -> None:
    if (reason := why_not_sm90()) is not None:
        pytest.skip(reason)


needs_sm90 = pytest.mark.usefixtures("_needs_sm90")


def check_agreement(portable: dict[str, Tensor], sm90: dict[str, Tensor]) -> None:
    assert portable.keys() == sm90.keys()
    for name, expected in portable.items():
        got = sm90[name]
        if name in ("lut", "counts"):
            assert same_bits(got, expected), name
        elif name == "lse":
            infinite = expected.isinf()
            assert torch.equal(got.isinf(), infinite)
            assert max_err(got[~infinite], expected[~infinite]) <= LSE_ATOL
        else:
            assert bool(got.isfinite().all()), name
            assert rel_l2(got, expected) <= PATHS_REL_L2, name


def run_both(inputs: Inputs, count: int, **options: Any) -> tuple[dict[str, Tensor], ...]:
    """raw_attn_fwd, guard bands and all, by each path."""
    results = []
    for path in PATHS:
        with ops.kernel_path(path):
            results.append(raw_attn_fwd(inputs, count, **options))
    return tuple(results)


@needs_sm90
@pytest.mark.parametrize("kv_blocks", ["1", "2", "-1", "all"])
@pytest.mark.parametrize(("dtype", "head_dim", "quant"), INSTANCES, ids=str)
def test_routed(dtype: torch.dtype, head_dim: int, quant: str, kv_blocks: str) -> None:
    """Lists, output, O_s and lse; both tails short, the complement long, short and empty."""
    case = Case(2, 457, 3, head_dim, kv_blocks, dtype, proj="head")
    check_agreement(*run_both(make_inputs(case, DEVICE), case.num_kv_blocks, quant=quant))


@needs_sm90
@pytest.mark.parametrize("seqlen", [1, 17, 63, 64, 65, 127, 128, 129, 4099])
@pytest.mark.parametrize("quant", QUANTS)
def test_lengths(seqlen: int, quant: str) -> None:
    case = Case(1, seqlen, 2, 128, "2", torch.bfloat16, alpha="token")
    check_agreement(*run_both(make_inputs(case, DEVICE), case.num_kv_blocks, quant=quant))


@needs_sm90
@pytest.mark.parametrize("branch", ["both", "sparse", "linear"])
@pytest.mark.parametrize("options", [{}, {"phi_input": "raw"}, {"smooth_k": False}], ids=str)
@pytest.mark.parametrize(("dtype", "head_dim", "quant"), INSTANCES, ids=str)
def test_branches_by_given_lists(
    dtype: torch.dtype, head_dim: int, quant: str, options: dict[str, Any], branch: str
) -> None:
    """Lists of every length from none to all, alpha of each token."""
    case = Case(2, 713, 2, head_dim, "1", dtype, alpha="token")
    inputs = make_inputs(case, DEVICE)
    t_m, t_n = case.num_q_blocks, case.num_k_blocks
    order = torch.rand(2, 2, t_m, t_n, generator=torch.Generator().manual_seed(1)).argsort(-1)
    width = torch.arange(t_m)[:, None] * t_n / (t_m - 1)
    block_map = sla2.BlockMap.from_dense((order < width).to(DEVICE), case.seqlen)
    lists = (block_map.lut, block_map.counts)
    count = block_map.lut.shape[3]
    check_agreement(*run_both(inputs, count, quant=quant, branch=branch, lists=lists, **options))


@needs_sm90
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_more_heads_than_slots(head_dim: int, quant: str) -> None:
    """The linear kernel keeps the states of three heads at most: 25 heads pass through them."""
    case = Case(5, 1560, 5, head_dim, "2", torch.bfloat16)
    check_agreement(*run_both(make_inputs(case, DEVICE), 2, quant=quant))


@needs_sm90
@pytest.mark.parametrize("quant", QUANTS)
def test_states_beyond_the_cache(quant: str) -> None:
    """Four heads of 58 MB of states each, of which L2 holds one."""
    need_memory(8)
    case = Case(1, 111600, 4, 128, "2", torch.bfloat16)
    inputs = make_inputs(case, DEVICE)
    made = raw_route(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, 20)
    lists = (made["lut"], made["counts"])
    check_agreement(*run_both(inputs, 20, quant=quant, lists=lists))


@needs_sm90
@pytest.mark.parametrize(("factor", "limit"), [(1, 1.5e-3), (4, 4e-3)])
@pytest.mark.parametrize(("seqlen", "head_dim"), [(75600, 128), (131072, 128), (262144, 64)])
def test_sums_over_many_key_blocks(seqlen: int, head_dim: int, factor: int, limit: float) -> None:
    """Hopper's e4m3 products keep 14 bits of a sum. With alpha near 0 the output is O_l, whose sums
    run over all key blocks; peaked features (`factor`) have terms of very different size.

    The limits are 1.5 times what is left at any length. Sums made in one go: 2e-3, 8e-3 and 5e-2,
    of peaked features 7e-3, 2e-2 and 5e-2."""
    need_memory(8)
    inputs = make_inputs(Case(1, seqlen, 1, head_dim, "2", torch.float16), DEVICE)
    inputs.q, inputs.k = factor * inputs.q, factor * inputs.k
    inputs.alpha_logit.fill_(-20.0)
    made = raw_route(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, 20)
    lists = (made["lut"], made["counts"])
    portable, sm90 = run_both(inputs, 20, quant="int8_fp8", lists=lists)
    assert rel_l2(sm90["out"], portable["out"]) <= limit


@needs_sm90
@pytest.mark.parametrize(("count", "quant"), [(1, "int8_fp8"), (8, "int8_fp8"), (300, "none")])
def test_more_key_blocks_than_the_router_holds(count: int, quant: str) -> None:
    """T_n = 3016 > 3008: the portable kernels make the lists, the Hopper ones all else. 300 listed
    blocks are more than the attention kernel keeps in shared memory."""
    inputs = make_inputs(Case(1, 193000, 1, 64, "1", torch.bfloat16), DEVICE)
    check_agreement(*run_both(inputs, count, quant=quant))
    for path in PATHS:
        with ops.kernel_path(path):
            made = raw_route(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, count)
        assert bool((made["counts"] == count).all())


def attend(inputs: Inputs, path: str) -> dict[str, Tensor]:
    with ops.kernel_path(path):
        out, aux = sla2.sla2_attention(*inputs.qkv, return_aux=True, **inputs.kwargs)
    lists = aux.block_map
    assert isinstance(lists, sla2.BlockMap)
    return {"out": out, "lse": aux.lse, "lut": lists.lut, "counts": lists.counts}


@needs_sm90
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_expanded_key_heads(head_dim: int, quant: str) -> None:
    """K and V of one head for four query heads, by stride 0."""
    inputs = make_inputs(Case(2, 457, 4, head_dim, "2", torch.bfloat16, quant=quant), DEVICE)
    k, v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (inputs.k, inputs.v))
    assert k.stride(2) == v.stride(2) == 0
    wide = replace(inputs, k=k, v=v)
    portable, sm90 = (attend(wide, path) for path in PATHS)
    check_agreement(portable, sm90)
    full = attend(replace(inputs, k=k.contiguous(), v=v.contiguous()), "sm90")
    for name, expected in full.items():
        assert same_bits(sm90[name], expected), name


@needs_sm90
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_layouts(head_dim: int, quant: str) -> None:
    """Views that are not contiguous: one projection's output, and (B, H, N, D)."""
    inputs = make_inputs(Case(2, 457, 3, head_dim, "2", torch.float16, quant=quant), DEVICE)
    expected = attend(inputs, "sm90")
    check_agreement(attend(inputs, "portable"), expected)
    q, k, v = torch.stack(inputs.qkv, 2).unbind(2)  # strides of the three together
    fused = attend(replace(inputs, q=q, k=k, v=v), "sm90")
    turned = replace(inputs, options={**inputs.options, "layout": "BHND"})
    turned.q, turned.k, turned.v = (x.transpose(1, 2) for x in inputs.qkv)
    heads_first = attend(turned, "sm90")
    heads_first["out"] = heads_first["out"].transpose(1, 2)
    for got in (fused, heads_first):
        for name, x in expected.items():
            assert same_bits(got[name], x), name


@needs_sm90
@pytest.mark.parametrize("quant", QUANTS)
def test_saving_changes_nothing(quant: str) -> None:
    """O_s is stored from the registers that become the output."""
    case = Case(2, 713, 3, 128, "2", torch.bfloat16, alpha="token", quant=quant)
    inputs = make_inputs(case, DEVICE)
    plain = attend(inputs, "sm90")
    with ops.kernel_path("sm90"):
        saved = raw_attn_fwd(inputs, case.num_kv_blocks, quant=quant)
    for name, expected in plain.items():
        assert same_bits(saved[name], expected), name


# ---- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def _auto() -> Iterator[None]:
    """The device's own choice, whatever SLA2_PATH says."""
    with ops.kernel_path("auto"):
        yield


auto = pytest.mark.usefixtures("_auto")

# With 130 key blocks: precision, listed blocks, branch, and what auto takes on an H200.
CHOICES = [
    ("none", 129, "both", "sm90"),
    ("none", 129, "sparse", "sm90"),
    ("int8_fp8", 128, "both", "sm90"),
    ("int8_fp8", 128, "sparse", "sm90"),
    ("int8_fp8", 129, "both", "portable"),
    ("int8_fp8", 129, "sparse", "portable"),
    ("int8_fp8", 129, "linear", "sm90"),  # nothing is quantised
    ("int8_fp16", 2, "both", "portable"),
]


@auto
@needs_sm90
@pytest.mark.parametrize(("quant", "count", "branch", "chosen"), CHOICES)
def test_auto_takes_one_path(quant: str, count: int, branch: str, chosen: str) -> None:
    """For workspace and run alike: the bytes and the bits of that path. Of the two, sm90 alone has
    counters in its workspace."""
    inputs = make_inputs(Case(1, 64 * 130, 2, 64, "1", torch.bfloat16), DEVICE)
    made = raw_route(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, count)
    options: dict[str, Any] = {
        "quant": quant, "branch": branch, "lists": (made["lut"], made["counts"]),
    }  # fmt: skip
    got = raw_attn_fwd(inputs, count, **options)
    with ops.kernel_path(chosen):
        expected = raw_attn_fwd(inputs, count, **options)
    for name, x in expected.items():
        assert same_bits(got[name], x), name
    sizes = {
        path: ops._extension().attn_fwd_workspace(
            shape=(1, 64 * 130, 2, 64, 0), routed=False, max_kv_blocks=count,
            options=(ops._QUANTS[quant], ops._BRANCHES[branch], code, False, True, 0.125),
        )
        for path, code in ops._PATHS.items()
    }  # fmt: skip
    assert sizes["auto"] == sizes[chosen]
    assert (sizes["auto"] == sizes["portable"]) == (chosen == "portable")


@auto
@needs_sm90
@pytest.mark.parametrize(
    ("quant", "count", "attention"),
    [
        ("none", 129, "attn_fwd_sm90_kernel"),
        ("int8_fp8", 128, "attn_fwd_sm90_kernel"),
        ("int8_fp8", 129, "attn_fwd_kernel"),
        ("int8_fp16", 2, "attn_fwd_kernel"),
    ],
)
def test_kernels_of_auto(quant: str, count: int, attention: str) -> None:
    """By name. The router is Hopper's in every precision."""
    case = Case(1, 64 * 130, 2, 64, "1", torch.bfloat16, quant=quant)
    inputs = make_inputs(case, DEVICE)
    inputs.options["num_kv_blocks"] = count
    times = kernel_times(
        lambda: sla2.sla2_attention(*inputs.qkv, **inputs.kwargs), inputs.q.device, 1
    )
    if not times:
        pytest.skip("the profiler records no kernels on this machine")
    ran = {match[1] for name, _ in times if (match := OWN_KERNEL.search(name))}
    assert {name for name in ran if name.startswith("attn_fwd")} == {attention}
    assert "route_kernel" in ran and not ran & {"score_kernel", "select_kernel"}
    assert ("linear_kernel" in ran) == (attention == "attn_fwd_sm90_kernel")


@auto
@pytest.mark.parametrize(
    ("quant", "count"),
    [("none", 2), ("int8_fp8", 2), ("int8_fp8", 129), ("int8_fp16", 2)],
)
def test_lists_do_not_depend_on_the_precision(quant: str, count: int) -> None:
    """Where a call has portable attention kernels alone, it has the same router as all, and the
    result is the portable one for its lists."""
    if (reason := sla2.why_not("cuda", quant=quant)) is not None:
        pytest.skip(reason)
    inputs = make_inputs(Case(1, 64 * 130, 2, 64, "1", torch.bfloat16), DEVICE)
    alone = raw_route(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, count, scores=False)
    made = raw_attn_fwd(inputs, count, quant=quant)
    assert same_bits(made["lut"], alone["lut"]) and same_bits(made["counts"], alone["counts"])
    if why_not_sm90(quant) is not None or (quant == "int8_fp8" and count > 128):
        with ops.kernel_path("portable"):
            expected = raw_attn_fwd(
                inputs, count, quant=quant, lists=(alone["lut"], alone["counts"])
            )
        for name, x in expected.items():
            assert same_bits(made[name], x), name


def test_reasons() -> None:
    """Every refusal of a path names the cause and what to take instead."""
    supported = ops._extension().supported
    device = torch.cuda.current_device()
    sm90, int8_fp16 = ops._PATHS["sm90"], ops._QUANTS["int8_fp16"]
    for path in (ops._PATHS["auto"], ops._PATHS["portable"]):
        assert supported(device, 0, 64, int8_fp16, path) is None
    assert "allowed are auto (0), portable (1) and sm90 (2)" in supported(device, 0, 64, 0, 7)
    reason = supported(device, 0, 64, int8_fp16, sm90)
    assert reason is not None and "portable" in reason
    if "90a" not in ops._extension().built_archs().split(";"):
        assert "holds no sm_90a code" in reason
    elif torch.cuda.get_device_capability(device) != (9, 0):
        assert "compute capability 9.0" in reason
    else:
        assert "no int8_fp16 kernels" in reason
        assert supported(device, 0, 64, 0, sm90) is None


@needs_sm90
def test_long_low_bit_lists_are_refused() -> None:
    """8-bit products accumulate in 14 bits on Hopper: at most 128 listed blocks."""
    inputs = make_inputs(Case(1, 64 * 130, 1, 64, "1", torch.bfloat16), DEVICE)
    with ops.kernel_path("sm90"):
        raw_attn_fwd(inputs, 128, quant="int8_fp8")
        with pytest.raises(
            RuntimeError, match="at most 128 key blocks; lists.max_kv_blocks is 129"
        ):
            raw_attn_fwd(inputs, 129, quant="int8_fp8")


def test_path_that_cannot_serve_is_an_error() -> None:
    inputs = make_inputs(Case(1, 200, 2, 64, "2", torch.bfloat16, quant="int8_fp16"), DEVICE)
    with pytest.raises(RuntimeError, match="path sm90"):
        attend(inputs, "sm90")
