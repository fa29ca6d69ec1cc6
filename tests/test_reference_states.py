"""The linear branch's states in e4m3, as `sla2.reference` emulates them for quant "int8_fp8"."""

from __future__ import annotations

import math

import pytest
import torch
from compare import cosine, rel_l2
from reference_cases import BLOCKS, F64, ceil_div, make_inputs, randn, random_map
from torch import Tensor
from torch.testing import assert_close

from sla2 import reference as ref
from sla2.constants import E4M3_MAX, EPS
from sla2.reference_branches import state_scale
from sla2.reference_math import channel_amax


def rounded_states(phi_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """h_j of blocks of 64 rows, (B, H, T_n, D * D), before and after its rounding to e4m3."""
    h, _ = ref.block_states(phi_k, v)
    amax = channel_amax(v)
    h8 = ref.quantize_states_fp8(h, amax).float().flatten(-2)
    return h.flatten(-2), h8 * state_scale(amax, 64)


def by_loop(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """O_l (N, D) of one head, query block by query block and channel by channel."""
    block_q, block_k = BLOCKS["block_q"], BLOCKS["block_k"]
    phi_q, phi_k = (x.softmax(-1) for x in (q, k))
    phi_k = phi_k.bfloat16().double()
    out = torch.zeros_like(v)
    for i, row in enumerate(weights):
        rows = slice(i * block_q, (i + 1) * block_q)
        for c in range(v.shape[1]):
            amax = max(v[:, c].abs().max().float(), torch.tensor(EPS))
            state, norm = torch.zeros(2, v.shape[1], dtype=F64)
            for j, weight in enumerate(row):
                block = phi_k[j * block_k : (j + 1) * block_k]
                h = block.T @ v[j * block_k : (j + 1) * block_k, c]
                h8 = h.float() * (torch.tensor(448.0) / amax / block_k)
                state += weight * h8.to(torch.float8_e4m3fn).double()
                norm += weight * block.sum(0)
            if row.any():
                scale = amax / torch.tensor(448.0) * block_k
                out[rows, c] = phi_q[rows] @ state * scale.double() / (phi_q[rows] @ norm)
    return out


@pytest.mark.parametrize("n", [1, 4, 7, 33])
def test_branch_is_the_loop(n: int) -> None:
    (q, k, v), _ = make_inputs(1, 2, n, 16)
    v[..., 3] *= 1e20
    weights = (~random_map(1, 2, n)).to(F64)
    weights[0, 0, 0], weights[0, 1, -1] = 1.0, 0.0
    out = ref.linear_branch_fp8(q, k, v, weights, **BLOCKS)
    for h in range(2):
        assert_close(out[0, h], by_loop(q[0, h], k[0, h], v[0, h], weights[0, h]))


@pytest.mark.parametrize("amax", [1e-32, 1e-30, 0.1, 0.7, 1.0, 3.1, 447.0, 1e30, 5e36])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_state_does_not_saturate(amax: float, sign: float) -> None:
    """All 64 tokens one-hot on one feature, V = +-amax throughout: |h| = 64 amax."""
    phi = torch.zeros(1, 1, 64, 16)
    phi[..., 5] = 1.0
    v = torch.full((1, 1, 64, 16), sign * amax)
    h, _ = ref.block_states(phi, v)
    h8 = ref.quantize_states_fp8(h, channel_amax(v)).float()
    assert not h8[..., :5, :].any() and not h8[..., 6:, :].any()
    wanted = sign * E4M3_MAX if amax >= EPS else sign * amax / EPS * E4M3_MAX
    assert_close(h8[..., 5, :], torch.full((1, 1, 1, 16), wanted), rtol=2**-4, atol=0)
    if amax >= EPS:
        assert (h8[..., 5, :] == wanted).all()
        assert_close(rounded_states(phi, v)[1], h.flatten(-2))


def test_no_state_saturates() -> None:
    """One-hot rows and random signs, and the unrounded codes of ordinary data."""
    signs = randn(1, 4, 1000, 64, dtype=torch.float32).sign()
    one_hot = (1e4 * torch.eye(64))[torch.arange(1000) % 3].expand(1, 4, 1000, 64)
    for k, v in ((one_hot, signs), (randn(1, 4, 1000, 64), randn(1, 4, 1000, 64, seed=1))):
        h, _ = ref.block_states(ref.feature_map(k.float()), v.float())
        codes = h * (E4M3_MAX / channel_amax(v) / 64)[:, :, None]
        assert codes.abs().max() <= E4M3_MAX * (1 + 1e-6)


def test_silent_channel_is_zero() -> None:
    (q, k, v), params = make_inputs(1, 2, 33, 16)
    v[..., 3], v[..., 5] = 0.0, 1e-35
    run = {**params, "block_map": random_map(1, 2, 33), "layout": "BHND", **BLOCKS}
    out = ref.sla2_attention(q, k, v, **run, quant="int8_fp8")
    assert torch.isfinite(out).all() and not out[..., 3].any()
    assert out[..., 5].abs().max() <= 1e-35


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_values_show(value: float) -> None:
    """In all rows of the head, as one scale serves the channel; in no other channel or head."""
    (q, k, v), _ = make_inputs(1, 2, 33, 16)
    weights = torch.ones(1, 2, 5, 9, dtype=F64)
    clean = ref.linear_branch_fp8(q, k, v, weights, **BLOCKS)
    v[0, 1, 7, 3] = value
    out = ref.linear_branch_fp8(q, k, v, weights, **BLOCKS)
    assert out[0, 1, :, 3].isnan().all()
    out[0, 1, :, 3] = clean[0, 1, :, 3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("d", [64, 128])
def test_error_budget(d: int) -> None:
    """Gaussian data, every 16th channel of K offset by 30. Three bits of mantissa cost the states
    2.65e-2, alone or summed; phi(Q) averages over features, so that O_l loses 6e-3 to 8e-3."""
    n = 2000
    q, k, v = (randn(1, 2, n, d, seed=i, dtype=torch.float32) for i in range(3))
    k[..., ::16] += 30.0
    keys = ref.smooth_keys(k)
    listed = torch.rand(1, 2, 16, 32, generator=torch.Generator().manual_seed(1)) < 0.1
    listed[..., 3] = True
    weights = (~listed).float()
    h, h8 = rounded_states(ref.feature_map(keys).bfloat16().float(), v)
    assert 2.5e-2 < rel_l2(h8, h) < 2.8e-2
    assert 1e-2 < rel_l2(weights @ h8, weights @ h) < 4e-2
    o_l = ref.linear_branch(q, keys, v, weights)
    assert 1e-3 < rel_l2(ref.linear_branch_fp8(q, keys, v, weights), o_l) < 1.2e-2

    run = {"block_map": listed, "layout": "BHND", "proj_q": None, "proj_k": None}
    for logit in (-3.0, 0.0, 1.7):
        run["alpha_logit"] = torch.full((16,), logit)
        out = ref.sla2_attention(q, k, v, **run, quant="int8_fp8")
        assert cosine(out, ref.sla2_attention(q, k, v, **run)) >= 0.999


def test_peaked_features_lose_no_more_than_the_states() -> None:
    """Where phi(Q) picks single features nothing averages."""
    q, k, v = (randn(1, 2, 2000, 64, seed=i, dtype=torch.float32) for i in range(3))
    weights = torch.ones(1, 2, 16, 32)
    for factor in (3.0, 10.0):
        exact = ref.linear_branch(factor * q, factor * k, v, weights)
        error = rel_l2(ref.linear_branch_fp8(factor * q, factor * k, v, weights), exact)
        assert 1e-2 < error < 4e-2


@pytest.mark.parametrize("needs", ["v", "alpha"])
def test_gradient_is_that_of_the_unquantised_branch(needs: str) -> None:
    """alpha's too: <dO, O_s> - <dO, O_l> with the low-bit O_s and the O_l that the backward pass
    recomputes."""
    n = 33
    (q, k, v), params = make_inputs(1, 1, n, 16)
    listed = torch.zeros(1, 1, ceil_div(n, 8), ceil_div(n, 4), dtype=torch.bool)
    listed[..., 1] = True
    run = {"proj_q": None, "proj_k": None, "block_map": listed, "layout": "BHND", **BLOCKS}
    logit = params["alpha_logit"].requires_grad_(needs == "alpha")
    out = ref.sla2_attention(
        q, k, v.requires_grad_(needs == "v"), alpha_logit=logit, quant="int8_fp8", **run
    )
    d_o = randn(*out.shape, seed=9)
    o_s = ref.block_sparse_attention(q, k, v, listed, quant="int8_fp8", layout="BHND", **BLOCKS)
    o_l = ref.complement_linear_attention(q, k, v, listed, layout="BHND", **BLOCKS)
    alpha = logit.sigmoid().repeat_interleave(8, -1)[:, :n, None]
    wanted = alpha * o_s + (1 - alpha) * o_l
    assert not torch.equal(out, wanted)
    leaf = v if needs == "v" else logit
    got, expected = (torch.autograd.grad(x, leaf, d_o)[0] for x in (out, wanted))
    assert_close(got, expected)
