"""Which memory the kernels read and write: stale bytes, guard bands, strides, 2^31, grid limits.

T4, T6, T7 and T8 of the test plan.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HEAD_DIMS, KERNEL_DTYPES, QUANTS, Case, Inputs, make_inputs
from compare import check_backward
from gpu_tools import (
    DEVICE,
    GPU,
    GUARD_BYTE,
    RANDOM,
    Parts,
    Problem,
    as_bytes,
    check_parts,
    current_stream,
    need_memory,
    raw_attn_fwd,
    raw_route,
    run_parts,
    same_bits,
    settled_keys,
    synchronize,
)
from torch import Tensor

import sla2
from sla2 import ops, reference

pytestmark = GPU

INSTANCES = list(itertools.product(KERNEL_DTYPES, HEAD_DIMS, QUANTS))
# 0xFF.. is NaN in every floating type and an index far out of range, 0x7F.. a large number.
PATTERNS = (0x00, 0xFF, 0x7F, RANDOM)


def attend(inputs: Inputs, **options: Any) -> Any:
    return sla2.sla2_attention(*inputs.qkv, **{**inputs.kwargs, **options})


def with_qkv(inputs: Inputs, *qkv: Tensor) -> Inputs:
    q, k, v = qkv
    return replace(inputs, q=q, k=k, v=v)


# ---- T4: stale bytes and guard bands ------------------------------------------------------------


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("branch", ["both", "sparse", "linear"])
@pytest.mark.parametrize(("dtype", "head_dim", "quant"), INSTANCES, ids=str)
def test_what_memory_held_does_not_matter(
    dtype: torch.dtype, head_dim: int, quant: str, branch: str
) -> None:
    """Outputs and workspace of any content, both tails short: the same bits, nothing beyond the
    buffers written, inputs unchanged."""
    inputs = make_inputs(Case(2, 457, 3, head_dim, "2", dtype), DEVICE)
    before = [as_bytes(x).clone() for x in inputs.qkv]
    lists = None
    if branch != "both":
        made = raw_route(inputs.q, inputs.k, inputs.proj_q, inputs.proj_k, 2)
        lists = (made["lut"], made["counts"])
    runs = [
        raw_attn_fwd(inputs, 2, quant=quant, branch=branch, lists=lists, pattern=pattern)
        for pattern in PATTERNS
    ]
    for name, expected in runs[0].items():
        for pattern, run in zip(PATTERNS[1:], runs[1:], strict=True):
            assert same_bits(run[name], expected), f"{name} after bytes {pattern:#x}"
        assert name == "lse" or not expected.is_floating_point() or bool(expected.isfinite().all())
    for x, old in zip(inputs.qkv, before, strict=True):
        assert torch.equal(as_bytes(x), old)


@pytest.mark.parametrize("seqlen", [1, 64, 65, 128, 1560])
@pytest.mark.parametrize("quant", QUANTS)
def test_stale_bytes_at_other_lengths(seqlen: int, quant: str) -> None:
    inputs = make_inputs(Case(1, seqlen, 2, 64, "1", torch.float16), DEVICE)
    first, second = (raw_attn_fwd(inputs, 1, quant=quant, pattern=p) for p in (0x00, 0xFF))
    for name, expected in first.items():
        assert same_bits(second[name], expected), name


@pytest.mark.parametrize("seqlen", [1, 65, 457, 3000])
def test_router_does_not_see_stale_bytes(seqlen: int) -> None:
    inputs = make_inputs(Case(2, seqlen, 3, 128, "1", torch.bfloat16), DEVICE)
    q, k, _ = inputs.qkv
    runs = [
        raw_route(q, k, inputs.proj_q, inputs.proj_k, 1, pattern=pattern) for pattern in PATTERNS
    ]
    for run in runs[1:]:
        for name, expected in runs[0].items():
            assert same_bits(run[name], expected), name


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_padding_of_a_strided_output_is_not_written(head_dim: int, quant: str) -> None:
    """Rows, heads and columns between those of the output keep their bytes."""
    inputs = make_inputs(Case(2, 457, 3, head_dim, "2", torch.bfloat16), DEVICE)
    b, n, h, d = inputs.q.shape
    expected = raw_attn_fwd(inputs, 2, quant=quant)
    whole = torch.full((b, n + 3, h + 2, 2 * d + 16), GUARD_BYTE, dtype=torch.uint8, device=DEVICE)
    inside = (slice(None), slice(0, n), slice(1, h + 1), slice(0, d))
    target = whole.view(torch.bfloat16)[inside]
    ext = ops._extension()
    path = ops._PATHS[ops.current_path()]
    shape, options = (b, n, h, d, 0), (ops._QUANTS[quant], 0, path, False, True, d**-0.5)
    size = ext.attn_fwd_workspace(shape=shape, options=options, routed=False, max_kv_blocks=2)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    ext.attn_fwd(
        shape=shape,
        options=options,
        q=ops._operand(inputs.q),
        k=ops._operand(inputs.k),
        v=ops._operand(inputs.v),
        out=ops._operand(target),
        out_sparse=None,
        lse=0,
        alpha=ops._alpha_operand(inputs.alpha_logit, n),
        router=None,
        lists=(expected["lut"].data_ptr(), expected["counts"].data_ptr(), 2),
        workspace=(workspace.data_ptr(), size),
        stream=current_stream(),
    )
    assert same_bits(target, expected["out"])
    elements = whole.view(torch.int16)
    outside = torch.ones_like(elements, dtype=torch.bool)
    outside[inside] = False
    guard = torch.tensor([GUARD_BYTE] * 2, dtype=torch.uint8, device=DEVICE).view(torch.int16)
    assert bool((elements[outside] == guard).all())


def fill_free_memory(byte: int) -> None:
    """What the caching allocator hands out next held these bytes: its small and large pool."""
    torch.cuda.empty_cache()
    blocks = [
        torch.full((size,), byte, dtype=torch.uint8, device=DEVICE)
        for size in (512 << 20, *([1 << 20] * 64), *([512] * 4096))
    ]
    synchronize()
    del blocks


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
def test_allocator_blocks_with_stale_bytes(quant: str) -> None:
    """The same through the operators, which take their memory from PyTorch's allocator."""
    inputs = make_inputs(Case(2, 1560, 5, 128, "2", torch.bfloat16, quant=quant), DEVICE)
    results = []
    for byte in (0x00, 0xFF):
        fill_free_memory(byte)
        out, aux = attend(inputs, return_aux=True)
        o_l = sla2.complement_linear_attention(*inputs.qkv, aux.block_map)
        results.append((out, aux.lse, aux.block_map.lut, aux.block_map.counts, o_l))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("dtype", "head_dim", "quant"), INSTANCES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 65, 129, 457])
