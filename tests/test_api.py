"""The functions: against the specification, over shapes, options, strides; signatures, import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CPU_DTYPES, SMALL_SEQLENS, Case, Inputs, make_inputs, sweep
from compare import EMULATION_REL_L2, check_forward, check_lse, rel_l2
from torch import Tensor

import sla2
from sla2 import reference

F64 = torch.float64
SMALL = Case(2, 300, 3, 16, "2", F64)


def run(module: Any, inputs: Inputs, **options: Any) -> Any:
    return module.sla2_attention(*inputs.qkv, **{**inputs.kwargs, **options})


# ---- against the specification ------------------------------------------------------------------


def check_against_reference(case: Case, out: Tensor, inputs: Inputs, **options: Any) -> None:
    """By dtype and precision; the reference takes the same block map."""
    precise = torch.float32 if case.dtype != F64 or case.quant != "none" else F64
    expected = run(reference, inputs, compute_dtype=precise, **options)
    if case.quant != "none":
        assert rel_l2(out, expected) <= EMULATION_REL_L2
    elif case.dtype in (torch.float32, F64):
        torch.testing.assert_close(out, expected)
    else:
        check_forward(out, expected, run(reference, inputs, compute_dtype=case.dtype, **options))


CPU_CASES = sweep((*SMALL_SEQLENS, 1560), dtypes=CPU_DTYPES, max_rows=8000)


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_shape_sweep(case: Case) -> None:
    inputs = make_inputs(case)
    out, aux = run(sla2, inputs, return_aux=True)
    assert out.shape == case.shape and out.dtype == case.dtype and out.is_contiguous()
    assert aux.lse.shape == (case.batch, case.num_heads, case.seqlen)
    assert aux.lse.dtype == (F64 if case.dtype == F64 else torch.float32)
    aux.block_map.validate()
    assert aux.block_map.num_kv_blocks == case.num_kv_blocks
    assert aux.sparsity == pytest.approx(1 - case.num_kv_blocks / case.num_k_blocks)
    assert aux.sparsity == pytest.approx(aux.block_map.sparsity)
    check_against_reference(case, out, inputs, block_map=aux.block_map)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"smooth_k": False},
    {"phi_input": "raw"},
    {"scale": 0.3},
    {"pinned_kv": torch.tensor([1])},
    {"pinned_kv": torch.tensor([3, 0], dtype=torch.int32)},
    {"num_kv_blocks": None, "topk": 0.7},
    {"num_kv_blocks": None},
    {"mode": "soft"},
    {"mode": "soft", "tau": 0.5, "router_score": "raw", "pinned_kv": torch.tensor([4])},
    {"mode": "soft", "router_score": "softmax", "smooth_k": False},
    {"mode": "soft", "phi_input": "raw", "scale": 0.3},
    {"alpha_logit": torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=F64)},
    {"alpha_logit": torch.randn(3, 300, generator=torch.Generator().manual_seed(1), dtype=F64)},
]


def leaves(inputs: Inputs, soft: bool) -> tuple[list[Tensor], Inputs]:
    """Copies of the inputs: those with a gradient, and all of them."""
    q, k, v, alpha = (x.clone().requires_grad_() for x in (*inputs.qkv, inputs.alpha_logit))
    projs = [x.clone().requires_grad_(soft) for x in (inputs.proj_q, inputs.proj_k)]
    wanted = [q, k, v, alpha, *(projs if soft else ())]
    return wanted, Inputs(q, k, v, *projs, alpha, inputs.options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
def test_options_and_gradients(options: dict[str, Any], layout: str) -> None:
    """Output, lse and all gradients equal the specification's, in float64."""
    case = Case(2, 300, 3, 16, "2", F64, layout, proj="head")
    inputs = make_inputs(case)
    inputs.proj_q, inputs.proj_k = inputs.proj_q.double(), inputs.proj_k.double()
    options = dict(options)
    inputs.alpha_logit = options.pop("alpha_logit", inputs.alpha_logit.double())
    results = []
    for module in (sla2, reference):
        wanted, own = leaves(inputs, options.get("mode") == "soft")
        out, aux = run(module, own, return_aux=True, **options)
        if module is sla2:
            assert not aux.lse.requires_grad
            assert not (options.get("mode") == "soft" and aux.block_map.requires_grad)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
        results.append((out, aux.lse, *torch.autograd.grad((out * weights).sum(), wanted)))
    for name, actual, expected in zip(
        ("out", "lse", "dq", "dk", "dv", "dalpha", "dproj_q", "dproj_k"), *results, strict=False
    ):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("quant", ["int8_fp16", "int8_fp8"])
