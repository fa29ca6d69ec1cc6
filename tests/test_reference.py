"""Forward of `sla2.reference` against the element-wise oracle; router, quantisers, arguments."""

from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from compare import check_quant, rel_l2
from reference_cases import BLOCKS, F64, ceil_div, make_inputs, randn, random_map, to_numpy
from torch import Tensor
from torch.testing import assert_close

from sla2 import reference as ref
from sla2.reference_math import to_e4m3


def run_naive(qkv, params, block_map=None, **options) -> naive.Result:
    dense = None if block_map is None else block_map.numpy().astype(np.float64)
    opt = naive.Options(**options)
    return naive.forward(*to_numpy(*qkv), *to_numpy(*params.values()), opt, dense)


# ---- forward against the oracle ---------------------------------------------------------------

OPTIONS = {
    "default": {},
    "raw_score": {"router_score": "raw"},
    "softmax_score": {"router_score": "softmax"},
    "no_smoothing": {"smooth_k": False},
    "raw_phi": {"phi_input": "raw"},
    "scale": {"scale": 0.7},
    "pinned": {"pinned_kv": (0,)},
    "soft": {"mode": "soft"},
    "soft_raw_score": {"mode": "soft", "router_score": "raw", "tau": 0.3},
    "soft_softmax_score": {"mode": "soft", "router_score": "softmax"},
    "soft_pinned": {"mode": "soft", "pinned_kv": (0,), "phi_input": "raw"},
    "int8_fp8": {"quant": "int8_fp8"},
    "int8_fp16": {"quant": "int8_fp16"},
    "int8_fp8_no_smoothing": {"quant": "int8_fp8", "smooth_k": False, "scale": 0.7},
    "int8_fp16_raw_phi": {"quant": "int8_fp16", "phi_input": "raw"},
}


