"""The operators on the device under PyTorch's machinery (T14): opcheck, compile, autocast."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import KERNEL_DTYPES, Case, make_inputs
from gpu_tools import DEVICE, GPU, same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import sla2
from sla2 import blockwise, ops, ops_bwd, ops_soft

pytestmark = GPU

D = 64
SCALE = D**-0.5


def tensors(
    *, seqlen: int = 193, heads: int = 3, dtype: torch.dtype = torch.bfloat16,
    layout: str = "BNHD", grad: bool = False, seed: int = 0,
) -> SimpleNamespace:  # fmt: skip
    """q, k, v, proj_q, proj_k, alpha, lut and counts of a map, where wanted with grad."""
    inputs = make_inputs(Case(2, seqlen, heads, D, "2", dtype, layout), DEVICE, seed=seed)
    block_map = sla2.route(
        inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, num_kv_blocks=2,
        layout=layout,
    )  # fmt: skip
    q, k, v, alpha = (
        x.detach().clone().requires_grad_(grad) for x in (*inputs.qkv, inputs.alpha_logit)
    )
    return SimpleNamespace(
        q=q, k=k, v=v, alpha=alpha, proj_q=inputs.proj_q, proj_k=inputs.proj_k,
        lut=block_map.lut, counts=block_map.counts,
    )  # fmt: skip


def all_same(a: Any, b: Any) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


# ---- opcheck ------------------------------------------------------------------------------------


def attn_args(
    t: SimpleNamespace, branch: str, layout: str, save: bool, quant: str = "none"
) -> tuple[Any, ...]:
    alpha = t.alpha if branch == "both" else None
    return (
        t.q, t.k, t.v, t.lut, t.counts, alpha, SCALE, quant, branch, True, "smoothed", layout, save,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_opcheck_route(dtype: torch.dtype, layout: str) -> None:
    t = tensors(dtype=dtype, layout=layout)
    pinned = torch.tensor([1], device=DEVICE)
    torch.library.opcheck(ops.route, (t.q, t.k, t.proj_q, t.proj_k, pinned, 2, True, layout))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("branch", "layout", "quant"),
    [
        ("both", "BNHD", "none"),
        ("both", "BHND", "int8_fp8"),
        ("sparse", "BHND", "int8_fp16"),
        ("linear", "BNHD", "none"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_attn_fwd(
    dtype: torch.dtype, branch: str, layout: str, quant: str, grad: bool
) -> None:
    t = tensors(dtype=dtype, layout=layout, grad=grad)
    torch.library.opcheck(ops.attn_fwd, attn_args(t, branch, layout, grad, quant))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "quant"), [("BNHD", "int8_fp8"), ("BHND", "none")])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_route_attn_fwd(dtype: torch.dtype, layout: str, quant: str, grad: bool) -> None:
    t = tensors(dtype=dtype, layout=layout, grad=grad)
    args = (t.q, t.k, t.v, t.proj_q, t.proj_k, t.alpha, None, 2, SCALE, quant, True, "smoothed")
    torch.library.opcheck(ops.route_attn_fwd, (*args, layout, grad))


@pytest.mark.parametrize("branch", ["both", "sparse", "linear"])
def test_opcheck_attn_bwd(branch: str) -> None:
    t = tensors(dtype=torch.float16)
    out, lse, out_sparse = ops.attn_fwd(*attn_args(t, branch, "BNHD", True))
    saved = out if branch == "sparse" else out_sparse
    alpha = t.alpha if branch == "both" else None
    rest = (saved, lse, t.lut, t.counts, alpha, SCALE, branch, True, "smoothed", "BNHD")
    torch.library.opcheck(ops_bwd.attn_bwd, (out, t.q, t.k, t.v, *rest))


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_opcheck_soft(layout: str) -> None:
    t = tensors(layout=layout, grad=True)
    projs = (t.proj_q.requires_grad_(), t.proj_k.requires_grad_())
    options = (0.1, "scaled", SCALE, True, "smoothed", layout)
    pinned = torch.tensor([1], device=DEVICE)
    args = (t.q, t.k, t.v, *projs, t.alpha, pinned, 2, *options)
    torch.library.opcheck(ops_soft.soft_fwd, args)
    with torch.no_grad():
        out, lse, out_sparse, mask = ops_soft.soft_fwd(*args)
    saved = [x.detach() for x in (t.q, t.k, t.v, out_sparse, lse, mask, *projs, t.alpha)]
    torch.library.opcheck(ops_soft.soft_bwd, (out, *saved, *options))


# ---- torch.compile ------------------------------------------------------------------------------


def hard(t: SimpleNamespace, **options: Any) -> tuple[Tensor, ...]:
    out, aux = sla2.sla2_attention(
        t.q, t.k, t.v, proj_q=t.proj_q, proj_k=t.proj_k, alpha_logit=t.alpha, topk=0.5,
        return_aux=True, **options,
    )  # fmt: skip
    selected = aux.block_map if isinstance(aux.block_map, Tensor) else aux.block_map.lut
    return out, aux.lse, selected


def by_map(t: SimpleNamespace) -> tuple[Tensor, ...]:
    block_map = sla2.route(t.q, t.k, proj_q=t.proj_q, proj_k=t.proj_k, topk=0.5)
    o_s, lse = sla2.block_sparse_attention(t.q, t.k, t.v, block_map, return_lse=True)
    o_l = sla2.complement_linear_attention(t.q, t.k, t.v, block_map)
    both: Any = sla2.sla2_attention(
        t.q, t.k, t.v, proj_q=None, proj_k=None, alpha_logit=t.alpha, block_map=block_map
    )
    return torch.cat([o_s, o_l, both]), lse, block_map.lut


def gradients(out: Tensor, t: SimpleNamespace) -> tuple[Tensor, ...]:
    wanted = [x for x in (t.q, t.k, t.v, t.alpha, t.proj_q, t.proj_k) if x.requires_grad]
    return torch.autograd.grad(out.float().square().sum(), wanted)


FUNCTIONS: dict[str, Callable[[SimpleNamespace], tuple[Tensor, ...]]] = {
    "hard": hard,
    "low bit": lambda t: hard(t, quant="int8_fp8", phi_input="raw"),
    "soft": lambda t: hard(t, mode="soft"),
    "branches": by_map,
}


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in FUNCTIONS), ("hard", "inductor")]
)
def test_compiled_is_eager(name: str, backend: str) -> None:
    """fullgraph, forward and backward, to the last bit."""
    torch._dynamo.reset()
    t = tensors(grad=True)
    if name == "soft":
        t.proj_q.requires_grad_()
        t.proj_k.requires_grad_()
    function = FUNCTIONS[name]
    expected = function(t)
    actual = torch.compile(function, fullgraph=True, backend=backend)(t)
    assert all_same(actual, expected)
    assert [x.stride() for x in actual] == [x.stride() for x in expected]
    assert all_same(gradients(actual[0], t), gradients(expected[0], t))


@pytest.mark.parametrize("dynamic", [True, None])
def test_resolutions_share_a_graph(dynamic: bool | None) -> None:
    """Four lengths, at most two compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hard, fullgraph=True, dynamic=dynamic, backend=counter)
    for seqlen in (300, 705, 513, 1000):
        # 7 heads: a size that no other one equals, as dynamo takes equal sizes for the same one.
        t = tensors(seqlen=seqlen, heads=7, grad=True)
        expected, actual = hard(t), compiled(t)
        assert all_same(actual, expected)
        assert all_same(gradients(actual[0], t), gradients(expected[0], t))
    assert counter.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["none", "int8_fp8"])
