"""The rules of the source tree: layers, public headers, streams, file sizes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from package_tools import REPOSITORY, missing

CSRC = REPOSITORY / "csrc"
INCLUDE = CSRC / "include"
MAX_LINES = 500
SOURCES = sorted(
    path
    for path in CSRC.rglob("*")
    if path.suffix in {".h", ".cuh", ".hpp", ".cpp", ".cu"} or path.name.endswith(".cu.in")
)
KERNEL_SOURCES = [path for path in SOURCES if "kernels" in path.parts]
PUBLIC_HEADERS = sorted((INCLUDE / "sla2").glob("*.h"))


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", path.read_text(), re.MULTILINE)


def code_without_comments(path: Path) -> str:
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def short(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def test_there_is_something_to_check() -> None:
    assert PUBLIC_HEADERS
    assert len(SOURCES) >= 10


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_no_torch_in_csrc(path: Path) -> None:
    framework = re.compile(r"^(torch|ATen|c10|caffe2)/")
    assert [name for name in includes(path) if framework.match(name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_python_stays_in_the_bindings(path: Path) -> None:
    if path.parent.name == "python":
        assert any(name.startswith("pybind11/") for name in includes(path))
    else:
        assert [n for n in includes(path) if n == "Python.h" or n.startswith("pybind11/")] == []


@pytest.mark.parametrize("path", PUBLIC_HEADERS, ids=short)
def test_public_headers_need_the_cuda_runtime_alone(path: Path) -> None:
    allowed = {"cuda_runtime_api.h", "stddef.h", "stdint.h"}
    own = {f"sla2/{header.name}" for header in PUBLIC_HEADERS}
    assert set(includes(path)) <= allowed | own


def cuda_include() -> Path:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        # nvcc may be a wrapper: its dry run names the toolkit.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if match := re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE):
            roots.insert(0, match[1].strip())
    for root in filter(None, roots):
        for folder in (Path(root) / "include", *Path(root).glob("targets/*/include")):
            if (folder / "cuda_runtime_api.h").is_file():
                return folder
    missing("no cuda_runtime_api.h found; set CUDA_HOME")


@pytest.mark.parametrize("language", [("c", "c11"), ("c++", "c++17")], ids=["C11", "C++17"])
@pytest.mark.parametrize("path", PUBLIC_HEADERS, ids=short)
def test_public_headers_compile_alone(path: Path, language: tuple[str, str]) -> None:
    compiler = shutil.which("cc" if language[0] == "c" else "c++")
    if compiler is None:
        missing("no host compiler on PATH")
    command = [compiler, "-x", language[0], f"-std={language[1]}", "-fsyntax-only", "-Wall"]
    command += ["-Wextra", "-Werror", f"-I{INCLUDE}", "-isystem", str(cuda_include()), "-"]
    text = f"#include <sla2/{path.name}>\nint main(void) {{ return 0; }}\n"
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def launches(text: str) -> list[list[str]]:
    """The arguments between <<< and >>> of each launch, split at the top level."""
    found = []
    for match in re.finditer(r"<<<(.*?)>>>", text, re.DOTALL):
        arguments, depth = [""], 0
        for character in match[1]:
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                arguments.append("")
            else:
                arguments[-1] += character
        found.append([argument.strip() for argument in arguments])
    return found


def test_launch_parser() -> None:
    assert launches("k<<<dim3(1, 2), f(a, b), 0, stream>>>(x)") == [
        ["dim3(1, 2)", "f(a, b)", "0", "stream"]
    ]


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_every_launch_names_its_stream(path: Path) -> None:
    text = code_without_comments(path)
    for arguments in launches(text):
        assert len(arguments) == 4, f"no stream in <<<{', '.join(arguments)}>>>"
        assert arguments[3] not in {"0", "nullptr", "NULL", "cudaStreamLegacy"}
    assert not re.search(r"\bcudaStream(Legacy|PerThread)\b", text)
    # Copies without a stream run on the default one, and these wait for the device.
    assert not re.search(r"\b(cudaMemcpy|cudaMemset|cudaDeviceSynchronize)\s*\(", text)


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=short)
def test_no_allocation_in_the_library(path: Path) -> None:
    assert not re.search(r"\bcuda(Malloc|Free)\w*\s*\(", code_without_comments(path))


def listed_files() -> list[Path]:
    folders = [CSRC, *(REPOSITORY / name for name in ("sla2", "tests", "bench", "examples"))]
    suffixes = {".py", ".h", ".cuh", ".cpp", ".cu", ".in", ".c"}
    return [p for folder in folders for p in sorted(folder.rglob("*")) if p.suffix in suffixes]


def test_files_stay_readable() -> None:
    lengths = {short(path): len(path.read_text().splitlines()) for path in listed_files()}
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}


def test_third_party_holds_no_code() -> None:
    files = {path.name for path in (REPOSITORY / "third_party").rglob("*") if path.is_file()}
    assert files == {"README.md", "cutlass.cmake"}
