"""The operators under PyTorch's machinery: opcheck, compile, autocast, checkpoint, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, make_inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import sla2
from sla2 import blockwise, ops, ops_bwd, ops_soft

D = 16


def tensors(
    *, seqlen: int = 193, batch: int = 2, heads: int = 3, dtype: torch.dtype = torch.float32,
    layout: str = "BNHD", grad: bool = False,
) -> SimpleNamespace:  # fmt: skip
    """q, k, v, proj_q, proj_k, alpha, lut and counts of a random map, where wanted with grad."""
    inputs = make_inputs(Case(batch, seqlen, heads, D, "2", dtype, layout))
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


# ---- opcheck ------------------------------------------------------------------------------------
#
# Schema, autograd registration, fake against real (shapes, strides, dtypes, aliasing), and traced
# with dynamic shapes against eager, gradients included. It fails on nondeterminism as well.


def attn_args(t: SimpleNamespace, branch: str, layout: str, save: bool) -> tuple[Any, ...]:
    alpha = t.alpha if branch == "both" else None
    quant = "int8_fp8" if branch == "sparse" else "none"
    return (
        t.q,
        t.k,
        t.v,
        t.lut,
        t.counts,
        alpha,
        0.25,
        quant,
        branch,
        True,
        "smoothed",
        layout,
        save,
    )


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_opcheck_route(dtype: torch.dtype, layout: str) -> None:
    t = tensors(dtype=dtype, layout=layout)
    args = (t.q, t.k, t.proj_q, t.proj_k, torch.tensor([1]), 2, True, layout)
    torch.library.opcheck(ops.route, args)


@pytest.mark.parametrize(
    ("branch", "dtype", "layout", "grad"),
    [
        ("both", torch.float32, "BNHD", True),
        ("both", torch.float16, "BHND", True),
        ("both", torch.bfloat16, "BNHD", False),
        ("sparse", torch.bfloat16, "BHND", True),
        ("linear", torch.float16, "BNHD", True),
    ],
)
def test_opcheck_attn_fwd(branch: str, dtype: torch.dtype, layout: str, grad: bool) -> None:
    t = tensors(dtype=dtype, layout=layout, grad=grad)
    torch.library.opcheck(ops.attn_fwd, attn_args(t, branch, layout, grad))


@pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        (torch.float16, "BNHD", {}),
        (torch.bfloat16, "BHND", {}),
        (torch.float32, "BHND", {"batch": 1, "heads": 1}),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck_route_attn_fwd(
    dtype: torch.dtype, layout: str, shape: dict[str, int], grad: bool
) -> None:
    t = tensors(dtype=dtype, layout=layout, grad=grad, **shape)
    args = (
        t.q,
        t.k,
        t.v,
        t.proj_q,
        t.proj_k,
        t.alpha,
        None,
        2,
        0.25,
        "none",
        True,
        "smoothed",
        layout,
    )
    torch.library.opcheck(ops.route_attn_fwd, (*args, grad))


@pytest.mark.parametrize("branch", ["both", "sparse", "linear"])
def test_opcheck_attn_bwd(branch: str) -> None:
    t = tensors(dtype=torch.float16)
    out, lse, out_sparse = ops.attn_fwd(*attn_args(t, branch, "BNHD", True))
    saved = out if branch == "sparse" else out_sparse
    alpha = t.alpha if branch == "both" else None
    rest = (saved, lse, t.lut, t.counts, alpha, 0.25, branch, True, "smoothed", "BNHD")
    torch.library.opcheck(ops_bwd.attn_bwd, (out, t.q, t.k, t.v, *rest))


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_opcheck_soft(layout: str) -> None:
    t = tensors(layout=layout, grad=True)
    projs = (t.proj_q.requires_grad_(), t.proj_k.requires_grad_())
    options = (0.1, "scaled", 0.25, True, "smoothed", layout)
    args = (t.q, t.k, t.v, *projs, t.alpha, torch.tensor([1]), 2, *options)
    torch.library.opcheck(ops_soft.soft_fwd, args)
    with torch.no_grad():
        out, lse, out_sparse, mask = ops_soft.soft_fwd(*args)
    saved = [x.detach() for x in (t.q, t.k, t.v, out_sparse, lse, mask, *projs, t.alpha)]
    torch.library.opcheck(ops_soft.soft_bwd, (out, *saved, *options))


def test_saves_only_what_the_backward_pass_needs() -> None:
    t = tensors()
    for branch, save, numel in (
        ("both", True, t.q.numel()),
        ("both", False, 0),
        ("sparse", True, 0),
    ):
        assert ops.attn_fwd(*attn_args(t, branch, "BNHD", save))[2].numel() == numel


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_fakes_on_cuda(layout: str) -> None:
    """Shapes, dtypes and devices on a GPU, without one."""
    shape = (2, 300, 3, 64) if layout == "BNHD" else (2, 3, 300, 64)
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        proj, alpha = torch.empty(64, 64, device="cuda"), torch.empty(3, 3, device="cuda")
        options = {"proj_q": proj, "proj_k": proj, "alpha_logit": alpha, "layout": layout}
        for mode in ("hard", "soft"):
            out, aux = sla2.sla2_attention(q, k, v, mode=mode, topk=0.5, return_aux=True, **options)
            assert out.shape == shape and out.dtype == torch.bfloat16 and out.is_contiguous()
            assert aux.lse.shape == (2, 3, 300) and aux.lse.dtype == torch.float32
            made = [out, aux.lse]
            if mode == "hard":
                assert aux.block_map.lut.shape == (2, 3, 3, 2)
                made += [aux.block_map.lut, aux.block_map.counts]
            assert {x.device.type for x in made} == {"cuda"}


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
    both = sla2.sla2_attention(
        t.q, t.k, t.v, proj_q=None, proj_k=None, alpha_logit=t.alpha, block_map=block_map
    )
    return o_s + o_l + both, lse, block_map.lut


def gradients(out: Tensor, t: SimpleNamespace) -> tuple[Tensor, ...]:
    wanted = [x for x in (t.q, t.k, t.v, t.alpha, t.proj_q, t.proj_k) if x.requires_grad]
    return torch.autograd.grad(out.square().sum(), wanted)


FUNCTIONS: dict[str, Callable[[SimpleNamespace], tuple[Tensor, ...]]] = {
    "hard": hard,
    "low bit": lambda t: hard(t, quant="int8_fp8", phi_input="raw"),
    "soft": lambda t: hard(t, mode="soft"),
    "branches": by_map,
}


# One function shows that inductor takes the operators; what it does with them is the same for all.
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
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    for a, b in zip(gradients(actual[0], t), gradients(expected[0], t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [True, None])
def test_resolutions_share_a_graph(dynamic: bool | None) -> None:
    """Four lengths, at most two compilations (one more when the first had to be generalised)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hard, fullgraph=True, dynamic=dynamic, backend=counter)
    for seqlen in (300, 705, 513, 1000):
        # 7 heads: a size that no other one equals, as dynamo takes equal sizes for the same one.
        t = tensors(seqlen=seqlen, heads=7, grad=True)
        expected, actual = hard(t), compiled(t)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(gradients(actual[0], t), gradients(expected[0], t), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def test_compiled_module() -> None:
    torch._dynamo.reset()
    module = sla2.SLA2Attention(3, D, seq_len=193, topk=0.5)
    t = tensors(grad=True)
    for stage in (1, 2):
        module.set_stage(stage)
        out = module(t.q, t.k, t.v)
        expected = torch.autograd.grad(out.sum(), (t.q, module.alpha_offset))
        again = torch.compile(module, fullgraph=True, backend="aot_eager")(t.q, t.k, t.v)
        assert torch.equal(out, again)
        actual = torch.autograd.grad(again.sum(), (t.q, module.alpha_offset))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


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
    assert torch.equal(program.module()(*args), Exported()(*args))


# ---- autocast and checkpointing -----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_v_alone(dtype: torch.dtype, mode: str) -> None:
    """The same as casting by hand; router and alpha float32, gradients in the inputs' dtype."""
    t, cast = tensors(grad=True), tensors(grad=True)
    low = SimpleNamespace(**{**vars(cast), **{n: getattr(cast, n).to(dtype) for n in "qkv"}})
    expected = hard(low, mode=mode)
    with torch.autocast("cpu", dtype=dtype):
        actual = hard(t, mode=mode)
        block_map = sla2.route(t.q, t.k, proj_q=t.proj_q, proj_k=t.proj_k, topk=0.5)
    assert actual[0].dtype == dtype
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    if mode == "hard":
        assert torch.equal(block_map.lut, actual[2])
    grads = gradients(actual[0].float(), t)
    assert all(g.dtype == torch.float32 for g in grads)
    for a, b in zip(grads, gradients(expected[0].float(), cast), strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_float64_and_compiles() -> None:
    torch._dynamo.reset()
    t = tensors(dtype=torch.float64)
    expected = hard(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hard(t)[0], expected[0])
        t = tensors(grad=True)
        expected = hard(t)
        actual = torch.compile(hard, fullgraph=True, backend="aot_eager")(t)
    assert actual[0].dtype == torch.bfloat16 and torch.equal(actual[0], expected[0])


@pytest.fixture
def forward_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = blockwise.attn_fwd

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(blockwise, "attn_fwd", counted)
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
    out = checkpoint(lambda x: hard(t)[0] * x, torch.ones(()), use_reentrant=False, **context)
    actual = gradients(out, t)
    assert len(forward_calls) == calls
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# ---- the way to the compiled module -------------------------------------------------------------


def test_kernel_path_nests_and_is_restored() -> None:
    before = ops._path.get()
    with ops.kernel_path("portable"):
        with contextlib.suppress(KeyError), ops.kernel_path("sm90"):
            assert ops._path.get() == "sm90"
            raise KeyError
        assert ops._path.get() == "portable"
    assert ops._path.get() == before


def test_only_unaligned_memory_is_copied() -> None:
    x = torch.randn(2, 30, 3, 64).half()
    used_in_place = {
        "contiguous": x,
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "fused": torch.randn(2, 30, 9, 64).half()[:, :, 3:6],
        "expanded": x[:1].expand(4, -1, -1, -1),
        "one batch of odd stride": torch.randn(30 * 192 + 1).half()[:-1].view(1, 30, 3, 64),
    }
    for name, view in used_in_place.items():
        assert ops._kernel_input(view) is view, name
    copied = {
        "address": torch.randn(x.numel() + 1).half()[1:].view(x.shape),
        "row stride": torch.randn(2, 30, 3, 65).half()[..., :64],
        "last stride": x.transpose(1, 3).contiguous().transpose(1, 3),
    }
    for name, view in copied.items():
        copy = ops._kernel_input(view)
        assert copy is not view and copy.is_contiguous() and torch.equal(copy, view), name
        assert copy.data_ptr() % 16 == 0


class Recorder:
    """Stands for `_C`: keeps the arguments of each call; only the names of the interface exist."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def attn_fwd(
        self, *, shape: Any, options: Any, q: Any, k: Any, v: Any, out: Any, out_sparse: Any,
        lse: Any, alpha: Any, router: Any, lists: Any, soft_map: Any, workspace: Any, stream: Any,
    ) -> None:  # fmt: skip
        self.calls["attn_fwd"] = {n: x for n, x in locals().items() if n != "self"}

    def attn_fwd_workspace(
        self, *, shape: Any, options: Any, routed: Any, soft: Any, max_kv_blocks: Any
    ) -> int:
        given = {"routed": routed, "soft": soft, "max_kv_blocks": max_kv_blocks}
        self.calls["attn_fwd_workspace"] = given
        return 256

    def route(
        self, *, shape: Any, path: Any, smooth_k: Any, q: Any, k: Any, router: Any, lists: Any,
        scores: Any, workspace: Any, stream: Any,
    ) -> None:  # fmt: skip
        self.calls["route"] = {n: x for n, x in locals().items() if n != "self"}

    def route_workspace(self, *, shape: Any, path: Any, max_kv_blocks: Any) -> int:
        self.calls["route_workspace"] = {"path": path, "max_kv_blocks": max_kv_blocks}
        return 512


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(ops, "_extension", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    yield recorder


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("alpha", ["head", "shared", "token"])
def test_arguments_of_attn_fwd(layout: str, alpha: str, recorder: Recorder) -> None:
    """What reaches the kernels: strides of B, N, H whatever the layout, enums, pointers."""
    case = Case(2, 300, 3, 64, "2", torch.float16, layout, "int8_fp8", "head", alpha)
    i = make_inputs(case)
    pinned = torch.tensor([1])
    lut, counts = ops._new_lists(i.q, layout, 2)
    with ops.kernel_path("portable"):
        out, lse, out_sparse = ops._attn_fwd_cuda(
            i.q, i.k, i.v, lut, counts, i.alpha_logit, (i.proj_q, i.proj_k, pinned), 0.125,
            "int8_fp8", "both", True, "raw", layout, True,
        )  # fmt: skip
    call = recorder.calls["attn_fwd"]
    strides = (300 * 192, 192, 64) if layout == "BNHD" else (300 * 192, 64, 300 * 64)
    assert call["shape"] == (2, 300, 3, 64, 1)
    assert call["options"] == (2, 0, 1, True, True, 0.125)
    for name, x in (("q", i.q), ("k", i.k), ("v", i.v), ("out", out), ("out_sparse", out_sparse)):
        assert call[name] == (x.data_ptr(), *strides)
    stride_head, per_token = {"head": (3, False), "shared": (0, False), "token": (300, True)}[alpha]
    assert call["alpha"] == (i.alpha_logit.data_ptr(), stride_head, per_token)
    assert call["router"][:3] == (i.proj_q.data_ptr(), i.proj_k.data_ptr(), 64 * 64)
    assert call["router"][3] != 0 and call["router"][4:] == (1, 2)
    assert call["lists"] == (lut.data_ptr(), counts.data_ptr(), 2)
    assert call["lse"] == lse.data_ptr() and call["stream"] == 77
    assert call["workspace"][0] != 0 and call["workspace"][1] == 256
    workspace = {"routed": True, "soft": False, "max_kv_blocks": 2}
    assert recorder.calls["attn_fwd_workspace"] == workspace and call["soft_map"] == 0


def test_arguments_with_a_soft_map(recorder: Recorder) -> None:
    """No lists, and portable kernels whatever path is forced."""
    i = make_inputs(Case(1, 300, 3, 64, "2", torch.bfloat16))
    m = torch.rand(1, 3, 3, 5)
    with ops.kernel_path("sm90"):
        ops._attn_fwd_cuda(
            i.q, i.k, i.v, None, None, i.alpha_logit, None, 0.125, "none", "both", True,
            "smoothed", "BNHD", True, m,
        )  # fmt: skip
    call = recorder.calls["attn_fwd"]
    assert call["options"] == (0, 0, 1, False, True, 0.125)
    assert call["lists"] == (0, 0, 0) and call["soft_map"] == m.data_ptr()
    workspace = {"routed": False, "soft": True, "max_kv_blocks": 0}
    assert recorder.calls["attn_fwd_workspace"] == workspace


def test_arguments_without_router_and_of_route(recorder: Recorder) -> None:
    i = make_inputs(Case(1, 300, 3, 64, "2", torch.bfloat16))
    lut, counts = ops._new_lists(i.q, "BNHD", 2)
    with ops.kernel_path("auto"):
        _, _, out_sparse = ops._attn_fwd_cuda(
            i.q, i.k, i.v, lut, counts, None, None, 0.125, "none", "linear", False, "smoothed",
            "BNHD", True,
        )  # fmt: skip
    call = recorder.calls["attn_fwd"]
    assert call["shape"] == (1, 300, 3, 64, 0)
    assert call["options"] == (0, 2, 0, False, False, 0.125)
    assert call["alpha"] is None and call["router"] is None and call["out_sparse"] is None
    assert out_sparse.numel() == 0
    with ops.kernel_path("sm90"):
        lut, counts = ops._route_cuda(i.q, i.k, i.proj_q, i.proj_k, None, 4, False, "BNHD")
    call = recorder.calls["route"]
    assert call["router"] == (i.proj_q.data_ptr(), i.proj_k.data_ptr(), 0, 0, 0, 4)
    assert call["lists"] == (lut.data_ptr(), counts.data_ptr(), 4)
    assert call["smooth_k"] is False and call["scores"] == 0 and call["workspace"][1] == 512
    assert call["path"] == 2
    assert recorder.calls["route_workspace"] == {"path": 2, "max_kv_blocks": 4}