def test_rows_around_the_sequence_do_not_matter(
    dtype: torch.dtype, head_dim: int, quant: str, seqlen: int
) -> None:
    """q, k, v as views into allocations that hold NaN before token 0 and after token N - 1."""
    inputs = make_inputs(Case(2, seqlen, 3, head_dim, "1", dtype, quant=quant), DEVICE)
    expected = attend(inputs, return_aux=True)
    inside = []
    for x in inputs.qkv:
        wide = x.new_full((2, 200 + seqlen + 200, 3, head_dim), torch.nan)
        inside.append(wide[:, 200 : 200 + seqlen].copy_(x))
    out, aux = attend(with_qkv(inputs, *inside), return_aux=True)
    assert same_bits(out, expected[0]) and same_bits(aux.lse, expected[1].lse)
    assert same_bits(aux.block_map.lut, expected[1].block_map.lut)


# ---- T6: strides --------------------------------------------------------------------------------


def strided(x: Tensor, kind: str) -> Tensor:
    """The values of x (B, N, H, D) in memory laid out differently, NaN in between."""
    b, n, h, d = x.shape
    if kind == "fused_qkv":
        out = x.new_full((b, n, 3 * h, d), torch.nan)[:, :, h : 2 * h]
    elif kind == "transposed":
        out = x.new_empty((b, h, n, d)).transpose(1, 2)
    elif kind == "tokens_first":
        out = x.new_empty((n, b, h, d)).transpose(0, 1)
    elif kind == "sliced_heads":
        out = x.new_full((b, n, 2 * h, d), torch.nan)[:, :, ::2]
    elif kind == "sliced_tokens":
        out = x.new_full((b, 2 * n, h, d), torch.nan)[:, ::2]
    elif kind == "padded_rows":  # 16-byte multiples: read in place
        out = x.new_full((b, n, h, d + 8), torch.nan)[..., :d]
    elif kind == "odd_rows":  # these and the next are copied
        out = x.new_full((b, n, h, d + 3), torch.nan)[..., :d]
    elif kind == "offset":
        out = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    else:
        raise AssertionError(kind)
    return out.copy_(x)


