"""Determinism, streams, threads, devices, CUDA graphs, memory, errors (T5, T11, T12, T13)."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import HEAD_DIMS, QUANTS, Case, Inputs, make_inputs
from gpu_tools import DEVICE, as_bytes, raw_attn_fwd, same_bits
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import sla2
from sla2 import ops

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def make(quant: str = "none", *, seed: int = 0, **sizes: int) -> Inputs:
    sizes = {"batch": 2, "seqlen": 457, "num_heads": 3, "head_dim": 64, **sizes}
    case = Case(**sizes, kv_blocks="2", dtype=BF16, quant=quant)  # type: ignore[arg-type]
    return make_inputs(case, DEVICE, seed=seed)


def attend(inputs: Inputs, **options: Any) -> Any:
    return sla2.sla2_attention(*inputs.qkv, **{**inputs.kwargs, **options})


def everything(inputs: Inputs) -> list[Tensor]:
    """All results: routed, by map, and of each branch."""
    quant = inputs.options["quant"]
    out, aux = attend(inputs, return_aux=True)
    o_s, lse = sla2.block_sparse_attention(*inputs.qkv, aux.block_map, quant=quant, return_lse=True)
    o_l = sla2.complement_linear_attention(*inputs.qkv, aux.block_map)
    return [out, aux.lse, aux.block_map.lut, aux.block_map.counts, o_s, lse, o_l]


def all_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def gradients(inputs: Inputs, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (*inputs.qkv, inputs.alpha_logit)]
    given = {**inputs.kwargs, "alpha_logit": leaves[3], **options}
    out: Any = sla2.sla2_attention(*leaves[:3], **given)
    return list(torch.autograd.grad(out.float().square().sum(), leaves))


# ---- T5: the same bits --------------------------------------------------------------------------


def differing_bytes(run: Callable[[], Sequence[Tensor]], times: int) -> int:
    """Bytes that are not those of a first run in `times` further ones, while another stream keeps
    the device busy; the host does not wait between runs."""
    expected = [as_bytes(x) for x in run()]
    a = torch.randn(4096, 4096, device=DEVICE, dtype=BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(times):
        with torch.cuda.stream(side):
            torch.mm(a, a)
            torch.mm(a, a)
        for x, y in zip(run(), expected, strict=True):
            differing += (as_bytes(x) != y).sum()
    side.synchronize()
    return int(differing)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_same_bits_250_times(quant: str, head_dim: int) -> None:
    """B H = 64."""
    inputs = make(quant, seqlen=1560, num_heads=32, head_dim=head_dim)
    assert differing_bytes(lambda: everything(inputs), 250) == 0


@pytest.mark.parametrize("quant", QUANTS)
def test_the_sparse_branch_alone_1000_times(quant: str) -> None:
    """No linear branch whose barriers would keep a CTA's warps together: one of them stored its
    output over the queries of another in 16 of 10000 calls (portable, int8_fp16)."""
    inputs = make(quant, seqlen=1560, num_heads=32, head_dim=128)
    block_map = attend(inputs, return_aux=True)[1].block_map

    def sparse() -> tuple[Tensor, Tensor]:
        found: Any = sla2.block_sparse_attention(
            *inputs.qkv, block_map, quant=quant, return_lse=True
        )
        return found[0], found[1]

    assert differing_bytes(sparse, 1000) == 0


@pytest.mark.parametrize("mode", [*QUANTS, "soft"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gradients_are_the_same_bits_250_times(mode: str, head_dim: int) -> None:
    """B H = 64."""
    soft = mode == "soft"
    inputs = make("none" if soft else mode, seqlen=1560, num_heads=32, head_dim=head_dim)
    assert differing_bytes(lambda: gradients(inputs, mode="soft" if soft else "hard"), 250) == 0


@pytest.mark.parametrize("quant", QUANTS)
def test_batch_neighbours_do_not_matter(quant: str) -> None:
    """A row of a batch of 4, and a head of 12, alone."""
    inputs = make(quant, batch=4, seqlen=713, num_heads=12)
    out, aux = attend(inputs, return_aux=True)
    for b, h in ((0, 0), (3, 0), (2, 7), (3, 11)):
        one = (slice(b, b + 1), slice(None), slice(h, h + 1))
        q, k, v = (x[one].contiguous() for x in inputs.qkv)
        alpha = inputs.alpha_logit[h : h + 1]
        alone = replace(inputs, q=q, k=k, v=v, alpha_logit=alpha)
        got, got_aux = attend(alone, return_aux=True)
        assert same_bits(got, out[one]) and same_bits(got_aux.lse[0, 0], aux.lse[b, h])
        assert same_bits(got_aux.block_map.lut[0, 0], aux.block_map.lut[b, h])


@pytest.mark.parametrize("quant", QUANTS)
def test_saving_for_the_backward_pass_changes_nothing(quant: str) -> None:
    inputs = make(quant)
    expected = attend(inputs)
    for x in inputs.qkv:
        x.requires_grad_()
    assert same_bits(attend(inputs).detach(), expected)
    with torch.no_grad():
        assert same_bits(attend(inputs), expected)


# ---- T11: streams, threads, devices -------------------------------------------------------------


@pytest.mark.parametrize("quant", QUANTS)
def test_side_stream_waits_for_its_producer(quant: str) -> None:
    """The inputs arrive 200 ms late on the stream of the call; no other stream waits for them."""
    sources = [make(quant, seed=seed) for seed in (0, 1)]
    expected = [attend(source) for source in sources]
    work = make(quant)
    for x in work.qkv:
        x.fill_(torch.nan)
    torch.cuda.synchronize()
    side, results = torch.cuda.Stream(), []
    for i in range(20):
        with torch.cuda.stream(side):
            torch.cuda._sleep(400_000_000 if i < 4 else 20_000_000)  # cycles of about 0.5 ns
            source = sources[i % 2]
            for x, y in zip(work.qkv, source.qkv, strict=True):
                x.copy_(y)
            work.alpha_logit.copy_(source.alpha_logit)
            work.proj_q.copy_(source.proj_q)
            work.proj_k.copy_(source.proj_k)
            results.append(attend(work))
    side.synchronize()
    for i, out in enumerate(results):
        assert same_bits(out, expected[i % 2]), f"call {i}"


@pytest.mark.parametrize("quant", QUANTS)
def test_every_kernel_is_on_the_current_stream(quant: str, tmp_path: Path) -> None:
    inputs = make(quant)
    everything(inputs)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        with torch.cuda.stream(side):
            mark = torch.empty(1000, device=DEVICE).fill_(1.0)  # shows the stream's number
            everything(inputs)
        torch.cuda.synchronize()
    assert bool(mark.all())
    path = tmp_path / "trace.json"
    trace.export_chrome_trace(str(path))
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in kinds]
    if not events:
        pytest.skip("the profiler records no kernels on this machine")
    names = {e["name"] for e in events}
    assert any("attn_fwd" in name for name in names)
    streams = {e["args"]["stream"] for e in events}
    assert len(streams) == 1, sorted((e["args"]["stream"], e["name"]) for e in events)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_with_their_own_streams(threads: int) -> None:
    problems = [make(QUANTS[i % 3], seed=i, seqlen=200 + 64 * i) for i in range(threads)]
    expected = [attend(problem) for problem in problems]
    torch.cuda.synchronize()

    def work(index: int) -> int:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for _ in range(100):
                wrong += (attend(problems[index]) != expected[index]).sum()
        stream.synchronize()
        return int(wrong)

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(work, range(threads))) == [0] * threads


def test_tensors_read_on_two_streams() -> None:
    inputs = make("int8_fp8", seqlen=1560)
    expected = attend(inputs)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            results.append(attend(inputs))
    torch.cuda.synchronize()
    assert all(same_bits(out, expected) for out in results)


def failures(inputs: Inputs) -> list[tuple[type[Exception], Callable[[], Any]]]:
    """Calls that fail in the checks, in the operator and inside the library."""
    wide = [x.float() for x in inputs.qkv]
    narrow = [x[..., :48].contiguous() for x in inputs.qkv]
    frozen = inputs.proj_q.clone().requires_grad_()
    kwargs: dict[str, Any] = inputs.kwargs
    ext: Any = ops._extension()
    shape, options = (2, 457, 3, 64, 0), (0, 0, 0, False, True, 0.125)
    pointers: dict[str, Any] = {name: (0, 0, 0, 0) for name in ("q", "k", "v", "out")}
    return [
        (ValueError, lambda: attend(inputs, num_kv_blocks=9)),
        (ValueError, lambda: attend(inputs, quant="int4")),
        (TypeError, lambda: sla2.sla2_attention(*wide, **kwargs)),
        (ValueError, lambda: sla2.sla2_attention(*narrow, **kwargs)),
        (RuntimeError, lambda: attend(inputs, proj_q=frozen)),
        (
            ValueError,
            lambda: ext.attn_fwd(
                shape=shape, options=options, **pointers, out_sparse=None, lse=0, alpha=None,
                router=None, lists=(0, 0, 2), workspace=(0, 0), stream=0,
            ),
        ),
        (ValueError, lambda: ext.attn_fwd_workspace(
            shape=(2, 457, 3, 96, 0), options=options, routed=True, max_kv_blocks=2
        )),
    ]  # fmt: skip


def state() -> tuple[Any, ...]:
    return (
        torch.cuda.current_device(), torch.cuda.current_stream(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.get_default_device(),
    )  # fmt: skip


def test_nothing_changes_by_calls_that_fail() -> None:
    """Device, stream and default dtype stay, memory is given back, and the next call is right."""
    inputs = make()
    expected = attend(inputs)
    torch.cuda.synchronize()
    gc.collect()
    used = torch.cuda.memory_allocated()
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            calls = failures(inputs)
            before = state()
            for error, call in calls:
                with pytest.raises(error):
                    call()
                assert state() == before
            torch.cuda.synchronize()
            assert same_bits(attend(inputs), expected)
        del calls, call
    gc.collect()
    assert torch.cuda.memory_allocated() == used


def on(device: str, inputs: Inputs) -> Inputs:
    names = ("q", "k", "v", "proj_q", "proj_k", "alpha_logit")
    moved: dict[str, Any] = {name: getattr(inputs, name).to(device) for name in names}
    return replace(inputs, **moved)


@two_gpus
@pytest.mark.parametrize("quant", QUANTS)
def test_device_that_is_not_current(quant: str) -> None:
    """Calls on device 1 and on both in turn, with 0 current: it stays current."""
    first = make(quant)
    second = on("cuda:1", first)
    expected = [x.cpu() for x in everything(first)]
    for _ in range(20):
        for inputs in (second, first):
            results = everything(inputs)
            assert all(x.device == inputs.q.device for x in results)
            assert all_same([x.cpu() for x in results], expected)
            assert torch.cuda.current_device() == 0
    for error, call in failures(second):
        with pytest.raises(error):
            call()
        assert torch.cuda.current_device() == 0
    _, aux = attend(first, return_aux=True)
    with pytest.raises(ValueError, match="block_map is on"):
        sla2.complement_linear_attention(*second.qkv, aux.block_map)


@two_gpus
def test_gradients_on_a_device_that_is_not_current() -> None:
    inputs = make()
    expected, got = gradients(inputs), gradients(on("cuda:1", inputs))
    assert all_same([x.cpu() for x in got], [x.cpu() for x in expected])
    assert torch.cuda.current_device() == 0


# ---- T12: CUDA graphs ---------------------------------------------------------------------------


def capture(
    inputs: Inputs,
    stream: torch.cuda.Stream | None,
    run: Callable[[Inputs], list[Tensor]] = everything,
) -> tuple[Any, list[Tensor]]:
    """A graph of `run` on `inputs`, and its results."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        run(inputs)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run(inputs)
    return graph, results


