"""The tolerance rules accept what they should and reject seeded faults."""

from __future__ import annotations

import math

import pytest
import torch
from compare import (
    check_backward,
    check_forward,
    check_lse,
    check_quant,
    cosine,
    rel_l2,
    rounding_atol,
)
from torch import Tensor

from sla2 import reference as ref

LOW = [torch.bfloat16, torch.float16]


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict]:
    """Reference and low-precision result at ragged real block sizes, and the call's arguments."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 333, 64, generator=generator).to(dtype).float() for _ in range(3))
    block_map = torch.rand(1, 2, 3, 6, generator=generator) < 0.4
    block_map[..., 0], block_map[..., 5] = True, False
    run = {
        "q": q, "k": k, "v": v, "block_map": block_map, "layout": "BHND",
        "proj_q": None, "proj_k": None, "alpha_logit": torch.full((3,), 1.0),
    }  # fmt: skip
    return ref.sla2_attention(**run), ref.sla2_attention(**run, compute_dtype=dtype), run


@pytest.mark.parametrize("dtype", LOW)
def test_forward_rule(dtype: torch.dtype) -> None:
    exact, lowp, run = case(dtype)
    check_forward(exact.to(dtype), exact, lowp)
    check_forward(lowp.to(dtype), exact, lowp)
    check_forward(exact, exact, lowp)

    last_row = lowp.to(dtype).clone()
    last_row[0, 1, -1] += 0.1
    with pytest.raises(AssertionError, match=r"max error .* at \[0, 1, 332"):
        check_forward(last_row, exact, lowp)
    # A wrong block is listed: the error is everywhere.
    wrong = run["block_map"].roll(1, -1)
    with pytest.raises(AssertionError, match="max error"):
        check_forward(ref.sla2_attention(**{**run, "block_map": wrong}).to(dtype), exact, lowp)
    # A small error everywhere stays below the maximum's limit and is caught by the norm.
    limit = {torch.bfloat16: 1.2e-2, torch.float16: 2.4e-3}[dtype]
    noise = exact.norm() / math.sqrt(exact.numel()) * limit * torch.ones_like(exact).bernoulli_()
    noise = noise * math.sqrt(2)
    with pytest.raises(AssertionError, match="relative L2|max error"):
        check_forward((exact + noise).to(dtype), exact, lowp)
    nan = lowp.to(dtype).clone()
    nan[0, 0, 3, 5] = math.nan
    with pytest.raises(AssertionError, match="1 of"):
        check_forward(nan, exact, lowp)
    with pytest.raises(AssertionError, match="shape"):
        check_forward(lowp[:, :1], exact, lowp)
    with pytest.raises(AssertionError, match="not finite"):
        check_forward(lowp, nan.float(), lowp)


@pytest.mark.parametrize("dtype", LOW)
def test_backward_rule(dtype: torch.dtype) -> None:
    _, _, run = case(dtype)
    grads = {}
    for compute in (None, dtype):
        inputs = [run[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out = ref.sla2_attention(
            **{**run, **dict(zip("qkv", inputs, strict=True))}, compute_dtype=compute
        )
        grads[compute] = torch.autograd.grad(out.square().sum(), inputs)
    for exact, lowp in zip(grads[None], grads[dtype], strict=True):
        check_backward(lowp.to(dtype), exact, lowp)
        with pytest.raises(AssertionError, match="max error"):
            check_backward(exact * math.sqrt(64), exact, lowp)
        # A wide low-precision error hides nothing from the rule for the norm.
        with pytest.raises(AssertionError, match="relative L2"):
            check_backward(1.03 * exact, exact, 3 * exact)
        check_backward(1.015 * exact, exact, 3 * exact)


def test_lse_rule() -> None:
    lse = torch.tensor([1.0, -300.0, -math.inf])
    check_lse(lse + 5e-4, lse)
    with pytest.raises(AssertionError, match="max error"):
        check_lse(lse + 2e-3, lse)
    with pytest.raises(AssertionError, match="-inf"):
        check_lse(torch.tensor([1.0, -math.inf, -math.inf]), lse)
    with pytest.raises(AssertionError, match="finite"):
        check_lse(torch.tensor([1.0, math.nan, -math.inf]), lse)


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_quant_rule(quant: str) -> None:
    plain, _, run = case(torch.bfloat16)
    emulation = ref.sla2_attention(**run, quant=quant)
    out = emulation.bfloat16()
    check_quant(out, emulation, plain, quant=quant)
    with pytest.raises(AssertionError, match="relative L2 .* against the emulation"):
        check_quant(1.01 * emulation, emulation, plain, quant=quant)
    row = out.clone()
    row[0, 0, 0] = 0.0
    one_value = out.clone()
    one_value[0, 0, 200, 7] += 0.3
    for wrong in (row, one_value):
        with pytest.raises(AssertionError, match="against the emulation"):
            check_quant(wrong, emulation, plain, quant=quant)
    # The emulation itself can be a bad design.
    coarse = plain + 0.06 * plain.norm() / math.sqrt(plain.numel()) * torch.randn(plain.shape)
    with pytest.raises(AssertionError, match="against the unquantised"):
        check_quant(coarse, coarse, plain, quant=quant)
    check_quant(coarse, coarse, plain, quant=quant, real_data=True)
    with pytest.raises(AssertionError, match="cosine"):
        check_quant(plain.roll(1, -1), plain.roll(1, -1), plain, quant=quant, real_data=True)


def test_other_mode_of_the_quantiser_is_rejected() -> None:
    plain, _, run = case(torch.bfloat16)
    modes = {m: ref.sla2_attention(**run, quant=m) for m in ("int8_fp16", "int8_fp8")}
    for quant, other in (("int8_fp16", "int8_fp8"), ("int8_fp8", "int8_fp16")):
        with pytest.raises(AssertionError, match="against the emulation"):
            check_quant(modes[other], modes[quant], plain, quant=quant)


def test_helpers() -> None:
    a = torch.tensor([3.0, 4.0])
    assert rel_l2(a, a) == 0.0 and rel_l2(2 * a, a) == 1.0
    assert rel_l2(0 * a, 0 * a) == 0.0 and rel_l2(a, 0 * a) == math.inf
    assert cosine(a, a) == pytest.approx(1.0) and cosine(a, -a) == pytest.approx(-1.0)
    assert 0 < rounding_atol(torch.tensor([0.1]), torch.bfloat16) < 1e-2