KINDS = (
    "fused_qkv", "transposed", "tokens_first", "sliced_heads", "sliced_tokens", "padded_rows",
    "odd_rows", "offset",
)  # fmt: skip
COPIED = ("odd_rows", "offset")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_strides_do_not_matter(kind: str, quant: str, head_dim: int) -> None:
    """All three in this layout, and each alone beside contiguous ones."""
    inputs = make_inputs(Case(2, 193, 3, head_dim, "2", torch.float16, quant=quant), DEVICE)
    expected, aux = attend(inputs, return_aux=True)
    other = [strided(x, kind) for x in inputs.qkv]
    for x in other:
        assert (ops._kernel_input(x) is x) == (kind not in COPIED)
    mixed = [[other[i] if i == one else x for i, x in enumerate(inputs.qkv)] for one in range(3)]
    for qkv in (other, *mixed):
        out, again = attend(with_qkv(inputs, *qkv), return_aux=True)
        assert out.is_contiguous() and same_bits(out, expected) and same_bits(again.lse, aux.lse)
    # The same memory, named (B, H, N, D).
    turned = with_qkv(inputs, *(x.transpose(1, 2) for x in other))
    out = attend(turned, layout="BHND")
    assert out.is_contiguous() and same_bits(out.transpose(1, 2), expected)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("expanded", ["batch", "heads"])
def test_stride_zero(expanded: str, quant: str) -> None:
    one = {"batch": (1, 4), "heads": (4, 1)}[expanded]
    case = Case(one[0], 193, one[1], 64, "2", torch.bfloat16, quant=quant)
    inputs = make_inputs(case, DEVICE)
    inputs.alpha_logit = inputs.alpha_logit[0]  # shared by the heads
    wide = with_qkv(inputs, *(x.expand(4, -1, 4, -1) for x in inputs.qkv))
    assert ops._kernel_input(wide.q) is wide.q and 0 in wide.q.stride()
    assert same_bits(attend(wide), attend(inputs).expand(4, -1, 4, -1))


