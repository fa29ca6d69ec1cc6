"""Gradients on the device against the reference's autograd; never a silent zero.

The block map is given, so that both differentiate the same function. A low-bit forward pass is
differentiated as if it had not been quantised, with its O_s and lse.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KERNEL_DTYPES, QUANTS, Case, Inputs, make_inputs
from compare import BACKWARD_REL_L2, check_backward, check_forward, max_err, rel_l2
from gpu_tools import DEVICE, GPU, settled_keys
from torch import Tensor

import sla2
from sla2 import reference

pytestmark = GPU

NAMES = ("dq", "dk", "dv", "dalpha", "dproj_q", "dproj_k")


def results(
    function: Any, inputs: Inputs, grad_out: Tensor, *, wide: bool, soft: bool, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients; wide: of float32 copies of q, k, v, for the reference."""
    leaves = [
        x.detach().to(torch.float32 if wide else x.dtype, copy=True).requires_grad_()
        for x in (*inputs.qkv, inputs.alpha_logit)
    ]
    projs = [x.detach().clone().requires_grad_(soft) for x in (inputs.proj_q, inputs.proj_k)]
    q, k, v, alpha = leaves
    out = function(q, k, v, proj_q=projs[0], proj_k=projs[1], alpha_logit=alpha, **options)
    wanted = (*leaves, *(projs if soft else ()))
    return out.detach(), torch.autograd.grad(out, wanted, grad_out.to(out.dtype))


def check(case: Case, **options: Any) -> None:
    inputs = make_inputs(case, DEVICE)
    soft = options.get("mode") == "soft"
    if case.quant != "none":
        inputs.k = settled_keys(inputs.k, case.layout)
    common: dict[str, Any] = {"layout": case.layout, "quant": case.quant, **options}
    if soft:
        common["num_kv_blocks"] = case.num_kv_blocks
        ours = theirs = common
    else:
        block_map = sla2.route(
            inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, layout=case.layout,
            num_kv_blocks=case.num_kv_blocks,
        )  # fmt: skip
        ours = {**common, "block_map": block_map}
        theirs = {**common, "block_map": block_map.to_dense()}
    generator = torch.Generator().manual_seed(7)
    grad_out = torch.randn(case.shape, generator=generator).to(DEVICE, case.dtype)
    run: dict[str, Any] = {"inputs": inputs, "grad_out": grad_out, "soft": soft}
    out, got = results(sla2.sla2_attention, wide=False, **run, **ours)
    exact, low, low_linear = (
        results(reference.sla2_attention, wide=True, compute_dtype=dtype, **run, **theirs)
        for dtype in (torch.float32, case.dtype, torch.bfloat16)
    )
    if soft:
        worst = max((low[0], low_linear[0]), key=lambda x: max_err(x, exact[0]))
        check_forward(out, exact[0], worst)
    for name, a, b, *yardsticks in zip(NAMES, got, exact[1], low[1], low_linear[1], strict=False):
        assert a.is_contiguous() and bool(b.any()), name
        if case.quant == "none":
            # The kernels' linear branch multiplies in bfloat16 whatever q is.
            check_backward(a, b, max(yardsticks, key=lambda x: max_err(x, b)), name=name)
        else:  # what storing the low-bit O_s in 16 bit costs is not in the yardstick
            assert rel_l2(a, b) <= BACKWARD_REL_L2, name


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_hard_mode(dtype: torch.dtype, quant: str, layout: str) -> None:
    check(Case(2, 457, 5, 64, "2", dtype, layout, quant))


OPTIONS: list[dict[str, Any]] = [
    {"smooth_k": False},
    {"phi_input": "raw"},
    {"scale": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("alpha", ["shared", "token"])
def test_options(options: dict[str, Any], alpha: str) -> None:
    check(Case(2, 457, 5, 128, "2", torch.bfloat16, alpha=alpha), **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_soft_mode(dtype: torch.dtype, layout: str) -> None:
    """Stage 1: the router's projections have gradients as well."""
    check(Case(2, 457, 5, 64, "2", dtype, layout, proj="head"), mode="soft", tau=0.5)


@pytest.mark.parametrize("seqlen", [1, 64, 65, 200])
def test_no_block_left_or_none_listed(seqlen: int) -> None:
    """With all blocks listed alpha has no gradient, and the linear branch gives none."""
    inputs = make_inputs(Case(1, seqlen, 2, 64, "all", torch.bfloat16), DEVICE)
    leaves = [x.requires_grad_() for x in (*inputs.qkv, inputs.alpha_logit)]
    out = sla2.sla2_attention(*inputs.qkv, **inputs.kwargs)
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert bool(grads[2].any()) and not grads[3].any()


@pytest.mark.parametrize("only", ["q", "k", "v", "alpha_logit"])
@pytest.mark.parametrize("quant", QUANTS)
def test_every_input_alone_gets_its_gradient(only: str, quant: str) -> None:
    inputs = make_inputs(Case(1, 457, 2, 64, "2", torch.bfloat16, quant=quant), DEVICE)
    wanted = getattr(inputs, only).requires_grad_()
    out = sla2.sla2_attention(*inputs.qkv, **inputs.kwargs)
    assert isinstance(out, Tensor) and out.requires_grad
    (grad,) = torch.autograd.grad(out.float().square().sum(), wanted)
    assert grad.dtype == wanted.dtype and bool(grad.isfinite().all()) and bool(grad.any())
    if only == "alpha_logit":
        return
    with torch.no_grad():
        block_map = sla2.route(
            inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, num_kv_blocks=2
        )
    o_s = sla2.block_sparse_attention(*inputs.qkv, block_map, quant=quant)
    o_l = sla2.complement_linear_attention(*inputs.qkv, block_map)
    for branch in (o_s, o_l):
        assert isinstance(branch, Tensor)
        (grad,) = torch.autograd.grad(branch.float().square().sum(), wanted)
        assert bool(grad.isfinite().all()) and bool(grad.any())


@pytest.mark.parametrize("name", ["proj_q", "proj_k"])
def test_the_hard_map_has_no_gradient(name: str) -> None:
    """A projection that wants one is an error in hard mode, not a zero."""
    inputs = make_inputs(Case(1, 457, 2, 64, "2", torch.bfloat16), DEVICE)
    getattr(inputs, name).requires_grad_()
    with pytest.raises(RuntimeError, match="proj"):
        sla2.sla2_attention(*inputs.qkv, **inputs.kwargs)
