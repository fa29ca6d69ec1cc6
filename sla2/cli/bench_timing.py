"""Timing of one call: CUDA events with a cold L2 cache on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
# A GPU at its power limit lowers its clock, and keeps it low for a while after: without a pause the
# calls of one row are slower behind a dense peer than behind a short kernel.
REST_S = 0.5


class Timing(NamedTuple):
    """Milliseconds of one call over some iterations."""

    median: float
    min: float
    max: float
    iterations: int


def time_call(
    call: Callable[[], object],
    device: torch.device,
    *,
    iters: int,
    warmup: int,
    budget_s: float | None = None,
) -> Timing:
    """Times `call`.

    On a GPU every iteration is measured on its own by two events, after a write of 256 MiB that
    leaves nothing of the inputs in the L2 cache; all of them after a rest of REST_S. budget_s: with
    a slow call, fewer iterations than `iters`, so that about this much time is spent; never fewer
    than three.
    """
    if budget_s is not None:
        call()
        once_ms = _measure(call, device, 1)[0]
        affordable = int(budget_s * 1e3 / max(once_ms, 1e-3))
        iters = min(iters, max(3, affordable))
        warmup = min(warmup, affordable)
    for _ in range(warmup):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        time.sleep(REST_S)
    times = _measure(call, device, iters)
    return Timing(statistics.median(times), min(times), max(times), iters)


def _measure(call: Callable[[], object], device: torch.device, iters: int) -> list[float]:
    if device.type != "cuda":
        times = []
        with _no_garbage_collection():
            for _ in range(iters):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
        return times
    with torch.cuda.device(device), _no_garbage_collection():
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(iters)
        ]
        torch.cuda.synchronize(device)
        for begin, end in events:
            flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(end) for begin, end in events]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """None at all, as in `timeit`: one between two launches would count as the call's time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory held by torch's allocator beyond that before the call, results included."""
    if device.type != "cuda":
        return None
    gc.collect()  # garbage of earlier calls that went during this one would hide some of its own
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def kernel_times(
    call: Callable[[], object], device: torch.device, iters: int
) -> list[tuple[str, float]]:
    """(kernel, mean ms per call) as the profiler sees them, costliest first; warm cache."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(iters):
            call()
        torch.cuda.synchronize(device)
    times = [
        (event.key, event.self_device_time_total / 1e3 / iters)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]
    return sorted(times, key=lambda item: -item[1])