def gradients(inputs: Inputs, block_map: Any, grad_out: Tensor, function: Any, **more: Any) -> Any:
    leaves = [x.detach().requires_grad_() for x in (*inputs.qkv, inputs.alpha_logit)]
    out = function(
        *leaves[:3], proj_q=None, proj_k=None, alpha_logit=leaves[3], block_map=block_map, **more
    )
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@pytest.mark.parametrize("kind", ["transposed", "sliced_heads", "odd_rows", "stride 0"])
def test_gradient_of_any_strides(kind: str) -> None:
    """A gradient that is a view, and the one of stride 0 that `out.sum()` sends."""
    inputs = make_inputs(Case(2, 457, 5, 64, "2", torch.bfloat16), DEVICE)
    block_map = sla2.route(
        inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, num_kv_blocks=2
    )
    if kind == "stride 0":
        grad_out = inputs.q.new_ones(()).expand(inputs.q.shape)
    else:
        grad_out = strided(torch.randn_like(inputs.q), kind)
    assert not grad_out.is_contiguous()
    got = gradients(inputs, block_map, grad_out, sla2.sla2_attention)
    same = gradients(inputs, block_map, grad_out.contiguous(), sla2.sla2_attention)
    for a, b in zip(got, same, strict=True):
        assert same_bits(a, b)
    wide = with_qkv(inputs, *(x.float() for x in inputs.qkv))
    dense = block_map.to_dense()
    exact, low = (
        gradients(wide, dense, grad_out, reference.sla2_attention, compute_dtype=compute)
        for compute in (torch.float32, torch.bfloat16)
    )
    for name, a, b, c in zip(("dq", "dk", "dv", "dalpha"), got, exact, low, strict=True):
        check_backward(a, b, c, name=name)


# ---- T7: beyond 2^31 ----------------------------------------------------------------------------


def check_last_head(inputs: Inputs, quant: str, count: int) -> None:
    """Runs the whole problem; compares its last batch and head, whose keys become settled ones."""
    q, k, v = inputs.qkv
    b, h = q.shape[0] - 1, q.shape[2] - 1
    one = (slice(b, None), slice(None), slice(h, None))
    k[one] = settled_keys(k[one])
    block_map = sla2.route(q, k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, num_kv_blocks=count)
    block_map.validate()
    last = sla2.BlockMap(
        block_map.lut[b:, h:].contiguous(), block_map.counts[b:, h:].contiguous(),
        seqlen=q.shape[1],
    )  # fmt: skip
    small = with_qkv(inputs, *(x[one].contiguous() for x in inputs.qkv))
    small.alpha_logit = inputs.alpha_logit[h:]
    alone = sla2.route(
        small.q, small.k, proj_q=small.proj_q, proj_k=small.proj_k, num_kv_blocks=count
    )
    assert same_bits(alone.lut, last.lut) and same_bits(alone.counts, last.counts)
    got = run_parts(inputs, block_map, quant=quant, layout="BNHD")
    assert got.out is not None and got.o_s is not None
    assert got.o_l is not None and got.lse is not None
    out, o_s, o_l = (x[one].contiguous() for x in (got.out, got.o_s, got.o_l))
    part = Parts(out, o_s, o_l, got.lse[b:, h:].contiguous())
    del got
    check_parts(Problem(*small.qkv, last.to_dense(), small.alpha_logit), part, quant)
    for name, a, b_ in zip(Parts._fields, part, run_parts(small, last, quant=quant, layout="BNHD"),
                           strict=True):  # fmt: skip
        assert a is not None and b_ is not None and same_bits(a, b_), f"{name}: not as alone"


