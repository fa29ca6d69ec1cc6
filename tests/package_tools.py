"""The installed package and the tools that look into it, for the packaging and the build tests.

What is tested is what was installed, never the source tree: it is asked for from another folder.
SLA2_WHEEL=path of a wheel tests that instead. With SLA2_REQUIRE_BUILD=1 (CI sets it where nvcc is)
a missing library or tool fails the tests that would be skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
_LOCATE = (
    "import sla2, sla2.env as e, json, pathlib;"
    "print(json.dumps([str(pathlib.Path(e.__file__).parent), e._build_info()]))"
)


def missing(what: str) -> NoReturn:
    """Skips the test that needs `what`, or fails it where it must be there."""
    if os.environ.get("SLA2_REQUIRE_BUILD") == "1":
        pytest.fail(f"SLA2_REQUIRE_BUILD=1, and {what}")
    pytest.skip(what)


@dataclass(frozen=True)
class Package:
    """An installed sla2: its folder, the folder that holds it, and what its build recorded."""

    folder: Path
    site: Path
    info: dict[str, str]

    @property
    def module(self) -> Path:
        found = sorted(self.folder.glob("_C*.so"))
        if not found:
            missing(f"the installed sla2 has no CUDA code: {self.info.get('NO_CORE_REASON')}")
        return found[0]

    @property
    def library(self) -> Path:
        path = self.folder / "lib" / "libsla2.a"
        if not path.is_file():
            missing(f"the installed sla2 has no CUDA code: {self.info.get('NO_CORE_REASON')}")
        return path

    def run(self, code: str, without: tuple[str, ...] = ()) -> str:
        """What `code` prints in a fresh interpreter that cannot import the modules `without`."""
        blocked = "".join(f"sys.modules[{name!r}] = None;" for name in without)
        prefix = f"import sys; sys.path.insert(0, {str(self.site)!r}); {blocked}"
        return run_python(prefix + code)


def run_python(code: str) -> str:
    # -I: neither the current folder nor PYTHONPATH can put the source tree in front.
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def find_package(scratch: Path) -> Package:
    """The wheel of SLA2_WHEEL, unpacked into `scratch`, else the installed package."""
    prefix = ""
    if wheel := os.environ.get("SLA2_WHEEL"):
        zipfile.ZipFile(wheel).extractall(scratch)
        prefix = f"import sys; sys.path.insert(0, {str(scratch)!r});"
    elif not run_python("import importlib.util as u; print(u.find_spec('sla2') or '')"):
        missing("sla2 is not installed; run: pip install .")
    folder_text, info = json.loads(run_python(prefix + _LOCATE))
    if not info:
        missing(f"{folder_text} was never built; run: pip install .")
    folder = Path(folder_text)
    return Package(folder, folder.parent, info)


def cuda_tool(name: str) -> tuple[str, dict[str, str]]:
    """Path of cuobjdump or nvdisasm, from PATH or its PyPI package, and an environment for it."""
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders += [str(path.parent) for path in Path(root).glob(f"*/bin/{name}")]
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([*folders, environment.get("PATH", "")])
    path = shutil.which(name, path=environment["PATH"])
    if path is None:
        missing(f"{name} is not there; run: pip install nvidia-cuda-{name}")
    return path, environment


def cuobjdump(*arguments: str) -> str:
    path, environment = cuda_tool("cuobjdump")
    if "-sass" in arguments:
        cuda_tool("nvdisasm")  # cuobjdump starts it
    result = subprocess.run(
        [path, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
