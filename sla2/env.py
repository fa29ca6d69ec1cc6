"""What is installed, what was built, and whether the kernels run here.

The standard library suffices: everything in this module works, and says what is missing, on a
machine without GPU, driver or torch, and where one of them is broken. Nothing starts a process, and
the report asks the driver through NVML, which leaves a later fork intact where CUDA would not.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from sla2._version import __version__

__all__ = [
    "__git_sha__",
    "__version__",
    "collect_env",
    "get_cmake_dir",
    "get_include",
    "is_available",
    "why_not",
]

_PACKAGE_DIR = Path(__file__).resolve().parent
_QUANTS = ("none", "int8_fp16", "int8_fp8")
_CPU_DTYPES = ("bfloat16", "float16", "float32", "float64")
_CUDA_DTYPES = ("bfloat16", "float16")
_HEAD_DIMS = (64, 128)
_MAX_BLOCKS_SM90_FP8 = 128  # kMaxBlocksSm90Fp8 in csrc/core/forward.cpp
# The oldest driver of each CUDA major release; one release runs on every driver of its major.
_MIN_DRIVER = {12: "525.60.13", 13: "580.65.06"}
_INSTALLED = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "diffusers",
    "flash-attn",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
_LIBRARIES = ("libcuda", "libcudart", "libcudnn", "libcublas", "libnvrtc", "libtorch", "libstdc++")
_VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_MODULE_LOADING",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def _build_info() -> dict[str, str]:
    """What CMake recorded at build time; empty in a source tree that was never built."""
    try:
        module = importlib.import_module("sla2._build_info")
    except ImportError:
        return {}
    return {name: getattr(module, name) for name in vars(module) if name.isupper()}


__git_sha__: str = _build_info().get("GIT_SHA", "unknown")


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """A module, or the reason why it does not import: whatever a broken installation raises."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


# ---- where the C++ package is -----------------------------------------------------------------


def get_include() -> str:
    """The folder to compile C++ and CUDA sources against: it holds `sla2/sla2.h`.

    Raises RuntimeError where this package was not installed (a source tree that was never built).
    """
    folder = _PACKAGE_DIR / "include"
    if not (folder / "sla2" / "sla2.h").is_file():
        raise RuntimeError(f"no headers in {folder}: sla2 runs from a source tree; pip install it")
    return str(folder)


def get_cmake_dir() -> str:
    """The folder of `sla2Config.cmake`, for `cmake -Dsla2_DIR=...`; it defines `sla2::core`.

    Raises RuntimeError where the package holds no library, with the reason.
    """
    folder = _PACKAGE_DIR / "share" / "cmake" / "sla2"
    if not (folder / "sla2Config.cmake").is_file():
        raise RuntimeError(f"no C++ library in this package: {_no_core_reason()}")
    return str(folder)


def _no_core_reason() -> str:
    info = _build_info()
    if not info:
        return (
            f"{_PACKAGE_DIR} is a source tree that was never built; run `pip install .` in its "
            "parent folder and import sla2 from another one"
        )
    if info["NO_CORE_REASON"]:
        return (
            f"{info['NO_CORE_REASON']}; put nvcc on PATH or set CUDACXX and install sla2 again, or "
            "take a binary package"
        )
    return "the compiled module is missing from the package; install sla2 again"


# ---- the driver, through NVML -----------------------------------------------------------------


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _query_driver() -> dict[str, Any]:
    """Driver version, the CUDA version it supports, and every GPU it shows.

    Returns {"version", "cuda", "devices"} or {"error"}; CUDA_VISIBLE_DEVICES has no effect on it.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return {"error": "no NVIDIA driver found (libnvidia-ml.so.1 does not load)"}
    status = nvml.nvmlInit_v2()
    if status != 0:
        return {"error": f"the NVIDIA driver does not answer (nvmlInit returned {status})"}
    try:
        text = ctypes.create_string_buffer(96)
        number = ctypes.c_int(0)
        count = ctypes.c_uint(0)
        nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(96))
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number))
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        version = text.value.decode(errors="replace")
        devices = [_query_device(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    return {"version": version, "cuda": number.value, "devices": devices}


def _query_device(nvml: ctypes.CDLL, index: int) -> dict[str, Any]:
    handle = ctypes.c_void_p()
    status = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    if status != 0:
        return {"index": index, "error": f"nvmlDeviceGetHandleByIndex returned {status}"}
    name = ctypes.create_string_buffer(96)
    major, minor, memory = ctypes.c_int(0), ctypes.c_int(0), _Memory()
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return {
        "index": index,
        "name": name.value.decode(errors="replace"),
        "capability": f"{major.value}.{minor.value}",
        "memory_gib": round(memory.total / 2**30, 1),
    }


def _cuda_text(number: int) -> str:
    """13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


# ---- does it run here -------------------------------------------------------------------------


