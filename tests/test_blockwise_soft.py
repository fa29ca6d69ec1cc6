"""sla2.blockwise: the soft mask of stage 1, and what every function promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blockwise_cases import (
    BRANCHES,
    assert_close,
    autograd,
    blocks_of,
    generator,
    make_alpha,
    make_mask,
    make_qkv,
    to_lists,
)
from compare import check_forward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sla2 import blockwise, reference
from sla2.blockwise import layout
from sla2.constants import BLOCK_K, BLOCK_Q

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
