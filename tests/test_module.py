"""SLA2Attention: parameters and their dtype, stages, calibration, errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sla2
from sla2 import SLA2Attention, reference

H, D, N = 3, 16, 300
T_M = 3
PARAMETERS = {"proj_q_delta", "proj_k_delta", "alpha_offset"}


def make(**options: Any) -> SLA2Attention:
    return SLA2Attention(H, D, **{"seq_len": N, "topk": 0.5, **options})


def randomise(module: SLA2Attention) -> SLA2Attention:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def qkv(dtype: torch.dtype = torch.float32, layout: str = "BNHD") -> list[Tensor]:
    shape = (2, N, H, D) if layout == "BNHD" else (2, H, N, D)
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "proj", "alpha"),
    [
        ({}, (D, D), (H, T_M)),
        ({"per_head_router": True}, (H, D, D), (H, T_M)),
        ({"per_head_alpha": False}, (D, D), (T_M,)),
        ({"alpha_per_token": True}, (D, D), (H, N)),
    ],
)
def test_parameters(options: dict[str, Any], proj: tuple, alpha: tuple) -> None:
    """Zero, float32, no submodules; identity projections and alpha_init follow from zero."""
    module = make(alpha_init=0.7, **options)
    named = dict(module.named_parameters())
    assert set(named) == PARAMETERS == set(module.state_dict())
    assert not list(module.children()) and not list(module.buffers())
    assert all(p.dtype == torch.float32 and not p.any() for p in named.values())
    assert named["proj_q_delta"].shape == named["proj_k_delta"].shape == proj
    assert named["alpha_offset"].shape == alpha
    assert torch.equal(module.proj_q, torch.eye(D).expand(proj))
    torch.testing.assert_close(module.alpha_logit.sigmoid(), torch.full(alpha, 0.7))


@pytest.mark.parametrize(
    "options", [{}, {"per_head_router": True}, {"per_head_alpha": False}, {"alpha_per_token": True}]
)
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("stage", [1, 2])
def test_forward_is_the_function(options: dict[str, Any], layout: str, stage: int) -> None:
    """The learned values reach the operation, and gradients reach what the stage trains."""
    module = randomise(make(layout=layout, quant="int8_fp16", **options))
    module.set_stage(stage)
    q, k, v = qkv(layout=layout)
    out = module(q, k, v)
    learned = [x.detach().requires_grad_() for x in (module.proj_q, module.proj_k)]
    alpha = module.alpha_logit.detach().requires_grad_()
    common: dict[str, Any] = {"topk": 0.5, "layout": layout, "alpha_logit": alpha}
    if stage == 1:
        common |= {"mode": "soft", "proj_q": learned[0], "proj_k": learned[1]}
    else:
        common |= {
            "quant": "int8_fp16",
            "proj_q": learned[0].detach(),
            "proj_k": learned[1].detach(),
        }
    expected = sla2.sla2_attention(q, k, v, **common)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(module.alpha_offset.grad, alpha.grad)
    for parameter, leaf in zip((module.proj_q_delta, module.proj_k_delta), learned, strict=True):
        if stage == 1:
            assert torch.equal(parameter.grad, leaf.grad) and bool(leaf.grad.any())
        else:
            assert parameter.grad is None


def test_options_reach_the_function() -> None:
    q, k, v = qkv()
    options: dict[str, Any] = {
        "tau": 0.7, "router_score": "raw", "smooth_k": False, "phi_input": "raw", "topk": 0.3,
    }  # fmt: skip
    module = randomise(make(**options))
    module.set_stage(1)
    learned = {"proj_q": module.proj_q, "proj_k": module.proj_k, "alpha_logit": module.alpha_logit}
    expected = sla2.sla2_attention(q, k, v, mode="soft", **learned, **options)
    assert torch.equal(module(q, k, v), expected)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.type(torch.bfloat16),
    ],
    ids=["to", "half", "bfloat16", "double", "device and dtype", "type"],
)
def test_stays_float32(cast: Any) -> None:
    """As a part of a model that is cast, to the last bit, gradients included."""
    attention = randomise(make())
    model = nn.Sequential(nn.Linear(4, 4), attention)
    before = copy.deepcopy(attention.state_dict())
    attention(*qkv()).sum().backward()
    grad = attention.alpha_offset.grad.clone()
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert same_bits(attention.state_dict(), before)
    assert all(p.dtype == torch.float32 for p in attention.parameters())
    assert attention.alpha_offset.grad.dtype == torch.float32
    assert torch.equal(attention.alpha_offset.grad, grad)
    assert attention(*qkv(torch.bfloat16)).dtype == torch.bfloat16


def test_moves_between_devices() -> None:
    module = make().to("meta", torch.bfloat16)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    module.to_empty(device="cpu").reset_parameters()
    assert same_bits(module.state_dict(), make().state_dict())
    assert make(device="meta").alpha_offset.device.type == "meta"


def test_half_router_is_refused() -> None:
    """Where a wrapper casts parameters behind the module's back (FSDP2), it is an error."""
    module = make()
    module.alpha_offset.data = module.alpha_offset.data.bfloat16()
    with pytest.raises(
        TypeError, match=r"alpha_logit must be torch\.float32.*MixedPrecisionPolicy"
    ):
        module(*qkv())


def test_copies_and_state_dict() -> None:
    module = randomise(make(quant="int8_fp8"))
    q, k, v = qkv()
    expected = module(q, k, v)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(q, k, v), expected) and twin.stage == module.stage
    assert twin.alpha_offset.data_ptr() != module.alpha_offset.data_ptr()
    loaded = make(quant="int8_fp8")
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(q, k, v), expected)
    with pytest.raises(RuntimeError, match="size mismatch for alpha_offset"):
        make(seq_len=1000).load_state_dict(module.state_dict())


