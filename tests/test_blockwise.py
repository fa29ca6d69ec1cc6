"""sla2.blockwise against the executable specification: routing, forward, low bit, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blockwise_cases import (
    ALPHA_SHAPES,
    BRANCHES,
    OPTIONS,
    RAGGED,
    assert_close,
    autograd,
    blocks_of,
    expected,
    generator,
    make_alpha,
    make_mask,
    make_qkv,
    sizes,
    to_lists,
    to_mask,
)
from compare import check_backward, check_forward, check_quant
from torch import Tensor

from sla2 import blockwise, reference
from sla2.blockwise import router
from sla2.blockwise.quantize import round_e4m3_

# ---- routing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", RAGGED)
@pytest.mark.parametrize("smooth_k", [True, False])
def test_route(tokens: int, smooth_k: bool) -> None:
    shape = sizes(tokens)
    q, k, _ = make_qkv(shape, torch.float64)
    heads, dim = shape[2:]
    blocks_q, blocks_k = blocks_of(tokens)
    gen = generator(5)
    proj_q, proj_k = torch.randn(2, heads, dim, dim, generator=gen, dtype=torch.float64)
    for count in range(1, blocks_k + 1):
        pinned = torch.tensor([blocks_k - 1]) if count % 2 else None
        for wq, wk in ((proj_q, proj_k), (proj_q[0], proj_k[0])):
            lut, counts = blockwise.route(q, k, wq, wk, pinned, count, smooth_k=smooth_k)
            assert lut.dtype == torch.uint16 and counts.dtype == torch.int32
            assert lut.shape == (shape[0], heads, blocks_q, count) and bool((counts == count).all())
            assert bool((lut.int().diff(dim=-1) > 0).all())
            wanted = reference.route(
                q, k, proj_q=wq, proj_k=wk, num_kv_blocks=count, pinned_kv=pinned,
                smooth_k=smooth_k,
            )  # fmt: skip
            assert torch.equal(to_mask(lut, counts, blocks_k), wanted)


def test_route_ties_go_to_the_lowest_index() -> None:
    q, k = torch.zeros(1, 700, 2, 64), torch.randn(1, 700, 2, 64)
    eye = torch.eye(64)
    lut, _ = blockwise.route(q, k, eye, eye, torch.tensor([7, 9]), 5, smooth_k=True)
    assert torch.equal(lut.int(), torch.tensor([0, 1, 2, 7, 9]).expand_as(lut).int())


def test_route_top_k_with_few_levels_and_nan() -> None:
    scores = torch.randint(0, 3, (40, 33), generator=generator(0)).float()
    scores[3, 5] = scores[3, 20] = float("nan")
    wanted = scores.argsort(dim=-1, descending=True, stable=True)[:, :9].sort(-1).values
    assert torch.equal(router.top_k_blocks(scores.clone(), 9, None), wanted)


def test_route_rejects_a_count_out_of_range() -> None:
    q, eye = torch.zeros(1, 129, 1, 64), torch.eye(64)
    for count in (0, 4):
        with pytest.raises(ValueError, match="num_kv_blocks"):
            blockwise.route(q, q, eye, eye, None, count, smooth_k=True)


# ---- forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", RAGGED)
@pytest.mark.parametrize("branch", BRANCHES)
def test_forward(tokens: int, branch: str) -> None:
    shape = sizes(tokens)
    q, k, v = make_qkv(shape, torch.float64)
    mask = make_mask(shape)
    lut, counts = to_lists(mask)
    for smooth_k, phi_input in OPTIONS:
        for kind in ALPHA_SHAPES if branch == "both" else ALPHA_SHAPES[:1]:
            alpha = make_alpha(kind, shape[2], tokens) if branch == "both" else None
            opts: dict[str, Any] = {"scale": 0.3, "smooth_k": smooth_k, "phi_input": phi_input}
            out, lse, out_sparse = blockwise.attn_fwd(
                q, k, v, lut, counts, alpha, quant="none", branch=branch, **opts
            )
            assert_close(out, expected(q, k, v, mask, alpha, branch, **opts), 1e-12)
            wanted_s, wanted_lse = reference.block_sparse_attention(
                q, k, v, mask, scale=0.3, smooth_k=smooth_k, return_lse=True
            )
            if branch == "linear":
                assert not out_sparse.any() and bool((lse == -torch.inf).all())
            else:
                assert_close(out_sparse, wanted_s, 1e-12)
                assert_close(lse, wanted_lse, 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_forward_every_count(count: int) -> None:
    shape = (2, 193, 3, 64)
    q, k, v = make_qkv(shape, torch.float64)
    eye = torch.eye(64, dtype=torch.float64)
    alpha = make_alpha("block", 3, 193)
    lut, counts = blockwise.route(q, k, eye, eye, None, count, smooth_k=True)
    out, _, out_sparse = blockwise.attn_fwd(
        q, k, v, lut, counts, alpha, scale=0.125, quant="none", branch="both", smooth_k=True,
        phi_input="smoothed",
    )  # fmt: skip
    wanted = reference.sla2_attention(
        q, k, v, proj_q=eye, proj_k=eye, alpha_logit=alpha, num_kv_blocks=count
    )
    assert isinstance(wanted, Tensor)
    assert_close(out, wanted, 1e-12)
    if count == 4:  # empty complement: alpha counts as 1
        assert torch.equal(out, out_sparse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branch", BRANCHES)
def test_forward_precision(dtype: torch.dtype, branch: str) -> None:
    for tokens in (17, 129, 700):
        shape = sizes(tokens)
        q, k, v = make_qkv(shape, dtype)
        mask = make_mask(shape)
        lut, counts = to_lists(mask)
        alpha = make_alpha("block", shape[2], tokens).float() if branch == "both" else None
        opts: dict[str, Any] = {"scale": 0.125, "smooth_k": True, "phi_input": "smoothed"}
        out, lse, out_sparse = blockwise.attn_fwd(
            q, k, v, lut, counts, alpha, quant="none", branch=branch, **opts
        )
        assert out.dtype == out_sparse.dtype == dtype and lse.dtype == torch.float32
        same = expected(q, k, v, mask, alpha, branch, **opts)
        exact = expected(q.double(), k.double(), v.double(), mask, alpha, branch, **opts)
        check_forward(out, exact, same)


@pytest.mark.parametrize("quant", ["none", "int8_fp8"])
def test_hostile_lists(quant: str) -> None:
    """Entries out of range, repeated or out of order and counts out of range change nothing."""
    shape = (1, 700, 2, 64)
    q, k, v = make_qkv(shape, torch.float32)
    mask = make_mask(shape)
    lut, counts = to_lists(mask)
    flipped = lut.int().flip(-1)
    start = torch.arange(lut.shape[-1]) >= lut.shape[-1] - counts[..., None]
    dirty = torch.where(start, flipped, 11 + torch.arange(lut.shape[-1]) * 5000)
    dirty = torch.cat([dirty, dirty, torch.full_like(dirty[..., :1], 65535)], -1)
    alpha = make_alpha("block", 2, 700).float()
    opts: dict[str, Any] = {
        "scale": 0.125, "branch": "both", "smooth_k": True, "phi_input": "smoothed"
    }  # fmt: skip
    clean = blockwise.attn_fwd(q, k, v, lut, counts, alpha, quant=quant, **opts)
    everything = torch.full_like(counts, 1 << 30)
    fake = blockwise.attn_fwd(
        q, k, v, dirty.to(torch.uint16), everything, alpha, quant=quant, **opts
    )
    for a, b in zip(clean, fake, strict=True):
        assert torch.equal(a, b)
    nothing = blockwise.attn_fwd(q, k, v, lut, -1 - counts, alpha, quant=quant, **opts)
    assert not nothing[2].any() and bool((nothing[1] == -torch.inf).all())


def test_empty_inputs() -> None:
    for shape in ((0, 70, 2, 64), (2, 0, 2, 64)):
        q = torch.empty(shape)
        blocks_q, _ = blocks_of(shape[1])
        eye = torch.eye(64)
        alpha = torch.zeros(2, blocks_q)
        lut, counts = blockwise.route(q, q, eye, eye, None, 1, smooth_k=True)
        assert lut.shape == (shape[0], 2, blocks_q, 1)
        opts: dict[str, Any] = {
            "scale": 1.0, "branch": "both", "smooth_k": True, "phi_input": "smoothed"
        }  # fmt: skip
        out, lse, saved = blockwise.attn_fwd(q, q, q, lut, counts, alpha, quant="none", **opts)
        assert out.shape == q.shape and lse.shape == (shape[0], 2, shape[1])
        dq, _, _, dalpha = blockwise.attn_bwd(q, q, q, q, saved, lse, lut, counts, alpha, **opts)
        assert dq.shape == q.shape and dalpha is not None and not dalpha.any()


def test_blending_needs_alpha() -> None:
    q = torch.zeros(1, 2, 1, 64)
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.uint16), torch.ones(1, 1, 1, dtype=torch.int32)
    opts: dict[str, Any] = {"scale": 1.0, "branch": "both", "smooth_k": True, "phi_input": "raw"}
    with pytest.raises(ValueError, match="alpha_logit"):
        blockwise.attn_fwd(q, q, q, *lists, None, quant="none", **opts)
    with pytest.raises(ValueError, match="alpha_logit"):
        blockwise.attn_bwd(q, q, q, q, q, q[:, :, 0], *lists, None, **opts)


# ---- low bit ----------------------------------------------------------------------------------


def test_e4m3_rounding() -> None:
    """Every e4m3 value, every midpoint between two, and their float32 neighbours."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.logspace(-30, 2.6, 9999)])
    points = torch.cat([points, points.nextafter(points + 1), points.nextafter(-points)])
    points = points.clamp(0.0, 448.0)
    points = torch.cat([points, -points])
    wanted = points.to(torch.float8_e4m3fn).float()
    assert torch.equal(round_e4m3_(points, torch.empty_like(points)), wanted)


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
@pytest.mark.parametrize("tokens", [1, 2, 64, 128, 193, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_bit_is_the_emulation(quant: str, tokens: int, dtype: torch.dtype) -> None:
    """Keys come in pairs x, -x: their mean is 0 without rounding, which would move int8 values."""
    shape = (2, tokens, 3, 64 if tokens != 193 else 128)
    q, k, v = make_qkv(shape, dtype)
    half = tokens // 2
    k[:, :half] = k[:, :half].mul(8).round().div(8)
    k[:, half : 2 * half] = -k[:, :half]
    k[:, 2 * half :] = 0
    v[..., 3] = 0.0
    v[..., 5] *= 1e-6 if dtype == torch.float16 else 1e30
    mask = make_mask(shape)
    lut, counts = to_lists(mask)
    for smooth_k in (True, False):
        out, lse, _ = blockwise.attn_fwd(
            q, k, v, lut, counts, None, scale=0.3, quant=quant, branch="sparse",
            smooth_k=smooth_k, phi_input="smoothed",
        )  # fmt: skip
        wanted, wanted_lse = reference.block_sparse_attention(
            q, k, v, mask, scale=0.3, smooth_k=smooth_k, quant=quant, return_lse=True
        )
        # What is left is the order of float32 sums, N of them at most, and one rounding to dtype.
        rounding = torch.finfo(torch.float32).eps * (tokens + 8) ** 0.5
        assert_close(lse, wanted_lse, rounding)
        for channels in ([3], [5], [i for i in range(shape[3]) if i not in (3, 5)]):
            relative = max(rounding, torch.finfo(dtype).eps)
            assert_close(out[..., channels], wanted[..., channels], relative)


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_low_bit_with_smoothed_keys(quant: str) -> None:
    shape = (1, 700, 2, 64)
    q, k, v = make_qkv(shape, torch.bfloat16)
    mask, alpha = make_mask(shape), make_alpha("token", 2, 700).float()
    opts: dict[str, Any] = {"scale": 0.125, "smooth_k": True, "phi_input": "smoothed"}
    out, _, _ = blockwise.attn_fwd(
        q, k, v, *to_lists(mask), alpha, quant=quant, branch="both", **opts
    )
    emulation = expected(q, k, v, mask, alpha, "both", quant=quant, **opts)
    check_quant(out, emulation, expected(q, k, v, mask, alpha, "both", **opts), quant=quant)


def test_the_linear_branch_alone_is_not_quantised() -> None:
    q, k, v = make_qkv((1, 193, 2, 64), torch.float32)
    lists = to_lists(make_mask((1, 193, 2, 64)))
    outs = [
        blockwise.attn_fwd(
            q, k, v, *lists, None, scale=0.125, quant=quant, branch="linear", smooth_k=True,
            phi_input="smoothed",
        )[0]
        for quant in ("none", "int8_fp8")
    ]  # fmt: skip
    assert torch.equal(*outs)


def test_low_bit_blend_and_float64() -> None:
    shape = (1, 193, 2, 64)
    q, k, v = make_qkv(shape, torch.float64)
    mask, alpha = make_mask(shape), make_alpha("block", 2, 193)
    lut, counts = to_lists(mask)
    opts: dict[str, Any] = {
        "scale": 0.125, "smooth_k": True, "phi_input": "raw", "quant": "int8_fp8"
    }  # fmt: skip
    out, lse, _ = blockwise.attn_fwd(q, k, v, lut, counts, alpha, branch="both", **opts)
    assert out.dtype == lse.dtype == torch.float64
    eps = torch.finfo(torch.float32).eps
    assert_close(out, expected(q, k, v, mask, alpha, "both", **opts), eps * 200**0.5)


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_low_bit_survives_values_near_the_end_of_float32(quant: str) -> None:
    q, k, v = make_qkv((1, 129, 1, 64), torch.float32)
    v = v.clamp(-1, 1) * 3e38
    lut, counts = to_lists(torch.ones(1, 1, 2, 3, dtype=torch.bool))
    out, _, _ = blockwise.attn_fwd(
        q, k, v, lut, counts, None, scale=0.1, quant=quant, branch="sparse", smooth_k=True,
        phi_input="smoothed",
    )  # fmt: skip
    assert bool(out.isfinite().all())


# ---- backward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", RAGGED)
@pytest.mark.parametrize("branch", BRANCHES)
def test_backward(tokens: int, branch: str) -> None:
    shape = sizes(tokens)
    q, k, v = make_qkv(shape, torch.float64)
    grad = torch.randn(shape, generator=generator(9), dtype=torch.float64)
    mask = make_mask(shape)
    lut, counts = to_lists(mask)
    for smooth_k, phi_input in OPTIONS:
        for kind in ALPHA_SHAPES if branch == "both" else ALPHA_SHAPES[:1]:
            alpha = make_alpha(kind, shape[2], tokens) if branch == "both" else None
            opts: dict[str, Any] = {"scale": 0.3, "smooth_k": smooth_k, "phi_input": phi_input}
            _, lse, saved = blockwise.attn_fwd(
                q, k, v, lut, counts, alpha, quant="none", branch=branch, **opts
            )
            if branch == "linear":  # neither is looked at
                saved, lse = q.new_empty(0), q.new_empty(0)
            grads = blockwise.attn_bwd(
                grad, q, k, v, saved, lse, lut, counts, alpha, branch=branch, **opts
            )

            def run(
                q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None = None, opts: Any = opts
            ) -> Tensor:
                return expected(q, k, v, mask, alpha, branch, **opts)

            inputs = [q, k, v] if alpha is None else [q, k, v, alpha]
            assert (grads[3] is None) == (alpha is None)
            # Gradients that vanish (one token: the softmax has one entry) are measured at 1.
            for actual, wanted in zip(grads, autograd(run, inputs, grad), strict=False):
                assert actual is not None
                error = (actual - wanted).abs().max().item()
                assert error <= 1e-9 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_backward_after_a_low_bit_forward(quant: str) -> None:
    """The 16-bit backward of Alg. 3: unquantised operands, O_s and lse of the low-bit forward."""
    shape = (1, 193, 2, 64)
    q, k, v = make_qkv(shape, torch.float64)
    grad = torch.randn(shape, generator=generator(9), dtype=torch.float64)
    mask, alpha = make_mask(shape), make_alpha("block", 2, 193)
    lut, counts = to_lists(mask)
    saved, lse = reference.block_sparse_attention(
        q, k, v, mask, scale=0.125, quant=quant, return_lse=True
    )
    opts: dict[str, Any] = {"scale": 0.125, "smooth_k": True, "phi_input": "smoothed"}
    grads = blockwise.attn_bwd(grad, q, k, v, saved, lse, lut, counts, alpha, branch="both", **opts)

    def run(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return expected(q, k, v, mask, alpha, "both", quant=quant, **opts)

    for actual, wanted in zip(grads, autograd(run, [q, k, v, alpha], grad), strict=True):
        assert actual is not None
        assert_close(actual, wanted, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_precision(dtype: torch.dtype) -> None:
    shape = (1, 700, 2, 64)
    q, k, v = make_qkv(shape, dtype)
    grad = torch.randn(shape, generator=generator(9)).to(dtype)
    mask, alpha = make_mask(shape), make_alpha("block", 2, 700).float()
    lut, counts = to_lists(mask)
    opts: dict[str, Any] = {"scale": 0.125, "smooth_k": True, "phi_input": "smoothed"}
    _, lse, saved = blockwise.attn_fwd(
        q, k, v, lut, counts, alpha, quant="none", branch="both", **opts
    )
    grads = blockwise.attn_bwd(grad, q, k, v, saved, lse, lut, counts, alpha, branch="both", **opts)

    def run(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        return expected(q, k, v, mask, alpha, "both", compute_dtype=compute_dtype, **opts)

    inputs = [q, k, v, alpha]
    # O_s is saved in q's dtype: its rounding enters delta = <dO_s, O_s>, as in any 16-bit backward.
    compute_dtype: torch.dtype | None = dtype
    same = autograd(run, inputs, grad)
    compute_dtype = None
    exact = autograd(run, [x.double() for x in inputs], grad.double())
    for actual, low, wanted, x in zip(grads, same, exact, inputs, strict=True):
        assert actual is not None and actual.dtype == x.dtype
        check_backward(actual, wanted, low)