def test_gradient_after_low_bit_forward(quant: str) -> None:
    """As specified: unquantised operands, O_s and lse of the low-bit forward pass."""
    inputs = make_inputs(Case(1, 300, 2, 64, "2", torch.float32, quant=quant))
    grads = []
    for module in (sla2, reference):
        wanted, own = leaves(inputs, soft=False)
        grads.append(torch.autograd.grad(run(module, own).square().sum(), wanted))
    for actual, expected in zip(*grads, strict=True):
        # Rounding decisions of the two forward passes may differ by the order of float32 sums.
        assert rel_l2(actual, expected) <= EMULATION_REL_L2


@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize("branch", ["sparse", "linear"])
def test_branches_alone(branch: str, layout: str) -> None:
    inputs = make_inputs(Case(2, 300, 3, 16, "2", F64, layout))
    mask = torch.rand(2, 3, 3, 5) < 0.5
    mask[0, 0, 0], mask[1, 1, 1] = False, True  # nothing listed, nothing left
    block_map = sla2.BlockMap.from_dense(mask, 300)
    results = []
    for module, listed in ((sla2, block_map), (reference, mask)):
        q, k, v = (x.clone().requires_grad_() for x in inputs.qkv)
        if branch == "sparse":
            out, lse = module.block_sparse_attention(
                q, k, v, listed, layout=layout, return_lse=True, scale=0.2
            )
            check_lse(lse, reference.block_sparse_attention(
                q, k, v, mask, layout=layout, return_lse=True, scale=0.2
            )[1])  # fmt: skip
        else:
            out = module.complement_linear_attention(q, k, v, listed, layout=layout)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_whole_is_the_blend_of_the_branches() -> None:
    inputs = make_inputs(SMALL)
    block_map = sla2.route(
        inputs.q, inputs.k, proj_q=inputs.proj_q, proj_k=inputs.proj_k, num_kv_blocks=2
    )
    o_s = sla2.block_sparse_attention(*inputs.qkv, block_map)
    o_l = sla2.complement_linear_attention(*inputs.qkv, block_map)
    alpha = inputs.alpha_logit.double().sigmoid().repeat_interleave(128, 1)[:, :300].T[..., None]
    torch.testing.assert_close(run(sla2, inputs), alpha * o_s + (1 - alpha) * o_l)


@pytest.mark.parametrize("pinned", [None, [2], [4, 0]])
def test_route(pinned: list[int] | None) -> None:
    inputs = make_inputs(Case(2, 300, 3, 16, "2", F64, proj="head"))
    options: dict[str, Any] = {"proj_q": inputs.proj_q, "proj_k": inputs.proj_k, "num_kv_blocks": 3}
    if pinned is not None:
        options["pinned_kv"] = torch.tensor(pinned)
    block_map = sla2.route(inputs.q, inputs.k, **options)
    dense = block_map.to_dense()
    assert torch.equal(dense, reference.route(inputs.q, inputs.k, **options))
    assert pinned is None or bool(dense[..., pinned].all())
    transposed = [x.transpose(1, 2) for x in (inputs.q, inputs.k)]
    assert torch.equal(sla2.route(*transposed, layout="BHND", **options).lut, block_map.lut)


def test_ties_go_to_the_lowest_index() -> None:
    q = torch.zeros(1, 300, 1, 16)
    block_map = sla2.route(q, q, proj_q=torch.eye(16), proj_k=torch.eye(16), num_kv_blocks=2)
    assert block_map.lut.tolist() == [[[[0, 1]] * 3]]


@pytest.mark.parametrize(
    "options",
    [{}, {"smooth_k": False}, {"phi_input": "raw"}, {"quant": "int8_fp8"}, {"scale": 0.3}],
    ids=str,
)
def test_block_map_is_reused(options: dict[str, Any]) -> None:
    """With the map of `return_aux`, the same bits as with the routing inside."""
    inputs = make_inputs(SMALL)
    out, aux = run(sla2, inputs, return_aux=True, **options)
    options = {**inputs.options, **options, "num_kv_blocks": None, "block_map": aux.block_map}
    again, same = sla2.sla2_attention(
        *inputs.qkv, proj_q=None, proj_k=None, alpha_logit=inputs.alpha_logit, return_aux=True,
        **options,
    )  # fmt: skip
    assert torch.equal(again, out) and torch.equal(same.lse, aux.lse)
    assert same.block_map is aux.block_map and same.sparsity == aux.sparsity


