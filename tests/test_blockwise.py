"""sla2.blockwise against the executable specification: forward, gradients, low bit, soft mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import check_backward, check_forward, check_quant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sla2 import blockwise, reference
from sla2.blockwise import layout, router
from sla2.blockwise.forward import round_e4m3_
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


def autograd(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


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


# ---- soft mask --------------------------------------------------------------------------------


SOFT_CASES = [
    # tokens, count, router_score, smooth_k, phi_input, pinned, alpha, per-head projections
    (1, 1, "scaled", True, "smoothed", None, "block", False),
    (65, 1, "scaled", True, "smoothed", None, "shared", True),
    (129, 2, "raw", True, "raw", None, "token", False),
    (193, 3, "softmax", False, "smoothed", None, "block", True),
    (193, 2, "scaled", True, "smoothed", [3], "block", False),
    (193, 1, "scaled", True, "raw", [0], "block", False),
    (193, 4, "scaled", True, "smoothed", None, "block", True),
    (700, 3, "scaled", True, "smoothed", [1, 10], "shared", True),
    (700, 1, "softmax", True, "raw", None, "token", False),
]


@pytest.mark.parametrize("case", SOFT_CASES, ids=str)
def test_soft(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, count, kind, smooth_k, phi_input, pinned, alpha_kind, per_head = case
    shape = (2, tokens, 3, 64)
    q, k, v = make_qkv(shape, torch.float64)
    grad = torch.randn(shape, generator=generator(9), dtype=torch.float64)
    alpha = make_alpha(alpha_kind, 3, tokens)
    proj_shape = (3, 64, 64) if per_head else (64, 64)
    gen = generator(4)
    proj_q, proj_k = (
        torch.randn(proj_shape, generator=gen, dtype=torch.float64) / 4 for _ in range(2)
    )
    options: dict[str, Any] = {
        "tau": 0.1, "router_score": kind, "scale": 0.2, "smooth_k": smooth_k,
        "phi_input": phi_input,
    }  # fmt: skip
    # Two query blocks and two heads a step, so that every loop turns more than once.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(layout.CHUNK_ELEMENTS, "cpu", 2 * BLOCK_Q * tokens)
    monkeypatch.setitem(layout.GROUP_ELEMENTS, "cpu", 2 * BLOCK_Q * tokens)

    def run(*inputs: Tensor) -> tuple[Tensor, reference.Aux]:
        q, k, v, proj_q, proj_k, alpha = inputs
        result = reference.sla2_attention(
            q, k, v, proj_q=proj_q, proj_k=proj_k, alpha_logit=alpha, num_kv_blocks=count,
            mode="soft", pinned_kv=pinned, return_aux=True, **options,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return result

    inputs = [q, k, v, proj_q, proj_k, alpha]
    pins = None if pinned is None else torch.tensor(pinned)
    out, lse, saved, mask = blockwise.soft_fwd(
        *inputs, num_kv_blocks=count, pinned_kv=pins, **options
    )
    wanted, aux = run(*inputs)
    assert_close(mask, aux.block_map, 1e-9)
    assert_close(mask.sum(-1), torch.full_like(mask[..., 0], count), 1e-9)
    assert_close(out, wanted, 1e-9)
    assert_close(lse, aux.lse, 1e-9)

    grads = blockwise.soft_bwd(grad, q, k, v, saved, lse, mask, proj_q, proj_k, alpha, **options)
    wanted_grads = autograd(lambda *x: run(*x)[0], inputs, grad)
    for actual, exact in zip(grads, wanted_grads, strict=True):
        error = (actual - exact).abs().max().item()
        assert error <= 1e-9 * max(1.0, exact.abs().max().item())
    if 1 < count < mask.shape[-1]:  # the router learns
        assert bool(grads[3].abs().max() > 1e-3) and bool(grads[4].abs().max() > 1e-3)


def test_soft_in_low_precision() -> None:
    shape = (1, 193, 2, 64)
    q, k, v = make_qkv(shape, torch.bfloat16)
    eye, alpha = torch.eye(64), make_alpha("block", 2, 193).float()
    options: dict[str, Any] = {
        "tau": 0.1, "router_score": "scaled", "scale": 0.125, "smooth_k": True,
        "phi_input": "smoothed",
    }  # fmt: skip
    out, lse, saved, mask = blockwise.soft_fwd(
        q, k, v, eye, eye, alpha, num_kv_blocks=2, pinned_kv=None, **options
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == mask.dtype == torch.float32
    arguments: dict[str, Any] = {"proj_q": eye, "proj_k": eye, "alpha_logit": alpha}
    arguments.update(mode="soft", num_kv_blocks=2, **options)
    same = reference.sla2_attention(q, k, v, **arguments)
    exact = reference.sla2_attention(q.double(), k.double(), v.double(), **arguments)
    assert isinstance(same, Tensor) and isinstance(exact, Tensor)
    check_forward(out, exact, same)
    grads = blockwise.soft_bwd(
        torch.ones_like(out), q, k, v, saved, lse, mask, eye, eye, alpha, **options
    )
    for grad, x in zip(grads, (q, k, v, eye, eye, alpha), strict=True):
        assert grad.dtype == x.dtype and bool(grad.isfinite().all())


# ---- promises of every function ---------------------------------------------------------------


def everything(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lists: tuple[Tensor, Tensor], alpha: Tensor
) -> list[Tensor]:
    """All results of all five functions."""
    proj = torch.eye(q.shape[-1]), torch.eye(q.shape[-1])
    opts: dict[str, Any] = {"scale": 0.2, "smooth_k": True, "phi_input": "raw"}
    soft: dict[str, Any] = {"tau": 0.1, "router_score": "scaled", **opts}
    results = list(blockwise.route(q, k, *proj, None, 2, smooth_k=True))
    for quant in ("none", "int8_fp16", "int8_fp8"):
        out, lse, saved = blockwise.attn_fwd(
            q, k, v, *lists, alpha, quant=quant, branch="both", **opts
        )
        results += [out, lse, saved]
    for branch in BRANCHES:
        gate = alpha if branch == "both" else None
        grads = blockwise.attn_bwd(grad, q, k, v, saved, lse, *lists, gate, branch=branch, **opts)
        results += [g for g in grads if g is not None]
    out, lse, saved, mask = blockwise.soft_fwd(
        q, k, v, *proj, alpha, num_kv_blocks=2, pinned_kv=None, **soft
    )
    results += [out, lse, saved, mask]
    return results + list(blockwise.soft_bwd(grad, q, k, v, saved, lse, mask, *proj, alpha, **soft))


def case_of_everything(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    shape = (2, 193, 3, 64)
    q, k, v = make_qkv(shape, dtype)
    grad = torch.randn(64, generator=generator(9)).to(dtype).expand(shape)
    return q, k, v, grad, to_lists(make_mask(shape)), make_alpha("block", 3, 193).float()


def test_any_strides_and_read_only_inputs() -> None:
    q, k, v, grad, lists, alpha = case_of_everything()
    assert grad.stride()[:3] == (0, 0, 0)
    before = [x.clone() for x in (q, k, v, grad, *lists, alpha)]
    plain = everything(q, k, v, grad.contiguous(), lists, alpha)
    for a, b in zip((q, k, v, grad, *lists, alpha), before, strict=True):
        assert torch.equal(a, b)
    # Heads first; a slice of a packed tensor; every second feature; transposed alpha and lists.
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    k2 = torch.stack([v, k, v], 2)[:, :, 1]
    v2 = torch.stack([v, k], -1)[..., 0]
    lut, counts = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in lists)
    strided = everything(q2, k2, v2, grad, (lut, counts), alpha.mT.contiguous().mT)
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous() and b.is_contiguous()


def test_broadcast_inputs() -> None:
    shape = (2, 129, 3, 64)
    _, _, _, _, _, alpha = case_of_everything()
    q = torch.randn(129, 1, 64, generator=generator(0)).expand(shape)
    lists = to_lists(make_mask(shape))
    expanded = everything(q, q, q, q, lists, alpha)
    c = q.contiguous()
    copied = everything(c, c, c, c, lists, alpha)
    for a, b in zip(expanded, copied, strict=True):
        assert torch.equal(a, b)


def test_results_share_no_memory_and_no_graph() -> None:
    q, k, v, grad, lists, alpha = case_of_everything(torch.bfloat16)
    for x in (q, k, v, alpha):
        x.requires_grad_()
    results = everything(q, k, v, grad, lists, alpha)
    assert not any(x.requires_grad for x in results)
    storages = [x.untyped_storage().data_ptr() for x in (*results, q, k, v, *lists, alpha)]
    assert len(set(storages)) == len(storages)


def test_autocast_does_not_reach_inside() -> None:
    case = case_of_everything()
    plain = everything(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything(*case)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_nan_stays_in_its_head() -> None:
    q, k, v, grad, lists, alpha = case_of_everything()
    clean = everything(q, k, v, grad, lists, alpha)
    for victim in (q, k, v):
        saved = victim[1, 70, 2].clone()
        victim[1, 70, 2] = float("nan")
        dirty = everything(q, k, v, grad, lists, alpha)
        victim[1, 70, 2] = saved
        spoiled = 0
        for a, b in zip(clean, dirty, strict=True):
            if a.dim() < 3 or not a.is_floating_point():
                continue  # alpha and shared projections sum over heads; lists hold no NaN
            head_dim = 2 if a.shape[1] == q.shape[1] else 1
            a, b = (x.movedim(head_dim, 1).clone() for x in (a, b))
            spoiled += int(b[1, 2].isnan().any())
            a[1, 2] = b[1, 2] = 0.0
            assert torch.equal(a, b)
        assert spoiled >= 10  # `out` and `dv` at least, of every mode


def test_chunks_and_head_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad, lists, alpha = case_of_everything(torch.float64)
    whole = everything(q, k, v, grad, lists, alpha)
    for chunk, group in ((1, 1), (3 * BLOCK_Q * BLOCK_K, 2 * BLOCK_Q * 193)):
        monkeypatch.setitem(layout.CHUNK_ELEMENTS, "cpu", chunk)
        monkeypatch.setitem(layout.GROUP_ELEMENTS, "cpu", group)
        for a, b in zip(whole, everything(q, k, v, grad, lists, alpha), strict=True):
            # float32 inside the low-bit forward, float64 elsewhere
            assert_close(b, a, 1e-6 if a.is_floating_point() else 0.0)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and 0 not in x.stride():
                self.numel = max(self.numel, x.numel())
        return out


def test_memory_is_linear_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor beyond the operands (N D), the states (N D D / 64) and a chunk, in any function."""
    tokens = 2048
    chunk = BLOCK_Q * tokens
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(layout.CHUNK_ELEMENTS, "cpu", chunk // 2)
    monkeypatch.setitem(layout.GROUP_ELEMENTS, "cpu", 1)
    shape = (1, tokens, 2, 64)
    q, k, v = make_qkv(shape, torch.float32)
    lists = to_lists(torch.ones(1, 2, *blocks_of(tokens), dtype=torch.bool))
    alpha = make_alpha("block", 2, tokens).float()
    with LargestTensor() as seen:
        everything(q, k, v, q, lists, alpha)
    assert seen.numel == max(chunk, q.numel())