def refill(static: Inputs, seed: int) -> Inputs:
    """Other inputs, which `static` now holds too."""
    other = make(static.options["quant"], head_dim=static.q.shape[-1], seed=seed)
    for name in ("q", "k", "v", "alpha_logit", "proj_q", "proj_k"):
        getattr(static, name).copy_(getattr(other, name))
    return other


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("own_stream", [False, True])
def test_graph_replays_with_other_inputs(quant: str, head_dim: int, own_stream: bool) -> None:
    """Work that ran on another stream during the capture, the legacy one included, would not be in
    the graph: the results would stay those of the first inputs."""
    static = make(quant, head_dim=head_dim)
    graph, results = capture(static, torch.cuda.Stream() if own_stream else None)
    for seed in range(20):
        other = refill(static, seed)
        graph.replay()
        assert all_same(results, everything(other)), f"inputs {seed}"


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_graph_of_a_training_step(quant: str, head_dim: int) -> None:
    """Forward and backward pass."""
    static = make(quant, head_dim=head_dim)
    graph, results = capture(static, None, gradients)
    for seed in range(20):
        other = refill(static, seed)
        graph.replay()
        assert all_same(results, gradients(other)), f"inputs {seed}"


def test_graph_with_training_inputs() -> None:
    """The forward pass of a training step is capturable."""
    static = make("int8_fp8", seed=5)
    for x in static.qkv:
        x.requires_grad_()
    graph, results = capture(static, None)
    graph.replay()
    assert all_same([x.detach() for x in results], everything(make("int8_fp8", seed=5)))