def test_soft_aux_is_the_mask() -> None:
    inputs = make_inputs(SMALL)
    _, aux = run(sla2, inputs, mode="soft", return_aux=True)
    _, expected = run(reference, inputs, mode="soft", return_aux=True)
    torch.testing.assert_close(aux.block_map, expected.block_map)
    torch.testing.assert_close(aux.block_map.sum(-1), torch.full((2, 3, 3), 2.0, dtype=F64))
    assert not aux.block_map.requires_grad and aux.sparsity == pytest.approx(expected.sparsity)


# ---- degenerate shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("layout", ["BNHD", "BHND"])
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 300), (2, 0), (0, 0)])
def test_empty(batch: int, seqlen: int, layout: str, mode: str) -> None:
    inputs = make_inputs(Case(batch, seqlen, 3, 16, "1", torch.float32, layout))
    wanted, own = leaves(inputs, mode == "soft")
    out, aux = run(sla2, own, mode=mode, return_aux=True)
    assert out.shape == inputs.q.shape and aux.lse.shape == (batch, 3, seqlen)
    for x, grad in zip(wanted, torch.autograd.grad(out.sum(), wanted), strict=True):
        assert grad.shape == x.shape and not grad.any()
    block_map = sla2.route(own.q, own.k, proj_q=torch.eye(16), proj_k=torch.eye(16), layout=layout)
    assert block_map.lut.shape[:3] == (batch, 3, -(-seqlen // 128))
    for branch in (sla2.block_sparse_attention, sla2.complement_linear_attention):
        out = branch(*own.qkv, block_map, layout=layout)
        assert out.shape == inputs.q.shape
        assert torch.autograd.grad(out.sum(), own.q)[0].shape == inputs.q.shape


def test_tiny_topk_keeps_one_block() -> None:
    out, aux = run(sla2, make_inputs(SMALL), num_kv_blocks=None, topk=1e-9, return_aux=True)
    assert aux.block_map.num_kv_blocks == 1 and bool(out.isfinite().all())


@pytest.mark.parametrize("seqlen", [1, 17, 300])
def test_topk_one_is_dense_attention(seqlen: int) -> None:
    """With every block listed the complement is empty and alpha counts as 1, whatever its logit."""
    inputs = make_inputs(Case(2, seqlen, 3, 16, "all", F64, "BHND"))
    out, aux = run(sla2, inputs, num_kv_blocks=None, topk=1.0, return_aux=True)
    assert aux.sparsity == 0.0
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs.qkv))


def test_topk_follows_the_formula() -> None:
    inputs = make_inputs(Case(1, 1560, 1, 16, dtype=torch.float32))
    for topk in (0.03, 0.05, 0.1, 0.12, 0.5, 0.999, 1.0):
        _, aux = run(sla2, inputs, num_kv_blocks=None, topk=topk, return_aux=True)
        assert aux.block_map.num_kv_blocks == max(1, int(topk * 25))


# ---- memory -------------------------------------------------------------------------------------


def strided(x: Tensor, kind: str) -> Tensor:
    """The values of x (B, N, H, D) in memory laid out differently."""
    b, n, h, d = x.shape
    if kind == "fused_qkv":
        out = x.new_full((b, n, 3 * h, d), torch.nan)[:, :, h : 2 * h]
    elif kind == "transposed":
        out = x.new_empty((b, h, n, d)).transpose(1, 2)
    elif kind == "sliced_heads":
        out = x.new_full((b, n, 2 * h, d), torch.nan)[:, :, ::2]
    elif kind == "padded_rows":
        out = x.new_full((b, n, h, d + 3), torch.nan)[..., :d]
    elif kind == "offset":
        out = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    elif kind == "tail_after_n":
        out = x.new_full((b, n + 50, h, d), torch.nan)[:, :n]
    else:
        raise AssertionError(kind)
    return out.copy_(x)