# ---- stages -------------------------------------------------------------------------------------


def test_stages() -> None:
    module = make(quant="int8_fp8")
    assert module.stage == 2
    trains = {1: PARAMETERS, 2: {"alpha_offset"}}
    for stage in (2, 1, 2):
        module.set_stage(stage)
        names = {name for name, p in module.named_parameters() if p.requires_grad}
        assert names == trains[stage] and f"stage={stage}" in repr(module)
    module.requires_grad_(True)  # as a training script does to the whole model
    module(*qkv()).sum().backward()
    assert module.proj_q_delta.grad is None and module.alpha_offset.grad is not None
    for stage in (0, 3, "1"):
        with pytest.raises(ValueError, match=r"is not 1 \(soft router\) or 2 \(hard router\)"):
            module.set_stage(stage)  # type: ignore[arg-type]


def test_stage_one_learns_the_router() -> None:
    """A few steps on MSE(full attention, SLA2) lower the loss, as stage 1 of the paper does."""
    module = make(topk=0.4)
    module.set_stage(1)
    q, k, v = qkv()
    full = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-2)
    losses = []
    for _ in range(8):
        loss = (module(q, k, v) - full.transpose(1, 2)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(bool(p.grad.any()) for p in module.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---- calibration --------------------------------------------------------------------------------


def selected_mass(module: SLA2Attention, q: Tensor, k: Tensor) -> Tensor:
    """Equation 7 as it stands: the softmax over all keys, summed over the selected ones. (H, N)"""
    learned = {"proj_q": module.proj_q, "proj_k": module.proj_k}
    mask = reference.route(q, k, topk=module.topk, **learned)
    tokens = mask.repeat_interleave(128, 2)[:, :, :N].repeat_interleave(64, 3)[..., :N]
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(D)
    return (s.softmax(-1) * tokens).sum(-1).mean(0)


@pytest.mark.parametrize(
    "options", [{}, {"per_head_alpha": False}, {"alpha_per_token": True}, {"layout": "BHND"}]
)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_calibrate_alpha(
    options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sla2.module._CALIBRATION_ELEMENTS", chunk)
    module = randomise(make(**options))
    q, k, _ = qkv()
    expected = selected_mass(module, q, k)
    if not options.get("alpha_per_token"):
        expected = torch.stack([rows.mean(1) for rows in expected.split(128, 1)], 1)
    if options.get("per_head_alpha") is False:
        expected = expected.mean(0)
    if "layout" in options:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    module.calibrate_alpha(q, k)
    torch.testing.assert_close(module.alpha_logit.detach().sigmoid(), expected.float())
    assert module.alpha_offset.requires_grad and module.alpha_offset.grad is None


def test_calibration_stays_finite() -> None:
    """With every block selected the mass is 1, whose logit is infinite."""
    module = make(topk=1.0)
    module.calibrate_alpha(*qkv()[:2])
    assert bool(module.alpha_offset.isfinite().all())
    assert module.alpha_logit.sigmoid().min() > 0.999


def test_calibration_ignores_autocast() -> None:
    q, k, _ = qkv()
    plain, cast = make(), make()
    plain.calibrate_alpha(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.calibrate_alpha(q, k)
    assert torch.equal(plain.alpha_offset, cast.alpha_offset)


# ---- errors -------------------------------------------------------------------------------------


def test_another_grid_names_the_remedies() -> None:
    q = torch.zeros(1, 1000, H, D)
    with pytest.raises(ValueError) as caught:
        make()(q, q, q)
    words = ["N=1000", "T_m=8", "(3, 3)", "seq_len=300", "T_m=3", "(1) bring the input"]
    words += ["(2) make a SLA2Attention(seq_len=...)", "calibrate_alpha", "(3)", "interpolated"]
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="seq_len=300"):
        make().calibrate_alpha(q, q)


def test_same_number_of_blocks_is_not_the_same_grid() -> None:
    q = torch.zeros(1, N + 1, H, D)
    with pytest.raises(ValueError, match="N=301 tokens"):
        make()(q, q, q)


@pytest.mark.parametrize(("heads", "dim"), [(2, D), (H, 8)])
def test_other_heads(heads: int, dim: int) -> None:
    q = torch.zeros(1, N, heads, dim)
    with pytest.raises(ValueError, match=rf"3 heads of head_dim 16; q has {heads} of {dim}"):
        make()(q, q, q)
    with pytest.raises(TypeError, match="q must be a torch.Tensor"):
        make()(None, q, q)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1; got 0"),
        ({"seq_len": 3.0}, TypeError, "seq_len must be an int; got float"),
        ({"num_heads": True}, TypeError, "num_heads must be an int"),
        ({"alpha_init": 1.0}, ValueError, r"alpha_init=1\.0 .* \(0, 1\)"),
        ({"topk": 1}, TypeError, "topk must be a float"),
        ({"topk": 2.0}, ValueError, r"topk=2\.0"),
        ({"quant": "int4"}, ValueError, "quant='int4'"),
        ({"layout": "NHD"}, ValueError, "layout='NHD'"),
        ({"tau": -1.0}, ValueError, r"tau=-1\.0"),
        ({"router_score": "x"}, ValueError, "router_score='x'"),
        ({"phi_input": "x"}, ValueError, "phi_input='x'"),
        ({"smooth_k": 1}, TypeError, "smooth_k must be True or False"),
        ({"alpha_per_token": True, "per_head_alpha": False}, ValueError, "alpha_per_token=True"),
        ({"dropout": 0.1}, TypeError, "unexpected keyword argument 'dropout'"),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"num_heads": H, "head_dim": D, "seq_len": N, **options}
    with pytest.raises(error, match=message):
        SLA2Attention(**arguments)