# ---- T13: out of memory, leaks ------------------------------------------------------------------


def test_out_of_memory_is_an_error_and_nothing_else() -> None:
    """The workspace does not fit: an exception, all memory given back, the next call right."""
    small = make("int8_fp8")
    expected = attend(small)
    large = make("int8_fp8", batch=1, seqlen=32760, num_heads=12, head_dim=128)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[1]
    # The output takes 96 MiB, the workspace several times that.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (140 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            attend(large)
        gc.collect()
        assert torch.cuda.memory_allocated() == used
        assert same_bits(attend(small), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert same_bits(attend(small), expected)
    assert bool(attend(large).isfinite().all())
    gc.collect()
    assert torch.cuda.memory_allocated() == used


@pytest.mark.parametrize("quant", QUANTS)
def test_1000_calls_leak_nothing(quant: str) -> None:
    inputs = make(quant, seqlen=200)
    used = []
    for i in range(1001):
        out = attend(inputs)
        if i % 100 == 0:
            used.append(torch.cuda.memory_allocated())
    assert len(set(used)) == 1 and bool(out.isfinite().all())


def test_workspace_is_what_the_library_asks_for() -> None:
    """A byte less, or an address that is not aligned, is refused before any launch."""
    inputs = make("int8_fp8")
    ext: Any = ops._extension()
    made = raw_attn_fwd(inputs, 2, quant="int8_fp8")
    shape, options = (2, 457, 3, 64, 0), (2, 0, 0, False, True, 0.125)
    size = ext.attn_fwd_workspace(shape=shape, options=options, routed=False, max_kv_blocks=2)
    workspace = torch.zeros(size + 256, dtype=torch.uint8, device=DEVICE)

    def call(offset: int, given: int) -> None:
        ext.attn_fwd(
            shape=shape,
            options=options,
            q=ops._operand(inputs.q),
            k=ops._operand(inputs.k),
            v=ops._operand(inputs.v),
            out=ops._operand(made["out"]),
            out_sparse=None,
            lse=0,
            alpha=ops._alpha_operand(inputs.alpha_logit, 457),
            router=None,
            lists=(made["lut"].data_ptr(), made["counts"].data_ptr(), 2),
            workspace=(workspace.data_ptr() + offset, given),
            stream=torch.cuda.current_stream().cuda_stream,
        )

    call(0, size)
    call(256, size)
    for offset, given in ((16, size), (0, size - 1), (0, 0)):
        with pytest.raises(ValueError, match="workspace"):
            call(offset, given)
    torch.cuda.synchronize()
