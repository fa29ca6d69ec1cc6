"""Choice of the device, and what to record about it with a measurement."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sla2 import env, ops
from sla2.cli.errors import CliError

# What `auto` runs where sm90 has a router for a call and no attention kernel.
ROUTED_BY_SM90 = "sm90 + portable"


def pick_device(name: str | None) -> torch.device:
    """`name`, or without one the GPU where the kernels run on it, else the CPU."""
    if name is None:
        return torch.device("cuda" if env.why_not("cuda") is None else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CliError(f"--device {name}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise CliError(f"--device {name}: allowed are cpu, cuda and cuda:<index>")
    reason = env.why_not(device)
    if reason is not None:
        raise CliError(f"--device {name}: {reason}")
    return device


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def use_path(device: torch.device, path: str) -> Iterator[None]:
    """Forces the kernels of that path inside the block; on a CPU there is nothing to choose.

    Gradients are then computed on the calling thread: autograd's own threads would choose anew.
    """
    if device.type == "cpu" or path == "auto":
        yield
        return
    with torch.autograd.set_multithreading_enabled(False), ops.kernel_path(path):
        yield


def path_in_use(
    device: torch.device, path: str, quant: str, num_kv_blocks: int, *, routed: bool
) -> str:
    """Whose kernels a call runs under `use_path`: "cpu", "portable", "sm90" or ROUTED_BY_SM90.

    num_kv_blocks: K; routed: the call makes its block lists itself, besides the attention.
    """
    if device.type == "cpu":
        return "cpu"
    chosen = _chosen(path)
    if chosen != "auto":
        return chosen

    def served(precision: str) -> bool:  # whatever the dtype and head_dim
        index = _index(device)
        return env.why_not_sm90(index, "bfloat16", 64, precision, num_kv_blocks) is None

    if served(quant):
        return "sm90"
    return ROUTED_BY_SM90 if routed and served("none") else "portable"


def why_not_path(
    device: torch.device, path: str, dtype: str, head_dim: int, quant: str, num_kv_blocks: int
) -> str | None:
    """Why the kernels of `path` cannot serve such a call on a device that sla2 runs on, or None."""
    if device.type == "cpu" or _chosen(path) != "sm90":
        return None
    return env.why_not_sm90(_index(device), dtype, head_dim, quant, num_kv_blocks)


def require_served(
    device: torch.device, path: str, dtype: str, head_dim: int, quant: str, num_kv_blocks: int
) -> None:
    """Raises CliError where the device, or the kernels of `path`, cannot serve such calls.

    num_kv_blocks: the longest lists asked for.
    """
    reason = env.why_not(device, dtype=dtype, head_dim=head_dim, quant=quant)
    if reason is None:
        reason = why_not_path(device, path, dtype, head_dim, quant, num_kv_blocks)
    if reason is not None:
        raise CliError(f"quant {quant} on {device}: {reason}")


def _chosen(path: str) -> str:
    return ops.current_path() if path == "auto" else path


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def clear_tf32() -> None:
    """The reference needs full float32 products; TF32 has 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def query_gpu(device: torch.device, *fields: str) -> dict[str, str] | None:
    """Properties as nvidia-smi gives them; None where it is missing or does not know the device."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid is not None else []
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *which]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=False))


def clocks_mhz(device: torch.device) -> dict[str, int] | None:
    """Present and highest clocks of the GPU; None where nvidia-smi does not tell."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
    values = query_gpu(device, *fields)
    if values is None or not all(values.get(field, "").isdigit() for field in fields):
        return None
    names = ("sm", "mem", "max_sm", "max_mem")
    return {name: int(values[field]) for name, field in zip(names, fields, strict=True)}


def provenance(device: torch.device, commit: str | None) -> dict[str, Any]:
    """gpu, driver, torch, cuda, commit and date of a measurement."""
    driver = (query_gpu(device, "driver_version") or {}).get("driver_version")
    return {
        "gpu": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit the package was built from, or the checkout's present one, "-dirty" if changed."""
    if env.__git_sha__ != "unknown":
        return env.__git_sha__
    git = shutil.which("git")
    root = Path(__file__).resolve().parents[2]
    if git is None or not (root / ".git").exists():
        return "unknown"
    command = [
        git,
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
