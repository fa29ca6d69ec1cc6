"""Forward-mode derivatives: an error where there are none, never a tangent of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import sla2
from sla2 import rotary

B, N, H, D = 1, 200, 2, 16
INPUTS = {name: torch.randn(B, N, H, D) for name in "qkv"} | {
    "alpha_logit": torch.zeros(H, 2), "proj_q": torch.eye(D), "proj_k": torch.eye(D),
}  # fmt: skip
BLOCK_MAP = sla2.BlockMap.from_dense(torch.ones(B, H, 2, 4).tril(1).bool(), N)


def hard(**inputs: Any) -> Any:
    return sla2.sla2_attention(**inputs, topk=0.5)


def soft(**inputs: Any) -> Any:
    return sla2.sla2_attention(**inputs, topk=0.5, mode="soft")


def over_a_map(q: Tensor, k: Tensor, v: Tensor, alpha_logit: Tensor) -> Any:
    return sla2.sla2_attention(
        q, k, v, proj_q=None, proj_k=None, alpha_logit=alpha_logit, block_map=BLOCK_MAP
    )


def route(q: Tensor, k: Tensor, proj_q: Tensor, proj_k: Tensor) -> Tensor:
    return sla2.route(q, k, proj_q=proj_q, proj_k=proj_k, topk=0.5).to_dense()


def sparse(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return sla2.block_sparse_attention(q, k, v, BLOCK_MAP)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sla2.complement_linear_attention(q, k, v, BLOCK_MAP)


def module(stage: int) -> sla2.SLA2Attention:
    layer = sla2.SLA2Attention(H, D, seq_len=N, topk=0.5)
    layer.set_stage(stage)
    return layer.requires_grad_(False)


# Name -> function and its tensors.
PARTS: dict[str, tuple[Callable[..., Any], str]] = {
    "hard": (hard, "q k v proj_q proj_k alpha_logit"),
    "soft": (soft, "q k v proj_q proj_k alpha_logit"),
    "over_a_map": (over_a_map, "q k v alpha_logit"),
    "route": (route, "q k proj_q proj_k"),
    "sparse": (sparse, "q k v"),
    "linear": (linear, "q k v"),
    "stage_1": (module(1), "q k v"),
    "stage_2": (module(2), "q k v"),
}
CASES = [(part, name) for part, (_, names) in PARTS.items() for name in names.split()]


def function_of(part: str, name: str) -> Callable[[Tensor], Any]:
    """The function of its tensor `name`, the others as they are."""
    function, names = PARTS[part]
    inputs = {key: INPUTS[key] for key in names.split()}
    return lambda x: function(**inputs | {name: x})


def by_dual_level(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def by_jvp(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


WAYS = pytest.mark.parametrize("derivative", [by_dual_level, by_jvp])


@WAYS
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("part", "name"), CASES)
def test_error(part: str, name: str, requires_grad: bool, derivative: Callable[..., Any]) -> None:
    x = INPUTS[name].clone().requires_grad_(requires_grad)
    words = f"forward-mode derivatives of SLA2 attention are not implemented.*: {name} has"
    with pytest.raises(RuntimeError, match=words):
        derivative(function_of(part, name), x)


@WAYS
def test_what_has_no_tangent_is_no_matter(derivative: Callable[..., Any]) -> None:
    """A tangent elsewhere in the model, or one that detach() took off."""
    q, k, v = (INPUTS[name] for name in "qkv")
    expected = sparse(q, k, v)
    got = derivative(lambda x: x * sparse(q, k, v), torch.ones(()))
    assert torch.equal(got, expected)
    assert torch.equal(derivative(lambda x: x + sparse(x.detach(), k, v), q), torch.ones_like(q))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("part", ["hard", "soft", "sparse", "linear"])
def test_compiled(part: str, backend: str) -> None:
    """The check is no graph break, and holds for graphs made without a dual level too."""
    torch._dynamo.reset()
    q, function = INPUTS["q"], function_of(part, "q")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = function(q)
    assert torch.equal(compiled(q), expected)
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        by_dual_level(compiled, q)
    with pytest.raises(RuntimeError, match="forward-mode derivatives"):
        torch.compile(by_jvp, fullgraph=True, backend=backend)(function, q)
    assert torch.equal(compiled(q), expected)


# ---- rotary embedding ---------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("place", range(3))
def test_rotary_embedding(place: int, derivative: Callable[..., Any]) -> None:
    """It is linear in x and in the angles' cosines and sines: PyTorch's operations know."""
    x, cos, sin = (torch.randn(1, 5, 2, 64, dtype=torch.float64) for _ in range(3))
    values = [x, cos, sin]

    def turned(y: Tensor) -> Tensor:
        return rotary.rotate_pairs(*values[:place], y, *values[place + 1 :])

    expected = turned(torch.ones_like(x)) - turned(torch.zeros_like(x))
    torch.testing.assert_close(derivative(turned, values[place]), expected)


@pytest.mark.parametrize("place", range(3))
def test_the_rotary_kernel_takes_no_tangent(place: int) -> None:
    """Its operator would lose it."""
    with FakeTensorMode(), forward_ad.dual_level():
        x = torch.empty(1, 5, 2, 64, dtype=torch.bfloat16, device="cuda")
        values = [x, x.float(), x.float()]
        assert rotary._kernel_takes(*values)
        values[place] = forward_ad.make_dual(values[place], values[place])
        assert not rotary._kernel_takes(*values)