@pytest.mark.parametrize("n", [1, 2, 5, 17, 33])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward(name: str, n: int) -> None:
    options = {**OPTIONS[name], "num_kv_blocks": max(1, ceil_div(n, 4) // 3)}
    qkv, params = make_inputs(1, 2, n, 16)
    expected = run_naive(qkv, params, **options)
    out, aux = ref.sla2_attention(
        *qkv, **params, **options, **BLOCKS, layout="BHND", return_aux=True
    )
    assert_close(aux.block_map.double(), torch.from_numpy(expected.mask))
    # The emulation computes in float32, whatever the dtype around it.
    dtype = torch.float32 if "quant" in options else F64
    assert_close(out.to(dtype), torch.from_numpy(expected.out).to(dtype))
    assert_close(aux.lse.to(dtype), torch.from_numpy(expected.lse).to(dtype))
    assert aux.sparsity == 1 - options["num_kv_blocks"] / ceil_div(n, 4)


@pytest.mark.parametrize("alpha", ["head", "shared", "token"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_parameter_shapes(alpha: str, per_head: bool, mode: str) -> None:
    qkv, params = make_inputs(2, 3, 17, 8, per_head=per_head, alpha=alpha)
    expected = run_naive(qkv, params, num_kv_blocks=2, mode=mode)
    bnhd = [t.transpose(1, 2) for t in qkv]
    out = ref.sla2_attention(*bnhd, **params, num_kv_blocks=2, mode=mode, **BLOCKS)
    assert out.is_contiguous()
    assert_close(out.transpose(1, 2), torch.from_numpy(expected.out))


@pytest.mark.parametrize("quant", ["none", "int8_fp16", "int8_fp8"])
def test_branches(quant: str) -> None:
    qkv, params = make_inputs(2, 2, 33, 8)
    block_map = random_map(2, 2, 33)
    block_map[0, 0, 1], block_map[0, 1, 2], block_map[1, 1, 4] = False, True, True
    expected = run_naive(qkv, params, block_map, num_kv_blocks=1, quant=quant)
    dtype = F64 if quant == "none" else torch.float32
    o_s, lse = ref.block_sparse_attention(
        *qkv, block_map, quant=quant, layout="BHND", return_lse=True, **BLOCKS
    )
    o_l = ref.complement_linear_attention(*qkv, block_map, layout="BHND", **BLOCKS)
    if quant == "int8_fp8":  # the branch alone has no states in e4m3
        plain = run_naive(qkv, params, block_map, num_kv_blocks=1)
        assert_close(o_l, torch.from_numpy(plain.o_l))
        q, k, v = qkv
        o_l = ref.linear_branch_fp8(q, ref.smooth_keys(k), v, (~block_map).to(F64), **BLOCKS)
    out = ref.sla2_attention(
        *qkv, **params, block_map=block_map, quant=quant, layout="BHND", **BLOCKS
    )
    for value, wanted in ((o_s, expected.o_s), (lse, expected.lse), (out, expected.out)):
        assert_close(value.to(dtype), torch.from_numpy(wanted).to(dtype))
    assert_close(o_l, torch.from_numpy(expected.o_l))
    # Nothing listed: O = O_l. Everything listed: O_l = 0, O = O_s.
    assert not o_s[0, 0, 8:16].any() and (lse[0, 0, 8:16] == -math.inf).all()
    assert torch.equal(out[0, 0, 8:16], o_l[0, 0, 8:16])
    assert not o_l[0, 1, 16:24].any() and torch.equal(out[0, 1, 16:24], o_s[0, 1, 16:24])
    assert not o_l[1, 1, 32:].any() and torch.equal(out[1, 1, 32:], o_s[1, 1, 32:])


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_topk_one_is_full_attention(mode: str) -> None:
    (q, k, v), params = make_inputs(1, 2, 19, 8)
    out = ref.sla2_attention(q, k, v, **params, topk=1.0, mode=mode, layout="BHND", **BLOCKS)
    full = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    assert_close(out, full)


def test_smoothing_leaves_sparse_branch_and_hard_map() -> None:
    (q, k, v), params = make_inputs(1, 2, 33, 8)
    w_q, w_k = params["proj_q"], params["proj_k"]
    maps, outs = [], []
    for smooth in (True, False):
        maps.append(
            ref.route(
                q,
                k,
                proj_q=w_q,
                proj_k=w_k,
                num_kv_blocks=3,
                smooth_k=smooth,
                layout="BHND",
                **BLOCKS,
            )
        )
        outs.append(
            ref.block_sparse_attention(q, k, v, maps[0], smooth_k=smooth, layout="BHND", **BLOCKS)
        )
    assert torch.equal(*maps)
    assert_close(*outs)


@pytest.mark.parametrize("quant", ["none", "int8_fp16", "int8_fp8"])
@pytest.mark.parametrize("options", [{}, {"smooth_k": False, "scale": 0.3}, {"phi_input": "raw"}])
def test_rows(quant: str, options: dict) -> None:
    n, picked = 337, torch.tensor([42, 0, 17])  # 85 key blocks: the states come in two parts
    qkv, params = make_inputs(2, 2, n, 8, alpha="token")
    block_map = random_map(2, 2, n, keep=0.1)
    block_map[0, 0, 0], block_map[1, 1, 42] = False, True
    args = {"block_map": block_map, "quant": quant, "layout": "BHND", **options, **BLOCKS}
    out, aux = ref.sla2_attention(*qkv, **params, **args, return_aux=True)
    scale = {"scale": options["scale"]} if "scale" in options else {}
    smooth = options.get("smooth_k", True)
    o_s = ref.block_sparse_attention(
        *qkv, block_map, quant=quant, smooth_k=smooth, layout="BHND", **scale, **BLOCKS
    )
    o_l = ref.complement_linear_attention(
        *qkv, block_map, smooth_k=smooth, layout="BHND", **BLOCKS,
        phi_input=options.get("phi_input", "smoothed"),
    )  # fmt: skip
    if quant == "int8_fp8":
        q, k, v = qkv
        k = ref.smooth_keys(k) if smooth and "phi_input" not in options else k
        o_l = ref.linear_branch_fp8(q, k, v, (~block_map).to(F64), **BLOCKS)
    rows = ref.rows_of_blocks(picked, n, BLOCKS["block_q"])
    assert rows.tolist() == [336, *range(8), *range(136, 144)]
    got = ref.sla2_attention_rows(
        *qkv, query_blocks=picked, alpha_logit=params["alpha_logit"], **args
    )
    dtype = F64 if quant == "none" else torch.float32
    for value, dense in zip(got[:3], (out, o_s, o_l), strict=True):
        assert_close(value.to(dtype), dense[:, :, rows].to(dtype))
    assert_close(got[3].to(dtype), aux.lse[:, :, rows].to(dtype))
    bnhd = ref.sla2_attention_rows(
        *(t.transpose(1, 2) for t in qkv),
        query_blocks=picked,
        alpha_logit=params["alpha_logit"],
        **{**args, "layout": "BNHD"},
    )
    assert torch.equal(bnhd[0].transpose(1, 2), got[0])


# ---- router -----------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert ref.hard_map(scores, 2).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    pinned = torch.tensor([4, 2])
    assert ref.hard_map(scores, 3, pinned).int().tolist() == [[0, 1, 1, 0, 1], [1, 0, 1, 0, 1]]
    many = ref.hard_map(torch.zeros(3, 5000), 7)  # long rows: where an unstable sort would show
    assert many[:, :7].all() and many.sum() == 21
    zeros = torch.tensor([[-0.0, 0.0, -0.0]])
    assert ref.hard_map(zeros, 1).int().tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("k", [1, 7, 30, 31])
def test_hard_map_keeps_the_k_largest(k: int) -> None:
    scores = randn(2, 3, 5, 31).mul(4).round()  # many ties
    chosen = ref.hard_map(scores, k)
    assert (chosen.sum(-1) == k).all()
    worst = scores.masked_fill(~chosen, math.inf).amin(-1)
    best_left = scores.masked_fill(chosen, -math.inf).amax(-1)
    assert (worst >= best_left).all()
    with_infinite = scores.index_fill(-1, torch.tensor([3]), math.inf)
    assert ref.hard_map(with_infinite, k, torch.tensor([30]))[..., 30].all()


def test_pool_uses_the_true_length_of_the_tail() -> None:
    x = randn(1, 2, 11, 4)
    pooled = ref.pool_blocks(x, 8)
    assert_close(pooled[:, :, 0], x[:, :, :8].mean(2))
    assert_close(pooled[:, :, 1], x[:, :, 8:].mean(2))


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_soft_topk_sums_to_k(spread: float, dtype: torch.dtype) -> None:
    scores = (spread * randn(2, 3, 5, 40)).to(dtype)
    for k in (1, 2, 13, 39):
        m = ref.soft_topk(scores, k)
        assert_close(m.sum(-1), torch.full_like(m[..., 0], k))
        assert (m.diff(dim=-1).sign() * scores.diff(dim=-1).sign() >= 0).all()
    pinned = torch.tensor([5, 9])
    m = ref.soft_topk(scores, 4, pinned=pinned)
    assert (m[..., pinned] == 1).all()
    assert_close(m.sum(-1), torch.full_like(m[..., 0], 4))
    assert (ref.soft_topk(scores, 40) == 1).all()
    only = ref.soft_topk(scores, 2, pinned=pinned)
    assert (only.sum(-1) == 2).all() and (only[..., pinned] == 1).all()


def test_soft_topk_at_the_longest_sequence() -> None:
    """T_n = 16384, k = 1 and T_n - 1: where the brackets of lambda are tightest."""
    for scores in (torch.zeros(1, 16384), randn(1, 16384, dtype=torch.float32)):
        for k in (1, 16383):
            assert_close(
                ref.soft_topk(scores, k).double().sum().item(), float(k), rtol=1e-5, atol=0
            )


def test_soft_topk_approaches_the_hard_map() -> None:
    scores = randn(4, 20)
    assert_close(ref.soft_topk(scores, 5, tau=1e-4), ref.hard_map(scores, 5).double())


def test_soft_topk_log_stays_finite_where_m_underflows() -> None:
    scores = torch.tensor([[0.0, 50.0, 1.0]], requires_grad=True)
    m, log_m = ref.soft_topk_with_log(scores, 1)
    assert m[0, 0] == 0 and torch.isfinite(log_m).all()
    log_m[0, 0].backward()
    assert torch.isfinite(scores.grad).all() and scores.grad[0, 0] != 0


@pytest.mark.parametrize("pinned", [None, torch.tensor([1, 6])])
def test_soft_topk_gradient(pinned: Tensor | None) -> None:
    scores = randn(3, 9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: ref.soft_topk_with_log(s, 3, 0.5, pinned), (scores,), eps=1e-6, atol=1e-6
    )
    m = ref.soft_topk(scores, 3, 0.5, pinned)
    g = randn(3, 9, seed=1)
    (grad,) = torch.autograd.grad(m, scores, g)
    for row in range(3):
        formula = naive.soft_topk_gradient(*to_numpy(m[row].detach(), g[row]), 0.5)
        assert_close(grad[row], torch.from_numpy(formula))


# ---- quantisers -------------------------------------------------------------------------------


def test_e4m3_rounding() -> None:
    """torch's cast, clamped, against a table of all e4m3 values; ties, subnormals, saturation."""
    table = torch.from_numpy(naive.E4M3)
    middles = (table[1:] + table[:-1]) / 2
    x = torch.cat([table, middles, middles * (1 + 1e-6), torch.tensor([449.0, 464.0, 500.0, 1e9])])
    x = torch.cat([x, -x]).float()
    wanted = torch.tensor([naive.e4m3(value) for value in x.tolist()])
    assert torch.equal(to_e4m3(x).float(), wanted)


def test_quantisers_by_hand() -> None:
    x = torch.zeros(1, 1, 6, 2)
    x[0, 0, :, 0] = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.0, -6.0])
    x8, scale = ref.quantize_per_block(x, 4)
    assert x8[0, 0, :, 0].tolist() == [127, 0, 2, -2, 64, -127]
    assert_close(scale[0, 0], torch.tensor([1.0, 6.0 / 127]))
    v = torch.tensor([[3.0, 0.0, 5e-31], [-6.0, 0.0, 0.0]]).reshape(1, 1, 2, 3)
    v8, channel = ref.quantize_v_fp8(v)
    assert v8.float()[0, 0, :, 0].tolist() == [224.0, -448.0] and not v8.float()[..., 1].any()
    assert_close(channel[0, 0, 0], torch.tensor([6.0 / 448, 1e-30 / 448, 1e-30 / 448]))
    v16, exponent = ref.quantize_v_fp16(v)
    assert v16.float()[0, 0, :, 0].tolist() == [0.375, -0.75] and exponent[0, 0, 0, 0] == 3
    assert exponent[0, 0, 0, 1] == math.frexp(1e-30)[1]


PLAIN_DATA = {"gaussian": 0.0, "outlier_channels": 30.0}


@pytest.mark.parametrize("data", PLAIN_DATA)
@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
@pytest.mark.parametrize("d", [64, 128])
def test_quantisation_is_close_to_plain(quant: str, d: int, data: str) -> None:
    """T2q (ii) on real block sizes; outlier channels of K (an offset) are what smoothing is for."""
    q, k, v = (randn(1, 2, 1000, d, seed=i, dtype=torch.float32) for i in range(3))
    k[..., ::16] += PLAIN_DATA[data]
    block_map = torch.rand(1, 2, 8, 16, generator=torch.Generator().manual_seed(1)) < 0.25
    block_map[..., 3] = True
    run = {"block_map": block_map, "layout": "BHND", "proj_q": None, "proj_k": None}
    run["alpha_logit"] = torch.full((8,), 1.7)
    plain = ref.sla2_attention(q, k, v, **run)
    emulation = ref.sla2_attention(q, k, v, **run, quant=quant)
    check_quant(emulation, emulation, plain, quant=quant)
    o_s = ref.block_sparse_attention(q, k, v, block_map, layout="BHND", quant=quant)
    check_quant(
        o_s, o_s, ref.block_sparse_attention(q, k, v, block_map, layout="BHND"), quant=quant
    )
    if PLAIN_DATA[data]:
        raw = {**run, "smooth_k": False}
        unsmoothed = ref.sla2_attention(q, k, v, **raw, quant=quant)
        loss = rel_l2(unsmoothed, ref.sla2_attention(q, k, v, **raw))
        assert loss > 2 * rel_l2(emulation, plain)


@pytest.mark.parametrize("quant", ["none", "int8_fp16", "int8_fp8"])
def test_awkward_values_stay_finite(quant: str) -> None:
    qkv, params = make_inputs(1, 1, 17, 16)
    q, k, v = (t.float() for t in qkv)
    v[..., 0], v[..., 1], v[..., 2], v[..., 3] = 0.0, 1.25, 1e38, 3.3e38 * v[..., 3].sign()
    v[..., 4] *= 1e-38
    out = ref.sla2_attention(
        q, k, v, **params, num_kv_blocks=2, quant=quant, layout="BHND", **BLOCKS
    )
    assert torch.isfinite(out).all()
    assert not out[..., 0].any()
    ones = torch.ones_like(out[..., 1])
    # P is rounded, its sum is not: a constant channel comes back within e4m3's rounding.
    assert_close(out[..., 1], 1.25 * ones, rtol=2**-4 if quant == "int8_fp8" else 1e-3, atol=0)
    zeros = [torch.zeros_like(q)] * 2
    flat = ref.sla2_attention(
        *zeros, v, **params, num_kv_blocks=2, quant=quant, layout="BHND", **BLOCKS
    )
    assert torch.isfinite(flat).all()
    # Saturated softmax, phi one-hot, and logits far below float32's exp range.
    extreme = ref.sla2_attention(
        100 * q, 100 * k, qkv[2].float(), **params, num_kv_blocks=2, quant=quant, layout="BHND",
        smooth_k=False, **BLOCKS,
    )  # fmt: skip
    assert torch.isfinite(extreme).all()


# ---- dtypes, devices, errors ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", ["none", "int8_fp8"])
def test_dtypes(dtype: torch.dtype, quant: str) -> None:
    qkv, params = make_inputs(1, 2, 17, 16)
    qkv = [t.to(dtype) for t in qkv]
    before = [t.clone() for t in qkv]
    run = {**params, "num_kv_blocks": 2, "quant": quant, "layout": "BHND", **BLOCKS}
    out, aux = ref.sla2_attention(*qkv, **run, return_aux=True)
    assert out.dtype == dtype and out.shape == qkv[0].shape
    wide = F64 if dtype == F64 else torch.float32
    assert aux.lse.dtype == wide
    same = ref.sla2_attention(*(t.to(wide) for t in qkv), **run)
    assert torch.equal(out, same.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(qkv, before, strict=True))


def test_compute_dtype() -> None:
    qkv, params = make_inputs(1, 2, 33, 16)
    qkv = [t.float() for t in qkv]
    run = {**params, "block_map": random_map(1, 2, 33), "layout": "BHND", **BLOCKS}
    wide = ref.sla2_attention(*(t.double() for t in qkv), **run)
    assert_close(ref.sla2_attention(*qkv, **run, compute_dtype=F64), wide.float())
    for low in (torch.bfloat16, torch.float16):
        out = ref.sla2_attention(*qkv, **run, compute_dtype=low)
        assert torch.equal(out, out.to(low).float())
        error = (out - wide).norm() / wide.norm()
        assert torch.finfo(low).eps / 16 < error < 4 * torch.finfo(low).eps
        rows = ref.sla2_attention_rows(
            *qkv, query_blocks=torch.tensor([4]), **{k: run[k] for k in run if "proj" not in k},
            compute_dtype=low,
        )  # fmt: skip
        assert_close(rows[0], out[:, :, 32:], rtol=2 * torch.finfo(low).eps, atol=1e-5)
    with pytest.raises(ValueError, match="compute_dtype"):
        ref.sla2_attention(*qkv, **run, compute_dtype=torch.int8)


@pytest.mark.parametrize("shape", [(0, 2, 9, 8), (2, 2, 0, 8)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, requires_grad=True)
    t_m, t_n = ceil_div(shape[2], 8), ceil_div(shape[2], 4)
    eye = torch.eye(8)
    out, aux = ref.sla2_attention(
        q, q, q, proj_q=eye, proj_k=eye, alpha_logit=torch.zeros(2, t_m), layout="BHND",
        return_aux=True, **BLOCKS,
    )  # fmt: skip
    assert out.shape == shape and aux.lse.shape == shape[:3]
    assert aux.block_map.shape == (shape[0], 2, t_m, t_n)
    out.sum().backward()
    assert q.grad.shape == shape
    branch = ref.block_sparse_attention(q, q, q, aux.block_map, layout="BHND", **BLOCKS)
    assert branch.shape == shape


def test_block_map_object() -> None:
    qkv, params = make_inputs(1, 2, 17, 8)
    dense = random_map(1, 2, 17)

    class Lists:
        def to_dense(self) -> Tensor:
            return dense

    run = {**params, "layout": "BHND", **BLOCKS}
    outs = [ref.sla2_attention(*qkv, **run, block_map=m) for m in (dense, Lists())]
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"topk": 1}, TypeError, "num_kv_blocks"),
        ({"topk": 1.5}, ValueError, "1.5"),
        ({"topk": 0.0}, ValueError, "0, 1"),
        ({"num_kv_blocks": 6}, ValueError, "T_n = 5"),
        ({"num_kv_blocks": 0}, ValueError, "T_n = 5"),
        ({"num_kv_blocks": 1, "pinned_kv": [0, 1]}, ValueError, "pinned_kv"),
        ({"pinned_kv": [5]}, ValueError, "pinned_kv"),
        ({"quant": "fp8"}, ValueError, "int8_fp8"),
        ({"mode": "medium"}, ValueError, "'hard', 'soft'"),
        ({"mode": "soft", "quant": "int8_fp8"}, ValueError, "soft"),
        ({"mode": "soft", "block_map": torch.ones(1, 2, 3, 5, dtype=bool)}, ValueError, "soft"),
        ({"router_score": "cosine"}, ValueError, "'scaled', 'raw', 'softmax'"),
        ({"phi_input": "none"}, ValueError, "'smoothed', 'raw'"),
        ({"layout": "NHD"}, ValueError, "'BNHD', 'BHND'"),
        ({"block_map": torch.ones(1, 2, 3, 4, dtype=bool)}, ValueError, "T_m, T_n"),
        ({"block_map": torch.ones(1, 2, 3, 5)}, ValueError, "bool"),
        ({"alpha_logit": torch.zeros(2, 4)}, ValueError, "T_m"),
        ({"proj_q": None}, ValueError, "block_map"),
    ],
)
def test_errors(change: dict, error: type[Exception], match: str) -> None:
    qkv, params = make_inputs(1, 2, 17, 8)
    with pytest.raises(error, match=match):
        ref.sla2_attention(*qkv, **{**params, "layout": "BHND", **BLOCKS, **change})


def test_shape_mismatch() -> None:
    (q, k, v), params = make_inputs(1, 2, 17, 8)
    with pytest.raises(ValueError, match="shapes"):
        ref.sla2_attention(q, k[:, :1], v[:, :1], **params, layout="BHND", **BLOCKS)
