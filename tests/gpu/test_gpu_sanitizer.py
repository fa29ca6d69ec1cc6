"""No report from compute-sanitizer on any kernel instance (T16)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sla2

TARGET = Path(__file__).with_name("sanitizer_target.py")
# Options of each tool, and of the target under it.
TOOLS: dict[str, tuple[list[str], list[str]]] = {
    # With padding memcheck sees an access just behind a buffer even where memory follows it.
    "memcheck": (["--padding", "512"], []),
    "racecheck": ([], []),
    # The complement's mask is padded to 128 query blocks, and what its padding holds is loaded with
    # the rest and never used (`test_what_memory_held_does_not_matter`): with exactly 128 query
    # blocks there is none, and all else is seen. So long a problem takes the tool minutes: once.
    "initcheck": ([], ["--seqlens", str(128 * 128 - 59), "--heads", "1", "--once"]),
    "synccheck": ([], []),
}


def run_tool(tool: str, path: str) -> str:
    """The output of the target under a tool; fails the test on any report."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH; the CUDA toolkit has it")
    package = Path(sla2.__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        # Each tensor its own allocation: the tools know nothing of the pieces of a pool.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        # auto: the Hopper kernels, and what they cannot serve besides.
        "SLA2_PATH": "auto" if path == "sm90" else path,
    }
    options = list(TOOLS[tool][1])
    if (tool, path) == ("initcheck", "sm90"):
        # The tool does not see what the copy engine writes. Of an output it reports every 32 bytes,
        # and is not done within minutes.
        options.append("--fill-outputs")
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no",
        "--print-limit", "20", *TOOLS[tool][0], sys.executable, str(TARGET), *options,
    ]  # fmt: skip
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=560,
    )  # fmt: skip
    output = result.stdout
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    assert result.returncode == 0, f"exit code {result.returncode}\n{output[-6000:]}"
    assert re.search(r"ran \d+ cases", output), output[-6000:]
    return output


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_tool_reports_nothing(tool: str, path: str) -> None:
    output = run_tool(tool, path)
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", output)
    assert summary, output[-6000:]
    for line in summary:
        assert re.match(r"0 (errors|hazards)", line), output[-6000:]
