"""why_not and collect_env: every refusal names the cause and a remedy, on any machine."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sla2 import env

DRIVER = {"version": "580.65.06", "cuda": 13000, "devices": []}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one H200, described by attributes that a test changes."""
    machine = SimpleNamespace(
        name="NVIDIA H200", capability=(9, 0), archs="80;90a", driver=dict(DRIVER), answer=None
    )
    machine.asked = []

    def supported(*arguments: int) -> str | None:
        machine.asked.append(arguments)
        return machine.answer

    core = SimpleNamespace(
        built_archs=lambda: machine.archs, runtime_version=lambda: 13000, supported=supported
    )
    monkeypatch.setitem(sys.modules, "sla2._C", core)
    monkeypatch.setattr(env, "_query_driver", lambda: machine.driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: machine.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.capability)
    return machine


def reason(*arguments: Any, **options: Any) -> str:
    text = env.why_not(*arguments, **options)
    assert text is not None
    assert not env.is_available(*arguments, **options)
    return text


def test_cpu_needs_nothing() -> None:
    for dtype in (None, torch.bfloat16, torch.float32, "float64"):
        assert env.why_not("cpu", dtype=dtype) is None
    assert env.is_available(torch.device("cpu"), quant="int8_fp8", head_dim=96)
    assert "int32" in reason("cpu", dtype=torch.int32)


def test_gpu_that_runs(gpu: SimpleNamespace) -> None:
    assert env.why_not(dtype=torch.float16, quant="int8_fp8", head_dim=64) is None
    assert gpu.asked == [(0, 1, 64, 2, 0)]
    assert env.is_available("cuda:0")


def test_core_has_the_last_word(gpu: SimpleNamespace) -> None:
    gpu.answer = "no kernel for this"
    assert reason() == "NVIDIA H200: no kernel for this"


def test_unsupported_device_names_archs_and_remedy(gpu: SimpleNamespace) -> None:
    gpu.name, gpu.capability = "NVIDIA B200", (10, 0)
    text = reason()
    for part in ("NVIDIA B200", "10.0", "80;90a", "SLA2_CUDA_ARCHS=100a"):
        assert part in text


def test_device_that_is_too_old(gpu: SimpleNamespace) -> None:
    gpu.name, gpu.capability = "NVIDIA T4", (7, 5)
    text = reason()
    for part in ("NVIDIA T4", "7.5", "8.0"):
        assert part in text


def test_fp8_before_its_time(gpu: SimpleNamespace) -> None:
    gpu.name, gpu.capability = "NVIDIA A100", (8, 0)
    assert "int8_fp16" in reason(quant="int8_fp8")
    assert env.is_available(quant="int8_fp16")
    # An Ada GPU that would run the code for sm_80, where no fp8 kernel is.
    gpu.name, gpu.capability = "NVIDIA L40S", (8, 9)
    assert "SLA2_CUDA_ARCHS=89" in reason(quant="int8_fp8")
    assert env.is_available(quant="int8_fp16")


def test_driver_that_is_too_old(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.driver = {"version": "550.54.14", "cuda": 12040, "devices": []}
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        text = reason()
        for part in ("550.54.14", "12.4", "13.0", "580", "build sla2 with CUDA 12"):
            assert part in text


def test_missing_driver_and_hidden_gpus(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in reason()
    gpu.driver = {"error": "no NVIDIA driver found"}
    assert reason() == "no NVIDIA driver found"


def test_torch_without_cuda(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build without CUDA" in reason()


def test_no_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sla2._C", None)
    info = {"NO_CORE_REASON": "no nvcc was found", "GIT_SHA": "unknown", "ARCHS": ""}
    monkeypatch.setattr(env, "_build_info", lambda: info)
    monkeypatch.setattr(env, "_PACKAGE_DIR", env._PACKAGE_DIR / "nowhere")
    assert "no nvcc was found" in reason()
    with pytest.raises(RuntimeError, match="no nvcc was found"):
        env.get_cmake_dir()
    monkeypatch.setattr(env, "_build_info", dict)
    assert "pip install" in reason()
    with pytest.raises(RuntimeError, match="pip install"):
        env.get_include()


def test_arguments(gpu: SimpleNamespace) -> None:
    text = reason(dtype=torch.float32, head_dim=96)
    for part in ("float32", "bfloat16", "96", "64 and 128"):
        assert part in text
    assert gpu.asked == []
    assert "mps" in reason("mps")
    assert "cuda:3" in reason(3)
    with pytest.raises(ValueError, match="int4"):
        env.why_not(quant="int4")
    with pytest.raises(ValueError, match="cuda:x"):
        env.why_not("cuda:x")
    with pytest.raises(TypeError):
        env.why_not(head_dims=64)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("archs", "capability", "usable"),
    [
        ("80;90a", (8, 0), ["80"]),
        ("80;90a", (8, 6), ["80"]),
        ("80;86;89", (8, 6), ["80", "86"]),
        ("80;90a", (9, 0), ["90a"]),
        ("90", (9, 0), ["90"]),
        ("120a;120-virtual", (12, 1), ["120-virtual"]),
        ("120f", (12, 1), ["120f"]),
        ("80-virtual", (12, 0), ["80-virtual"]),
        ("100a", (10, 3), []),
        ("", (9, 0), []),
    ],
)
def test_usable_archs(archs: str, capability: tuple[int, int], usable: list[str]) -> None:
    assert env._usable_archs(archs, capability) == usable


def test_collect_env_is_json_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLA2_EXAMPLE", "1")
    report = env.collect_env()
    assert json.loads(json.dumps(report)) == report
    assert report["sla2"]["version"] == env.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["installed"]["torch"]
    assert report["variables"]["SLA2_EXAMPLE"] == "1"
    assert any("libtorch" in os.path.basename(path) for path in report["libraries"])
    assert set(report["why_not"]) == {"none", "int8_fp16", "int8_fp8"}


def test_collect_env_survives_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(env.importlib, "import_module", broken)
    monkeypatch.setattr(env, "_build_info", dict)
    report = env.collect_env()
    assert "libcudart.so.12" in report["torch"]["error"]
    assert "libcudart.so.12" in report["why_not"]["none"]
