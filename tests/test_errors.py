"""Every refusal, by the words of its message. Without `assert`: the file runs under -O too.

The table is a list of calls, each with what its message must contain: what was given, what is
allowed and, where there is one, the remedy.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sla2
from sla2 import ops
from sla2.constants import MAX_SEQLEN

B, N, H, D = 1, 300, 2, 16


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that is right, but for `changes`."""
    x = torch.zeros(B, N, H, D)
    right: dict[str, Any] = {"q": x, "k": x, "v": x, "alpha_logit": torch.zeros(H, 3)}
    right |= {"proj_q": torch.eye(D), "proj_k": torch.eye(D), "topk": 0.5}
    return {**right, **changes}


def call(**changes: Any) -> Any:
    return sla2.sla2_attention(**arguments(**changes))


def make_map(seqlen: int = N, batch: int = B) -> sla2.BlockMap:
    t_m, t_n = -(-seqlen // 128), -(-seqlen // 64)
    return sla2.BlockMap.from_dense(torch.ones(batch, H, t_m, t_n, dtype=torch.bool), seqlen)


def on_fake_cuda(dtype: torch.dtype, dim: int) -> Any:
    with FakeTensorMode():
        x = torch.empty(B, N, H, dim, dtype=dtype, device="cuda")
        return call(q=x, k=x, v=x)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


X = zeros(B, N, H, D)
NARROW = zeros(B, N, H, 2 * D)[..., ::2]
LONG = zeros(1, MAX_SEQLEN + 1, 1, 1, device="meta")
REQUIRES_GRAD = torch.eye(D).requires_grad_()

# (name, call, exception, words that the message holds)
ROWS: list[tuple[str, Callable[[], Any], type[Exception], list[str]]] = [
    # q, k, v
    ("not a tensor", lambda: call(q=[1.0]), TypeError, ["q must be a torch.Tensor", "list"]),
    ("dimensions", lambda: call(q=X[0]), ValueError, ["(B, N, H, D)", "(300, 2, 16)"]),
    (
        "cross-attention",
        lambda: call(k=zeros(B, 77, H, D), v=zeros(B, 77, H, D)),
        ValueError,
        ["(1, 300, 2, 16)", "(1, 77, 2, 16)", "use dense attention for cross-attention"],
    ),
    (
        "grouped-query attention",
        lambda: call(k=zeros(B, N, 1, D)),
        ValueError,
        ["q (1, 300, 2, 16)", "k (1, 300, 1, 16)", "repeat the heads"],
    ),
    ("v shape", lambda: call(v=zeros(B, N, H, 8)), ValueError, ["v (1, 300, 2, 8)"]),
    ("dtypes", lambda: call(k=X.half()), TypeError, ["q torch.float32", "k torch.float16"]),
    ("integer q", lambda: call(q=X.int(), k=X.int(), v=X.int()), TypeError, ["int32", "bfloat16"]),
    ("devices", lambda: call(v=X.to("meta")), ValueError, ["q on cpu", "v on meta"]),
    ("last stride", lambda: call(k=NARROW), ValueError, ["k", "stride 1", "2)", "contiguous()"]),
    (
        "tokens",
        lambda: call(q=LONG, k=LONG, v=LONG),
        ValueError,
        [f"N={MAX_SEQLEN + 1}", f"{MAX_SEQLEN}"],
    ),
    ("head_dim 0", lambda: call(**dict.fromkeys("qkv", X[..., :0])), ValueError, ["at least 1"]),
    (
        "float32 on CUDA",
        lambda: on_fake_cuda(torch.float32, 64),
        TypeError,
        ["torch.float32", "torch.bfloat16 or torch.float16", "autocast"],
    ),
    (
        "head_dim on CUDA",
        lambda: on_fake_cuda(torch.float16, 96),
        ValueError,
        ["head_dim=96", "64 and 128", "use dense attention"],
    ),
    ("layout", lambda: call(layout="HND"), ValueError, ["'HND'", "'BNHD', 'BHND'"]),
    # what SLA2 has not
    ("attn_mask", lambda: call(attn_mask=None), TypeError, ["unexpected", "'attn_mask'"]),
    ("dropout_p", lambda: call(dropout_p=0.0), TypeError, ["unexpected", "'dropout_p'"]),
    ("is_causal", lambda: call(is_causal=True), TypeError, ["unexpected", "'is_causal'"]),
    ("unknown option", lambda: call(foo=1), TypeError, ["unexpected", "'foo'"]),
    (
        "positional option",
        lambda: sla2.sla2_attention(X, X, X, REQUIRES_GRAD),
        TypeError,
        ["positional"],
    ),
    # how many blocks
    ("topk int", lambda: call(topk=1), TypeError, ["got 1", "int", "num_kv_blocks", "T_n=5"]),
    ("topk bool", lambda: call(topk=True), TypeError, ["got True", "num_kv_blocks"]),
    ("topk 0", lambda: call(topk=0.0), ValueError, ["topk=0.0", "(0, 1]", "T_n=5"]),
    ("topk > 1", lambda: call(topk=1.5), ValueError, ["topk=1.5", "num_kv_blocks", "T_n=5"]),
    ("topk nan", lambda: call(topk=float("nan")), ValueError, ["topk=nan"]),
    ("count 0", lambda: call(num_kv_blocks=0), ValueError, ["num_kv_blocks=0", "1..5", "topk"]),
    ("count > T_n", lambda: call(num_kv_blocks=6), ValueError, ["num_kv_blocks=6", "T_n=5"]),
    ("count float", lambda: call(num_kv_blocks=2.0), TypeError, ["2.0", "use topk"]),
    ("count bool", lambda: call(num_kv_blocks=True), TypeError, ["True", "use topk"]),
    # alpha and the router
    (
        "alpha length",
        lambda: call(alpha_logit=zeros(H, 4)),
        ValueError,
        ["(2, 4)", "N=300", "(2, 3)", "(2, 300)", "(1)", "(2)", "(3)", "calibrate", "interpolate"],
    ),
    ("alpha heads", lambda: call(alpha_logit=zeros(3, 3)), ValueError, ["(3, 3)", "(2, 3)"]),
    ("alpha 0-D", lambda: call(alpha_logit=zeros(())), ValueError, ["()", "(T_m,) = (3,)"]),
    (
        "alpha dtype",
        lambda: call(alpha_logit=zeros(H, 3, dtype=torch.bfloat16)),
        TypeError,
        ["alpha_logit", "torch.float32", "bfloat16", "MixedPrecisionPolicy"],
    ),
    ("alpha None", lambda: call(alpha_logit=None), TypeError, ["alpha_logit", "NoneType"]),
    ("alpha device", lambda: call(alpha_logit=zeros(3, device="meta")), ValueError, ["meta"]),
    (
        "proj shape",
        lambda: call(proj_q=zeros(D, 8)),
        ValueError,
        ["proj_q", "(16, 16)", "(2, 16, 16)", "(16, 8)"],
    ),
    ("proj heads", lambda: call(proj_k=zeros(3, D, D)), ValueError, ["proj_k", "(3, 16, 16)"]),
    ("proj mixed", lambda: call(proj_k=zeros(H, D, D)), ValueError, ["(16, 16)", "(2, 16, 16)"]),
    ("proj dtype", lambda: call(proj_q=torch.eye(D).half()), TypeError, ["proj_q", "float16"]),
    ("proj float64", lambda: call(proj_q=torch.eye(D).double()), TypeError, ["float64"]),
    ("proj None", lambda: call(proj_q=None), TypeError, ["proj_q", "block_map"]),
    (
        "hard router gradient",
        lambda: call(proj_q=REQUIRES_GRAD),
        RuntimeError,
        ["proj_q requires grad", "mode='soft'", "detach"],
    ),
    # options
    ("scale type", lambda: call(scale="1"), TypeError, ["scale", "str"]),
    ("scale inf", lambda: call(scale=float("inf")), ValueError, ["scale=inf", "positive"]),
    ("scale 0", lambda: call(scale=0.0), ValueError, ["scale=0.0", "positive"]),
    ("tau", lambda: call(tau=0.0), ValueError, ["tau=0.0", "positive"]),
    ("tau type", lambda: call(tau=None), TypeError, ["tau", "NoneType"]),
    ("quant", lambda: call(quant="fp4"), ValueError, ["'fp4'", "'int8_fp16', 'int8_fp8'"]),
    ("mode", lambda: call(mode="train"), ValueError, ["'train'", "'hard', 'soft'"]),
    (
        "score",
        lambda: call(router_score="cos"),
        ValueError,
        ["'cos'", "'scaled', 'raw', 'softmax'"],
    ),
    ("phi", lambda: call(phi_input="k"), ValueError, ["'k'", "'smoothed', 'raw'"]),
    ("smooth_k", lambda: call(smooth_k="no"), TypeError, ["smooth_k", "'no'"]),
    ("return_aux", lambda: call(return_aux=1), TypeError, ["return_aux", "1"]),
    (
        "soft low bit",
        lambda: call(mode="soft", quant="int8_fp8"),
        ValueError,
        ["mode='soft'", "quant='none'", "'int8_fp8'"],
    ),
    # pinned_kv
    ("pinned list", lambda: call(pinned_kv=[0]), TypeError, ["pinned_kv", "list"]),
    ("pinned float", lambda: call(pinned_kv=zeros(1)), TypeError, ["integer", "float32"]),
    ("pinned 2-D", lambda: call(pinned_kv=zeros(1, 1).int()), ValueError, ["(P,)", "(1, 1)"]),
    (
        "pinned too many",
        lambda: call(pinned_kv=torch.arange(3), num_kv_blocks=2),
        ValueError,
        ["3 key blocks", "only 2", "num_kv_blocks"],
    ),
    (
        "pinned range",
        lambda: call(pinned_kv=torch.tensor([5])),
        ValueError,
        ["to 5", "0..4", "N=300"],
    ),
    (
        "pinned negative",
        lambda: call(pinned_kv=torch.tensor([-1]), mode="soft"),
        ValueError,
        ["from -1", "0..4"],
    ),
    (
        "pinned device",
        lambda: call(pinned_kv=zeros(1, device="meta").int()),
        ValueError,
        ["pinned_kv", "cpu", "meta"],
    ),
    # block_map
    (
        "map type",
        lambda: call(block_map=torch.ones(1, 2, 3, 5, dtype=torch.bool)),
        TypeError,
        ["sla2.BlockMap", "Tensor", "from_dense"],
    ),
    (
        "map of another length",
        lambda: call(block_map=make_map(310)),
        ValueError,
        ["seqlen=310", "N=300"],
    ),
    (
        "map batch",
        lambda: call(block_map=make_map(batch=2)),
        ValueError,
        ["(2, 2, 3)", "(1, 2, 3)"],
    ),
    ("map device", lambda: call(block_map=make_map().to("meta")), ValueError, ["to('cpu')"]),
    (
        "map and count",
        lambda: call(block_map=make_map(), num_kv_blocks=1),
        ValueError,
        ["num_kv_blocks and pinned_kv must be None", "sla2.route"],
    ),
    (
        "map in soft mode",
        lambda: call(block_map=make_map(), mode="soft"),
        ValueError,
        ["mode='hard'", "mode='soft'"],
    ),
    # the other functions
    (
        "route topk",
        lambda: sla2.route(X, X, proj_q=torch.eye(D), proj_k=torch.eye(D), topk=1),
        TypeError,
        ["num_kv_blocks"],
    ),
    ("route k", lambda: sla2.route(X, X[:, :9], proj_q=X, proj_k=X), ValueError, ["(1, 9, 2, 16)"]),
    ("sparse map", lambda: sla2.block_sparse_attention(X, X, X, None), TypeError, ["NoneType"]),
    (
        "sparse quant",
        lambda: sla2.block_sparse_attention(X, X, X, make_map(), quant="int4"),
        ValueError,
        ["'int4'"],
    ),
    (
        "linear phi",
        lambda: sla2.complement_linear_attention(X, X, X, make_map(), phi_input="relu"),
        ValueError,
        ["'relu'"],
    ),
    (
        "linear scale",
        lambda: sla2.complement_linear_attention(X, X, X, make_map(), scale=1.0),
        TypeError,
        ["'scale'"],
    ),
    (
        "kernel path",
        lambda: ops.kernel_path("cpu").__enter__(),
        ValueError,
        ["'cpu'", "'portable'"],
    ),
]


@pytest.mark.parametrize(
    ("case", "error", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_message(case: Callable[[], Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        case()
    if type(caught.value) is not error:
        pytest.fail(f"{type(caught.value).__name__} instead of {error.__name__}: {caught.value}")
    absent = [word for word in words if word not in str(caught.value)]
    if absent:
        pytest.fail(f"{absent} not in the message: {caught.value}")


def test_the_call_itself_is_right() -> None:
    """What the table's calls change is all that is wrong with them."""
    if call().shape != X.shape or call(proj_q=REQUIRES_GRAD, mode="soft").shape != X.shape:
        pytest.fail("shape")
    with torch.no_grad():
        call(proj_q=REQUIRES_GRAD)


def test_second_order_gradient() -> None:
    for mode in ("hard", "soft"):
        q = torch.randn(B, N, H, D, requires_grad=True)
        out = call(q=q, mode=mode)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order gradients"):
            grad.sum().backward()


def test_backward_without_saving() -> None:
    """Somebody who calls the operator is told; the functions save whenever a gradient is wanted."""
    q = X.clone().requires_grad_()
    lists = make_map()
    out, *_ = ops.attn_fwd(
        q, X, X, lists.lut, lists.counts, zeros(3), 0.25, "none", "both", True, "smoothed", "BNHD",
        False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="save_for_backward=False"):
        out.sum().backward()


def test_missing_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sla2._C", None)
    monkeypatch.delattr(sla2, "_C", raising=False)
    ops._extension.cache_clear()
    with pytest.raises(RuntimeError, match=r"compiled part of sla2 is not usable.*why_not"):
        ops._extension()


def test_no_kernel_for_the_device() -> None:
    fake = torch.empty(B, N, H, D, device="meta")
    with pytest.raises(RuntimeError, match="no implementation for meta; allowed: cpu, cuda"):
        ops.check_device(fake)


def test_unknown_path_variable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sla2.ops"],
        env={**os.environ, "SLA2_PATH": "fastest"},
        capture_output=True,
        text=True,
        check=False,
    )
    named = re.search("SLA2_PATH='fastest'.*'auto', 'portable'", done.stderr)
    if done.returncode == 0 or named is None:
        pytest.fail(done.stderr)


@pytest.mark.skipif(sys.flags.optimize > 0, reason="this is the run under -O")
def test_errors_without_assertions() -> None:
    """`python -O` removes assert statements; no check may be one."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or f"{len(ROWS) + 6} passed, 1 skipped" not in done.stdout:
        pytest.fail(done.stdout + done.stderr)