def _usable_archs(archs: str, capability: tuple[int, int]) -> list[str]:
    """The entries of "80;90a;120-virtual" whose code a device of this capability can run.

    Machine code runs on its own major and the same or a later minor; an "a" target on exactly
    its own device; PTX ("-virtual") on everything from its number on.
    """
    device = capability[0] * 10 + capability[1]
    usable = []
    for arch in filter(None, archs.split(";")):
        match = re.fullmatch(r"(\d+)([af]?)(-virtual)?", arch)
        if match is None:
            continue
        number, suffix, virtual = int(match[1]), match[2], match[3]
        if suffix == "a":
            fits = number == device
        elif virtual and not suffix:
            fits = number <= device
        else:
            fits = number // 10 == capability[0] and number <= device
        if fits:
            usable.append(arch)
    return usable


def _why_not_driver(driver: dict[str, Any], runtime: int) -> str | None:
    """Why this driver cannot run code of CUDA `runtime` (13000 is 13.0)."""
    if "error" in driver:
        return str(driver["error"])
    major = runtime // 1000
    if driver["cuda"] // 1000 >= major:
        return None
    found = f"{driver['version']} (CUDA {_cuda_text(driver['cuda'])})"
    needed = _MIN_DRIVER.get(major, f"one for CUDA {major}")
    return (
        f"the NVIDIA driver is too old: found {found}, this package was built with CUDA "
        f"{_cuda_text(runtime)} and needs driver {needed} or newer; update the driver, or build "
        f"sla2 with CUDA {driver['cuda'] // 1000}.x"
    )


def _why_not_capability(
    name: str, capability: tuple[int, int], archs: str, quant: str
) -> str | None:
    """Why no code in the package runs on this device."""
    device = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if capability < (8, 0):
        return (
            f"{device} is not supported: the kernels need 8.0 (Ampere) or newer; use the CPU path"
        )
    if quant == "int8_fp8" and capability < (8, 9):
        return f"{device} has no fp8 tensor cores (8.9 or newer has); use quant='int8_fp16'"
    suffix = "a" if capability in ((9, 0), (10, 0), (12, 0)) else ""
    remedy = f"SLA2_CUDA_ARCHS={capability[0]}{capability[1]}{suffix} pip install ."
    usable = _usable_archs(archs, capability)
    if not usable:
        return (
            f"{device}: this package holds code for {archs} only; build it for this GPU: {remedy}"
        )
    newest = max(int(re.sub(r"\D", "", arch)) for arch in usable)
    if quant == "int8_fp8" and newest < 89:
        return (
            f"{device}: of the code in this package ({archs}) {', '.join(usable)} runs here, and "
            f"quant='int8_fp8' needs code for 8.9 or newer; build it for this GPU: {remedy}, or "
            "use quant='int8_fp16'"
        )
    return None


def why_not(
    device: Any = None, *, dtype: Any = None, quant: str = "none", head_dim: int = 128
) -> str | None:
    """The reason why SLA2 attention would not run, with a remedy; None when it would.

    device: "cpu", "cuda", "cuda:1", an index or a torch.device; None asks for the current CUDA
      device. The CPU path needs neither GPU nor compiled code.
    dtype: of q, k and v, a torch.dtype or its name; None takes bfloat16.
    quant: "none", "int8_fp16" or "int8_fp8".

    Raises ValueError for a quant that does not exist and for a device that cannot be parsed.
    """
    if quant not in _QUANTS:
        raise ValueError(f"quant={quant!r}: allowed are {', '.join(map(repr, _QUANTS))}")
    kind, index = _parse_device(device)
    dtype_name = "bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
    torch, error = _load("torch")
    if torch is None:
        return f"torch does not import ({error}); install torch >= 2.6"
    if kind == "cpu":
        if dtype_name not in _CPU_DTYPES:
            return f"dtype {dtype_name}: on the CPU allowed are {', '.join(_CPU_DTYPES)}"
        return None
    if kind != "cuda":
        return f"device {kind!r}: sla2 runs on 'cpu' and on NVIDIA GPUs ('cuda')"
    reasons = []
    if dtype_name not in _CUDA_DTYPES:
        reasons.append(
            f"dtype {dtype_name}: on CUDA allowed are {', '.join(_CUDA_DTYPES)}; cast q, k and v"
        )
    if head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim {head_dim}: on CUDA allowed are 64 and 128")
    device_reason = _why_not_cuda(torch, index, dtype_name, head_dim, quant, bool(reasons))
    if device_reason is not None:
        reasons.append(device_reason)
    return "; ".join(reasons) or None


def _parse_device(device: Any) -> tuple[str, int | None]:
    """("cuda", 1) of "cuda:1", 1 or torch.device("cuda", 1)."""
    if device is None:
        return "cuda", None
    if isinstance(device, int):
        return "cuda", device
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", str(device))
    if match is None:
        raise ValueError(f"device={device!r}: allowed are 'cpu', 'cuda', 'cuda:<index>', an index")
    return match[1], None if match[2] is None else int(match[2])