def random_inputs(qkv: tuple[Tensor, ...], heads: int, seqlen: int) -> Inputs:
    d = qkv[0].shape[3]
    eye = torch.eye(d, device=DEVICE)
    alpha = torch.randn(heads, -(-seqlen // 128), device=DEVICE)
    return Inputs(qkv[0], qkv[1], qkv[2], eye, eye, alpha, {})


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int8_fp8"])
def test_more_than_2_to_31_elements(quant: str) -> None:
    """B 4, N 111600, H 40, D 128: 2.29e9 elements a tensor, and as many in the linear states."""
    need_memory(60)
    shape = (4, 111600, 40, 128)
    qkv = tuple(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    check_last_head(random_inputs(qkv, 40, 111600), quant, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int8_fp8"])
def test_fused_view_beyond_2_to_32(quant: str) -> None:
    """q, k, v inside one projection's output of 5.1e9 elements."""
    need_memory(70)
    fused = torch.randn(3, 111600, 3, 40, 128, device=DEVICE, dtype=torch.float16)
    check_last_head(random_inputs(fused.unbind(2), 40, 111600), quant, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dimension", ["batch", "token", "head"])
def test_strides_beyond_2_to_31(dimension: str, quant: str) -> None:
    """A small problem whose tokens, heads or batches lie far apart, NaN between them."""
    need_memory(40)
    b, n, h, d = 2, 193, 2, 64
    # Strides of batch, token and head, and the distance of q, k and v from each other.
    *strides, apart = {
        "batch": ((1 << 31) + 64, 3 * h * d, d, h * d),
        "token": (3 * h * d, (1 << 24) + 3 * b * h * d, d, h * d),
        "head": (3 * n * d, 3 * d, (1 << 31) + 64, d),
    }[dimension]
    extent = sum((size - 1) * s for size, s in zip((b, n, h), strides, strict=True)) + 3 * h * d
    memory = torch.full((extent,), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    qkv = tuple(memory.as_strided((b, n, h, d), (*strides, 1), i * apart) for i in range(3))
    for x in qkv:
        x.copy_(torch.randn(b, n, h, d, device=DEVICE))
        assert ops._kernel_input(x) is x
    check_last_head(random_inputs(qkv, h, n), quant, 2)


@pytest.mark.gpu
def test_more_than_2_to_31_scores() -> None:
    """All B H T_m T_n scores of a batch of one problem: the last head's are the first batch's."""
    need_memory(30)
    q, k = (torch.randn(1, 111600, 40, 64, device=DEVICE, dtype=torch.float16) for _ in range(2))
    eye = torch.eye(64, device=DEVICE)
    made = raw_route(q.expand(36, -1, -1, -1), k.expand(36, -1, -1, -1), eye, eye, 2)
    alone = raw_route(q, k, eye, eye, 2)
    assert made["scores"].numel() > 1 << 31
    for batch in (1, 17, 35):
        for name in ("scores", "lut", "counts"):
            assert same_bits(made[name][batch, 38:], alone[name][0, 38:]), (batch, name)


# ---- T8: grid limits ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("batch", "heads"), [(65535, 1), (65536, 1), (1, 65536), (700, 100)], ids=str
)
def test_more_heads_than_a_grid_dimension_holds(batch: int, heads: int, quant: str) -> None:
    need_memory(60)
    case = Case(batch, 65, heads, 64, "1", torch.bfloat16, quant=quant)
    generator = torch.Generator(DEVICE).manual_seed(0)
    qkv = tuple(
        torch.randn(case.shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(3)
    )
    inputs = random_inputs(qkv, heads, 65)
    inputs.k = settled_keys(inputs.k)
    inputs.options = {"num_kv_blocks": 1, "quant": quant}
    out, aux = attend(inputs, return_aux=True)
    aux.block_map.validate()
    axis = 0 if batch > 1 else 2
    size, dense = out.shape[axis], aux.block_map.to_dense()
    for start in (0, size // 2, size - 64):
        part = slice(start, start + 64)
        cut: Any = (part,) if axis == 0 else (slice(None), slice(None), part)
        of_heads: Any = (part,) if axis == 0 else (slice(None), part)
        alpha = inputs.alpha_logit if axis == 0 else inputs.alpha_logit[part]
        q, k, v = (x[cut] for x in inputs.qkv)
        problem = Problem(q, k, v, dense[of_heads], alpha)
        check_parts(problem, Parts(out[cut], lse=aux.lse[of_heads]), quant)
    # Everything in between: in two halves the bits are the same.
    for half in (slice(0, size // 2), slice(size // 2, None)):
        cut = (half,) if axis == 0 else (slice(None), slice(None), half)
        some = with_qkv(inputs, *(x[cut].contiguous() for x in inputs.qkv))
        if axis == 2:
            some.alpha_logit = inputs.alpha_logit[half]
        assert same_bits(attend(some), out[cut])