def test_reduce_overhead(quant: str) -> None:
    """Inductor with CUDA graphs, among operations of its own, on inputs that change."""
    torch._dynamo.reset()
    counters.clear()

    def block(
        q: Tensor, k: Tensor, v: Tensor, proj: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = sla2.sla2_attention(
            q, k, v, proj_q=proj, proj_k=proj, alpha_logit=alpha, topk=0.5, quant=quant
        )
        assert isinstance(out, Tensor)
        return out, out.float() * 2.0

    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(6):
            t = tensors(seqlen=705, seed=seed)
            args = (t.q, t.k, t.v, t.proj_q, t.alpha)
            torch.compiler.cudagraph_mark_step_begin()
            actual = [x.clone() for x in compiled(*args)]
            assert all_same(actual, block(*args)), f"inputs {seed}"
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_compiled_module() -> None:
    torch._dynamo.reset()
    module = sla2.SLA2Attention(3, D, seq_len=193, topk=0.5).to(DEVICE)
    t = tensors(grad=True)
    for stage in (1, 2):
        module.set_stage(stage)
        out = module(t.q, t.k, t.v)
        again = torch.compile(module, fullgraph=True, backend="aot_eager")(t.q, t.k, t.v)
        assert same_bits(out, again)
        wanted = (t.q, module.alpha_offset)
        expected, actual = (
            torch.autograd.grad(x.float().square().sum(), wanted) for x in (out, again)
        )
        assert all_same(actual, expected)


class Exported(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, proj: Tensor, alpha: Tensor) -> Tensor:
        out = sla2.sla2_attention(q, k, v, proj_q=proj, proj_k=proj, alpha_logit=alpha, topk=0.5)
        assert isinstance(out, Tensor)
        return out


def test_export() -> None:
    t = tensors()
    args = (t.q, t.k, t.v, t.proj_q, t.alpha)
    program = torch.export.export(Exported(), args)
    assert any(n.target is torch.ops.sla2.route_attn_fwd.default for n in program.graph.nodes)
    assert same_bits(program.module()(*args), Exported()(*args))


# ---- autocast and checkpointing -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(dtype: torch.dtype, mode: str, compiled: bool) -> None:
    """float32 q, k, v, which the device takes under autocast alone: as if cast by hand; gradients
    in the inputs' dtype."""
    torch._dynamo.reset()
    t, cast = (tensors(grad=True) for _ in range(2))
    for x in (t, cast):
        x.q, x.k, x.v = (y.detach().float().requires_grad_() for y in (x.q, x.k, x.v))
    low = SimpleNamespace(**{**vars(cast), **{n: getattr(cast, n).to(dtype) for n in "qkv"}})
    expected = hard(low, mode=mode)

    def function(t: SimpleNamespace) -> tuple[Tensor, ...]:
        return hard(t, mode=mode)

    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE.type, dtype=dtype):
        actual = function(t)
    assert actual[0].dtype == dtype and all_same(actual, expected)
    grads = gradients(actual[0], t)
    assert all(g.dtype == torch.float32 for g in grads)
    assert all_same(grads, gradients(expected[0], cast))


@pytest.fixture
def forward_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    owner: Any = ops if DEVICE.type == "cuda" else blockwise
    name = "_attn_fwd_cuda" if DEVICE.type == "cuda" else "attn_fwd"
    real = getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def save_attention() -> tuple[Any, Any]:
    def policy(ctx: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        kept = op == torch.ops.sla2.route_attn_fwd.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize(("selective", "calls"), [(False, 2), (True, 1)])
def test_checkpoint(selective: bool, calls: int, forward_calls: list[int]) -> None:
    """Recomputed or, by policy, saved: the gradient is the same to the last bit."""
    t = tensors(grad=True)
    expected = gradients(hard(t)[0], t)
    forward_calls.clear()
    context: dict[str, Any] = {"context_fn": save_attention} if selective else {}
    one = torch.ones((), device=DEVICE)
    out = checkpoint(lambda x: hard(t)[0] * x, one, use_reentrant=False, **context)
    actual = gradients(out, t)
    assert len(forward_calls) == calls
    assert all_same(actual, expected)