def _why_not_cuda(
    torch: ModuleType, index: int | None, dtype: str, head_dim: int, quant: str, skip_core: bool
) -> str | None:
    """The first reason on the way from the compiled module to the device."""
    core, error = _load("sla2._C")
    if core is None:
        if (_PACKAGE_DIR / "lib" / "libsla2.a").is_file():
            return f"the compiled module sla2._C does not load ({error}); install sla2 again"
        return f"this sla2 has no CUDA kernels: {_no_core_reason()}"
    driver = _query_driver()
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install a CUDA build of torch, or "
            "pass CPU tensors"
        )
    if not torch.cuda.is_available():
        reason = _why_not_driver(driver, core.runtime_version())
        return reason or (
            f"torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); python -m sla2 env shows more"
        )
    if "error" not in driver and (reason := _why_not_driver(driver, core.runtime_version())):
        return reason
    count = torch.cuda.device_count()
    if index is None:
        index = torch.cuda.current_device()
    if index >= count:
        return f"device cuda:{index}: torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}"
    name = torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    reason = _why_not_capability(name, capability, core.built_archs(), quant)
    if reason is not None or skip_core:
        return reason
    # The core's own answer last: it knows its table of kernels.
    answer: str | None = core.supported(
        index, _CUDA_DTYPES.index(dtype), head_dim, _QUANTS.index(quant), 0
    )
    return None if answer is None else f"{name}: {answer}"


def why_not_sm90(
    index: int, dtype: str, head_dim: int, quant: str, num_kv_blocks: int
) -> str | None:
    """Why the Hopper kernels cannot serve such a call on that GPU, where `why_not` is None."""
    if dtype not in _CUDA_DTYPES:
        return f"path sm90: dtype {dtype} (allowed: {', '.join(_CUDA_DTYPES)})"
    core, reason = _load("sla2._C")
    if core is None:
        return reason
    arguments = (_CUDA_DTYPES.index(dtype), head_dim, _QUANTS.index(quant))
    answer: str | None = core.supported(index, *arguments, 2)
    if answer is None and quant == "int8_fp8" and num_kv_blocks > _MAX_BLOCKS_SM90_FP8:
        return (
            f"path sm90 with quant int8_fp8 takes lists of at most {_MAX_BLOCKS_SM90_FP8} key "
            f"blocks, not {num_kv_blocks}; use path auto or portable"
        )
    return answer


def is_available(
    device: Any = None, *, dtype: Any = None, quant: str = "none", head_dim: int = 128
) -> bool:
    """True when `why_not` of the same arguments finds no reason."""
    return why_not(device, dtype=dtype, quant=quant, head_dim=head_dim) is None


# ---- the report -------------------------------------------------------------------------------


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in ("sla2", *_INSTALLED):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _loaded_libraries() -> list[str]:
    """Paths of the CUDA and torch libraries mapped into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/") > 0}
    return sorted(path for path in paths if Path(path).name.startswith(_LIBRARIES))


def _find_nvcc() -> dict[str, str | None]:
    """Path of nvcc and the version of its toolkit, read from the toolkit's own header."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        candidates.append(f"{root}/bin/nvcc" if root else None)
    path = next((c for c in candidates if c and Path(c).is_file()), None)
    if path is None:
        return {"path": None, "version": None}
    header = Path(path).resolve().parent.parent / "include" / "cuda.h"
    match = None
    if header.is_file():
        match = re.search(r"#define CUDA_VERSION (\d+)", header.read_text(errors="replace"))
    return {"path": path, "version": _cuda_text(int(match[1])) if match else None}


def _torch_report() -> dict[str, Any]:
    torch, error = _load("torch")
    if torch is None:
        return {"error": error}
    report: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    try:
        report["cuda_available"] = torch.cuda.is_available()
        report["devices"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    except Exception as failure:
        report["error"] = f"{type(failure).__name__}: {failure}"
    return report


def collect_env() -> dict[str, Any]:
    """Everything a bug report needs, as a dictionary that json.dumps takes.

    Keys: sla2 (version, commit, path, compiled module, architectures, CUDA of the build), python,
    platform, installed (versions by name), torch, libraries (paths loaded in this process), driver
    (version, CUDA, devices), nvcc, variables, why_not (per quant mode, on the current device).
    Never raises: what cannot be found out is an "error" entry.
    """
    info = _build_info()
    core, core_error = _load("sla2._C")
    sla2_report = {
        "version": __version__,
        "git_sha": __git_sha__,
        "path": str(_PACKAGE_DIR),
        "module": core_error or "ok",
        "archs": core.built_archs() if core else info.get("ARCHS", ""),
        "build_cuda": info.get("CUDA_VERSION", ""),
        "runtime_version": _cuda_text(core.runtime_version()) if core else None,
    }
    driver = _query_driver()
    if "cuda" in driver:
        driver["cuda"] = _cuda_text(driver["cuda"])
    reasons: dict[str, str | None] = {}
    for quant in _QUANTS:
        try:
            reasons[quant] = why_not(quant=quant)
        except Exception as failure:
            reasons[quant] = f"{type(failure).__name__}: {failure}"
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _VARIABLES or name.startswith("SLA2_")
    }
    return {
        "sla2": sla2_report,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "installed": _installed_versions(),
        "torch": _torch_report(),
        "libraries": _loaded_libraries(),
        "driver": driver,
        "nvcc": _find_nvcc(),
        "variables": variables,
        "why_not": reasons,
    }