KINDS = ("fused_qkv", "transposed", "sliced_heads", "padded_rows", "offset", "tail_after_n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_strides_do_not_matter(kind: str, mode: str) -> None:
    inputs = make_inputs(Case(2, 193, 3, 64, "2", torch.float16))
    grads = []
    for own in (inputs.qkv, tuple(strided(x, kind) for x in inputs.qkv)):
        wanted = [x.detach().requires_grad_() for x in own]
        copy = Inputs(*wanted, inputs.proj_q, inputs.proj_k, inputs.alpha_logit, inputs.options)
        out = run(sla2, copy, mode=mode)
        assert out.is_contiguous()
        grads.append((out, *torch.autograd.grad(out.float().square().sum(), wanted)))
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


def test_expanded_batch() -> None:
    inputs = make_inputs(Case(1, 193, 3, 64, "2", torch.float16))
    wide = Inputs(*(x.expand(3, -1, -1, -1) for x in inputs.qkv), inputs.proj_q, inputs.proj_k,
                  inputs.alpha_logit, inputs.options)  # fmt: skip
    assert torch.equal(run(sla2, wide), run(sla2, inputs).expand(3, -1, -1, -1))


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradient_of_any_strides(kind: str) -> None:
    """`out.sum()` sends a gradient of stride 0; a transposed consumer sends a transposed one."""
    inputs = make_inputs(SMALL)
    wanted, own = leaves(inputs, soft=False)
    out = run(sla2, own)
    dense = torch.ones_like(out)
    grad = dense.new_ones(()).expand(out.shape)
    if kind == "transposed":
        dense = torch.randn(out.shape, dtype=F64)
        grad = dense.transpose(0, 3).contiguous().transpose(0, 3)
    expected = torch.autograd.grad(out, wanted, dense, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out, wanted, grad), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"quant": "int8_fp8"}, {"mode": "soft"}], ids=str)
def test_inputs_are_not_written(options: dict[str, Any]) -> None:
    inputs = make_inputs(Case(2, 193, 3, 64, "2", torch.float16))
    pinned = torch.tensor([1])
    _, own = leaves(inputs, options.get("mode") == "soft")
    tensors = (*own.qkv, own.proj_q, own.proj_k, own.alpha_logit, pinned)
    before = [(x._version, x.detach().clone()) for x in tensors]
    out, aux = run(sla2, own, pinned_kv=pinned, return_aux=True, **options)
    if not options.get("mode"):
        lut, counts = aux.block_map.lut.clone(), aux.block_map.counts.clone()
        sla2.complement_linear_attention(*own.qkv, aux.block_map)
        assert torch.equal(aux.block_map.lut, lut) and torch.equal(aux.block_map.counts, counts)
    out.float().square().sum().backward()
    for x, (version, values) in zip(tensors, before, strict=True):
        assert x._version == version
        assert torch.equal(x.detach().view(torch.uint8), values.view(torch.uint8))


def test_same_bits_every_time_and_in_any_batch() -> None:
    inputs = make_inputs(Case(3, 300, 2, 64, "2", torch.float16))
    out = run(sla2, inputs)
    assert torch.equal(run(sla2, inputs), out)
    for b in range(3):
        one = Inputs(*(x[b : b + 1] for x in inputs.qkv), inputs.proj_q, inputs.proj_k,
                     inputs.alpha_logit, inputs.options)  # fmt: skip
        assert torch.equal(run(sla2, one), out[b : b + 1])


# ---- signatures and import ----------------------------------------------------------------------

ATTENTION = (
    "q k v proj_q proj_k alpha_logit topk num_kv_blocks scale quant mode tau router_score smooth_k "
    "phi_input pinned_kv block_map layout return_aux"
)
SIGNATURES = {
    "sla2_attention": (3, ATTENTION),
    "route": (2, "q k proj_q proj_k topk num_kv_blocks pinned_kv smooth_k layout"),
    "block_sparse_attention": (4, "q k v block_map scale quant smooth_k layout return_lse"),
    "complement_linear_attention": (4, "q k v block_map smooth_k phi_input layout"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """Tensors are positional, options keywords, and the reference takes them all."""
    positional, expected = SIGNATURES[name]
    function = getattr(sla2, name)
    parameters = inspect.signature(function).parameters
    assert list(parameters) == expected.split()
    kinds = [p.kind for p in parameters.values()]
    assert kinds[:positional] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional
    assert set(kinds[positional:]) == {inspect.Parameter.KEYWORD_ONLY}
    assert set(inspect.get_annotations(function)) == {*parameters, "return"}
    specified = inspect.signature(getattr(reference, name)).parameters
    assert set(parameters) <= set(specified)
    for option, p in parameters.items():
        assert specified[option].default == p.default


def python(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing() -> None:
    code = "import sys, sla2; print([m for m in ('torch', 'numpy', 'sla2._C') if m in sys.modules])"
    assert python(code) == "[]"


def test_import_works_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import sla2\n"
        "assert sla2.__version__ and isinstance(sla2.collect_env(), dict)\n"
        "assert 'torch' in sla2.why_not()\n"
        "try: sla2.route\n"
        "except ImportError as error: print('torch' in str(error))"
    )
    assert python(code) == "True"


def test_every_public_name_is_there() -> None:
    import sla2 as package

    for name in package.__all__:
        assert getattr(package, name) is not None and name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = package.flash
    assert python("from sla2 import *; print(sla2_attention.__module__)") == "sla2.functional"
