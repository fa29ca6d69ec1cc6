"""Whose kernels the command says that a call runs, and why a path cannot serve it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from package_tools import REPOSITORY

from sla2 import env, ops
from sla2.cli import device as device_tools
from sla2.cli import main
from sla2.cli.parser import QUANT_MODES

CPU, GPU_0 = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def sm90_refuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The precisions without Hopper kernels on the GPU; a test may add to them."""
    refused = {"int8_fp16"}

    def supported(index: int, dtype: int, head_dim: int, quant: int, path: int) -> str | None:
        return "refused" if QUANT_MODES[quant] in refused else None

    monkeypatch.setitem(sys.modules, "sla2._C", SimpleNamespace(supported=supported))
    with ops.kernel_path("auto"):
        yield refused


def in_use(path: str, quant: str, num_kv_blocks: int, *, routed: bool) -> str:
    return device_tools.path_in_use(GPU_0, path, quant, num_kv_blocks, routed=routed)


def test_a_path_is_the_gradients_too() -> None:
    """autograd's threads do not know what this one has chosen; the calling thread computes."""
    threads = torch._C._is_multithreading_enabled
    assert threads()
    for device, path, forced in (
        (GPU_0, "portable", True),
        (GPU_0, "auto", False),
        (CPU, "sm90", False),
    ):
        before = ops.current_path()
        with device_tools.use_path(device, path):
            assert threads() != forced
            assert ops.current_path() == (path if forced else before)
        assert threads() and ops.current_path() == before


@pytest.mark.parametrize(
    ("quant", "num_kv_blocks", "whole", "attention"),
    [
        ("none", 500, "sm90", "sm90"),
        ("int8_fp8", 128, "sm90", "sm90"),
        ("int8_fp8", 129, "sm90 + portable", "portable"),
        ("int8_fp16", 2, "sm90 + portable", "portable"),
    ],
)
def test_path_in_use_is_what_the_calls_take(
    quant: str, num_kv_blocks: int, whole: str, attention: str, sm90_refuses: set[str]
) -> None:
    assert in_use("auto", quant, num_kv_blocks, routed=True) == whole
    assert in_use("auto", quant, num_kv_blocks, routed=False) == attention
    for path in ("portable", "sm90"):
        assert in_use(path, quant, num_kv_blocks, routed=True) == path
        with ops.kernel_path(path):
            assert in_use("auto", quant, num_kv_blocks, routed=True) == path
    assert device_tools.path_in_use(CPU, "sm90", quant, num_kv_blocks, routed=True) == "cpu"
    sm90_refuses |= set(QUANT_MODES)
    assert in_use("auto", quant, num_kv_blocks, routed=True) == "portable"


def test_reasons_against_a_path(sm90_refuses: set[str]) -> None:
    why_not = device_tools.why_not_path
    assert why_not(CPU, "sm90", "float32", 64, "none", 2) is None
    assert why_not(GPU_0, "auto", "bfloat16", 64, "int8_fp8", 129) is None
    assert why_not(GPU_0, "portable", "bfloat16", 64, "int8_fp8", 129) is None
    assert why_not(GPU_0, "sm90", "bfloat16", 64, "int8_fp8", 128) is None
    assert why_not(GPU_0, "sm90", "bfloat16", 64, "int8_fp16", 2) == "refused"
    assert "dtype float32" in str(why_not(GPU_0, "sm90", "float32", 64, "none", 2))
    assert "at most 128 key blocks, not 129" in str(
        why_not(GPU_0, "sm90", "bfloat16", 64, "int8_fp8", 129)
    )


def test_longest_low_bit_list_of_sm90_is_that_of_the_library() -> None:
    source = REPOSITORY / "csrc" / "core" / "forward.cpp"
    limits = re.findall(r"constexpr int kMaxBlocksSm90Fp8 = (\d+);", source.read_text())
    assert limits == [str(env._MAX_BLOCKS_SM90_FP8)]


# ---- on a GPU ---------------------------------------------------------------------------------

# Path of a row -> the router's and the attention's kernels.
KERNELS = {
    "portable": ("select_kernel", "attn_fwd_kernel"),
    "sm90": ("route_kernel", "attn_fwd_sm90_kernel"),
    "sm90 + portable": ("route_kernel", "attn_fwd_kernel"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["auto", "portable"])
@pytest.mark.parametrize("quant", ["none", "int8_fp16"])
def test_bench_on_the_gpu_reports_memory_and_kernels(path: str, quant: str, tmp_path: Path) -> None:
    arguments = ["bench", "--device", "cuda", "--seqlen", "4096", "--heads", "2", "--path", path]
    arguments += ["--quant", quant, "--iters", "5", "--stages", "--refcheck"]
    with ops.kernel_path("auto"):
        assert main([*arguments, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())
    whole = next(row for row in rows if row["op"] == "sla2_attention")
    # At least the output itself: 4096 x 2 x 128 in 16 bit.
    assert whole["peak_extra_bytes"] >= 4096 * 2 * 128 * 2
    assert path == "auto" or whole["path"] == path
    profiled = [kernel["kernel"] for kernel in json.loads((tmp_path / "kernels.json").read_text())]
    ran = [re.search(r"sla2::.*?(\w+_kernel)\b", name) for name in profiled]
    assert set(KERNELS[whole["path"]]) <= {match[1] for match in ran if match is not None}
