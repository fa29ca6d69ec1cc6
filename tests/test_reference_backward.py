"""Gradients of `sla2.reference` against finite differences and the written formulas."""

from __future__ import annotations

import naive
import pytest
import torch
from compare import cosine
from reference_cases import BLOCKS, ceil_div, make_inputs, randn, random_map, to_numpy
from torch import Tensor
from torch.testing import assert_close

from sla2 import reference as ref


def test_gradcheck_hard() -> None:
    (q, k, v), params = make_inputs(1, 1, 33, 16)
    block_map = random_map(1, 1, 33)
    block_map[0, 0, 1], block_map[0, 0, 2] = False, True

    def run(q, k, v, alpha_logit):
        return ref.sla2_attention(
            q, k, v, proj_q=None, proj_k=None, alpha_logit=alpha_logit, block_map=block_map,
            layout="BHND", **BLOCKS,
        )  # fmt: skip

    inputs = [t.requires_grad_() for t in (q, k, v, params["alpha_logit"])]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("score", "alpha"), [("scaled", "head"), ("softmax", "token")])
def test_gradcheck_soft(score: str, alpha: str) -> None:
    (q, k, v), params = make_inputs(1, 2, 10, 16, per_head=alpha == "token", alpha=alpha)

    def run(q, k, v, proj_q, proj_k, alpha_logit):
        return ref.sla2_attention(
            q, k, v, proj_q=proj_q, proj_k=proj_k, alpha_logit=alpha_logit, num_kv_blocks=2,
            mode="soft", router_score=score, tau=0.5, layout="BHND", **BLOCKS,
        )  # fmt: skip

    inputs = [t.requires_grad_() for t in (q, k, v, *params.values())]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


def formula_gradients(q, k, v, alpha, mask, o_s, lse, d_o) -> naive.Gradients:
    """The written backward pass of head (0, 0)."""
    head = (t.detach()[0, 0] for t in (q, k, v))
    arrays = to_numpy(*head, alpha.detach(), mask.detach()[0, 0])
    arrays += to_numpy(o_s.detach()[0, 0], lse.detach()[0, 0], d_o[0, 0])
    return naive.backward(*arrays, BLOCKS["block_q"], BLOCKS["block_k"])


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("n", [5, 33])
def test_written_backward(soft: bool, n: int) -> None:
    """The formulas of the backward kernels, the mask's gradient included, against autograd."""
    q, k, v = (leaf(t) for t in make_inputs(1, 1, n, 8)[0])
    alpha = leaf(randn(ceil_div(n, 8), seed=6).sigmoid())
    listed = random_map(1, 1, n)
    listed[..., 0], listed[..., -1] = True, False
    mask = leaf(randn(*listed.shape, seed=8).sigmoid() if soft else listed.double())
    keys = ref.smooth_keys(k)
    o_s, lse = ref.sparse_branch(
        q, keys, v, listed | soft, scale=8**-0.5, bias=mask.log() if soft else None, **BLOCKS
    )
    o_l = ref.linear_branch(q, keys, v, 1 - mask, **BLOCKS)
    alpha_rows = alpha.repeat_interleave(8)[:n, None]
    d_o = randn(1, 1, n, 8, seed=9)
    inputs = (q, k, v, alpha, mask)
    grads = torch.autograd.grad(ref.blend(o_s, o_l, alpha_rows), inputs, d_o)
    written = formula_gradients(q, k, v, alpha, mask, o_s, lse, d_o)
    for grad, formula in zip(grads[:3], (written.dq, written.dk, written.dv), strict=True):
        assert_close(grad[0, 0], torch.from_numpy(formula))
    assert_close(grads[3], torch.from_numpy(written.dalpha))
    if soft:
        assert_close(grads[4][0, 0], torch.from_numpy(written.dmask))


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_low_bit_forward_has_the_unquantised_backward(quant: str) -> None:
    """Alg. 3: O_s and L of the low-bit forward, everything else from unquantised q, k, v."""
    qkv, params = make_inputs(1, 1, 33, 16)
    block_map = random_map(1, 1, 33)
    block_map[..., 0] = True
    logit = params["alpha_logit"]
    d_o = randn(1, 1, 33, 16, seed=9)
    all_grads = {}
    for mode in ("none", quant):
        inputs = [leaf(t) for t in (*qkv, logit)]
        out = ref.sla2_attention(
            *inputs[:3], proj_q=None, proj_k=None, alpha_logit=inputs[3], block_map=block_map,
            quant=mode, layout="BHND", **BLOCKS,
        )  # fmt: skip
        all_grads[mode] = torch.autograd.grad(out, inputs, d_o)
    o_s, lse = ref.block_sparse_attention(
        *qkv, block_map, quant=quant, layout="BHND", return_lse=True, **BLOCKS
    )
    alpha = logit[0].sigmoid()
    written = formula_gradients(*qkv, alpha, block_map.double(), o_s, lse, d_o)
    wanted = written.dq, written.dk, written.dv
    for grad, formula, plain in zip(all_grads[quant], wanted, all_grads["none"], strict=False):
        assert_close(grad[0, 0], torch.from_numpy(formula))
        assert cosine(grad, plain) >= 0.99
    assert_close(all_grads[quant][3][0], torch.from_numpy(written.dalpha) * alpha * (1 - alpha))


def test_constant_and_forced_alpha_get_no_gradient() -> None:
    qkv, params = make_inputs(1, 1, 17, 8)
    block_map = random_map(1, 1, 17)
    block_map[0, 0, 0], block_map[0, 0, 1] = False, True
    block_map[0, 0, 2] = torch.tensor([True, False, True, False, False])
    logit = leaf(params["alpha_logit"])
    inputs = [leaf(t) for t in qkv]
    out = ref.sla2_attention(
        *inputs, proj_q=None, proj_k=None, alpha_logit=logit, block_map=block_map,
        layout="BHND", **BLOCKS,
    )  # fmt: skip
    out.sum().backward()
    assert logit.grad[0, :2].tolist() == [0.0, 0.0] and logit.grad[0, 2] != 0
    assert all(torch.isfinite(t.grad).all() for t in inputs)
    # A branch alone, whose empty rows do get a gradient; fp16 has no room for 1 / EPS.
    for branch in (ref.block_sparse_attention, ref.complement_linear_attention):
        for low in (None, torch.float16):
            out = branch(*inputs, block_map, layout="BHND", compute_dtype=low, **BLOCKS)
            grads = torch.autograd.grad(out.sum(), inputs)
            assert all(torch.isfinite(g).all() and g.any() for g in grads)
