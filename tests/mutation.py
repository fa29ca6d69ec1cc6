"""Do the tests notice? Seeds faults into a copy of the kernels, one at a time, and runs the tests.

    python tests/mutation.py --output mutation.json            # all of them
    python tests/mutation.py --only "tail mask dropped"        # --list: their names
    python tests/mutation.py --part 1/3                        # a third, for a time limit

Needs an NVIDIA GPU, nvcc, cmake, ninja, pybind11 and the test requirements. The tree itself is not
touched. For each fault the tests that should notice run first; if they pass, the fault's fallback.
The exit code is 1 where a fault survives, or where a test fails without any fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutation_faults import FAULTS, Fault

REPOSITORY = Path(__file__).resolve().parent.parent


def patched(fault: Fault, text: str) -> str:
    """The file's text with the fault; ValueError unless `old` occurs exactly once."""
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name!r}: its text occurs {text.count(fault.old)} times in {fault.file}; "
            "adapt the fault to the changed source"
        )
    return text.replace(fault.old, fault.new)


class Copy:
    """A copy of the tree with a build of its own."""

    def __init__(self, folder: Path, archs: str) -> None:
        self.root = folder / "sla2"
        self.log = folder / "log.txt"
        skipped = (".*", "build", "dist", "__pycache__", "_C*.so", "_build_info.py")
        shutil.copytree(REPOSITORY, self.root, ignore=shutil.ignore_patterns(*skipped))
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "SLA2_BUILD_PYTHON": "ON",
            "SLA2_CUDA_ARCHS": archs,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self._output(sys.executable, "-m", "pybind11", "--cmakedir"),
        }
        command = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja"]
        self._run(*command, *(f"-D{name}={value}" for name, value in options.items()))

    def _output(self, *command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log.write_text(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stdout[-3000:]}")

    def build(self) -> None:
        """Compiles what changed; the module lands beside the copied Python files."""
        self._run("cmake", "--build", "build")
        self._run("cmake", "--install", "build", "--prefix", str(self.root))

    def failures(
        self, tests: Sequence[str], timeout: int, *, path: str, all_of_them: bool
    ) -> list[str]:
        """Names of the tests that failed; by default the first one is enough."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "SLA2_PATH": path}
        options = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        if not all_of_them:
            options.append("--maxfail=1")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *tests], cwd=self.root, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [f"{tests[0]}: no end within {timeout} s"]
        self.log.write_text(done.stdout)
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode == 0:
            if not re.search(r"\d+ passed", done.stdout):
                raise RuntimeError(f"no test ran; is there a GPU?\n{done.stdout[-2000:]}")
            return []
        if done.returncode == 1 or done.returncode < 0:  # failed tests, or the process died
            return names or [f"{tests[0]}: exit code {done.returncode}"]
        raise RuntimeError(f"pytest could not run:\n{done.stdout[-3000:]}")


def try_fault(copy: Copy, fault: Fault, timeout: int) -> dict[str, Any]:
    """Seeds one fault, builds, runs its tests, and takes it out again."""
    started = time.perf_counter()
    path = copy.root / fault.file
    original = path.read_text()
    caught: list[str] = []
    try:
        path.write_text(patched(fault, original))
        copy.build()
        for tests in (fault.tests, fault.fallback):
            if tests and not caught:
                caught = copy.failures(tests, timeout, path=fault.path, all_of_them=False)
    finally:
        path.write_text(original)
    return {
        "fault": fault.name,
        "file": fault.file,
        "caught": bool(caught),
        "caught_by": caught,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts")
    parser.add_argument("--archs", default="", help="SLA2_CUDA_ARCHS (default: the local GPU)")
    parser.add_argument("--timeout", type=int, default=580, help="seconds for a run of tests (580)")
    parser.add_argument("--skip-baseline", action="store_true", help="do not run without a fault")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is named {sorted(unknown)}; --list shows the names")
    chosen = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    part = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part is {options.part!r}; allowed are 1/N to N/N")
    chosen = chosen[int(part[1]) - 1 :: int(part[2])]
    if options.list:
        for fault in chosen:
            print(f"{fault.name}: {fault.file}")
        return 0

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sla2-mutation-") as folder:
        copy = Copy(Path(folder), options.archs)
        if not options.skip_baseline:
            copy.build()
            failed = []
            for path in sorted({fault.path for fault in chosen}):
                tests = sorted({t for fault in chosen if fault.path == path for t in fault.tests})
                failed += copy.failures(tests, options.timeout, path=path, all_of_them=True)
            if failed:
                print("these tests fail without any fault:", *failed, sep="\n  ")
                return 1
        for fault in chosen:
            results.append(try_fault(copy, fault, options.timeout))
            verdict = results[-1]["caught_by"][:1] or "SURVIVED"
            print(f"{results[-1]['seconds']:7.1f} s  {fault.name}: {verdict}", flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    survived = [result["fault"] for result in results if not result["caught"]]
    print(f"{len(results) - len(survived)} of {len(results)} faults were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
