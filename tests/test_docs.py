"""What the documentation says is so: commands, links, code, names, and the measured numbers."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from package_tools import REPOSITORY, missing
from test_layering import cuda_include

import sla2
import sla2.train
from sla2.cli.parser import build_parser

README = REPOSITORY / "README.md"
API = REPOSITORY / "docs" / "api.md"
CPP = REPOSITORY / "docs" / "cpp.md"
HEADER = REPOSITORY / "csrc" / "include" / "sla2" / "sla2.h"
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".cmake", ".in", ".txt", ".toml"}


def short(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def shell_lines() -> list[tuple[str, str]]:
    """(document, line) of every line in a bash block."""
    blocks = [(short(path), text) for path in DOCUMENTS for text in code_blocks(path, "bash")]
    return [(name, line) for name, text in blocks for line in text.splitlines() if line.strip()]


def sources() -> str:
    """The text of all sources, tests of the documentation apart."""
    folders = ("sla2", "csrc", "cmake", "tests", "bench", "third_party")
    files = [p for name in folders for p in (REPOSITORY / name).rglob("*") if p.is_file()]
    files += [REPOSITORY / "CMakeLists.txt", REPOSITORY / "pyproject.toml"]
    own = Path(__file__).resolve()
    return "\n".join(
        p.read_text(errors="replace")
        for p in files
        if p.suffix in SOURCE_SUFFIXES and p.resolve() != own
    )


def test_there_is_something_to_check() -> None:
    assert len(DOCUMENTS) >= 8 and len(EXAMPLES) >= 2
    assert len(code_blocks(README, "python")) == 1 and len(code_blocks(CPP, "cpp")) == 1
    assert len(shell_lines()) >= 10


# ---- commands -----------------------------------------------------------------------------------


def test_the_test_command_is_what_ci_runs() -> None:
    match = re.search(r"^test_command='(.*)'$", (REPOSITORY / ".ci" / "run").read_text(), re.M)
    assert match is not None
    assert ("README.md", match[1]) in shell_lines()


def test_the_readme_installs_and_runs_in_one_line_each() -> None:
    lines = [line for name, line in shell_lines() if name == "README.md"]
    assert lines == ['pip install ".[cli]" && sla2 demo', 'pip install ".[test]" && pytest']
    extras = set(re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.M))
    used = re.findall(r"pip install (?:-e )?\"\.\[(\w+)\]\"", "\n".join(lines))
    assert set(used) == {"cli", "test"} <= extras


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Arguments of every call of `program` in the documents: bash blocks and inline code."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        lines = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        lines += [line for name, line in shell_lines() if name == short(path)]
        for line in lines:
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part, comments=True)
                # The last one, as a profiler's arguments come before it; no argument of a script.
                scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
                words = words[: min(scripts) + 1] if program == "sla2" and scripts else words
                places = [i for i, word in enumerate(words) if word == program]
                if places:
                    start = places[-1] + 1
                    found.append((short(path), words[start:]))
    return found


def test_commands_of_the_command_line_parse() -> None:
    calls = [(name, words) for name, words in commands("sla2") if words]
    assert len(calls) >= 10
    for name, words in calls:
        try:
            build_parser().parse_args(words)
        except (SystemExit, argparse.ArgumentError) as error:
            raise AssertionError(f"{name}: sla2 {' '.join(words)}") from error


def test_scripts_that_are_called_exist() -> None:
    calls = [(name, words) for name, words in commands("python") if words and words[0] != "-c"]
    assert len(calls) >= 2
    for name, words in calls:
        if words[0] not in ("-m", "-O"):
            assert (REPOSITORY / words[0]).is_file(), f"{name}: python {' '.join(words)}"


def test_named_tests_exist() -> None:
    named = {
        match
        for path in DOCUMENTS
        for match in re.findall(r"(tests/test_\w+\.py)::(\w+)", path.read_text())
    }
    assert len(named) >= 10
    for file, function in sorted(named):
        text = (REPOSITORY / file).read_text()
        assert f"def {function}(" in text, f"{file}::{function}"


# ---- links and names ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_relative_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    relative = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in relative if not (path.parent / link).exists()] == []


def test_every_document_is_reached_from_the_readme() -> None:
    text = README.read_text()
    for path in DOCUMENTS[1:]:
        assert f"]({short(path)})" in text


def documented_names(path: Path) -> set[str]:
    """What follows `sla2.` in code; `sla2.h` is a file and NVTX ranges are in profiling.md."""
    text = path.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + code_blocks(path, "python")
    names = {m for piece in code for m in re.findall(r"(?<![\w./])sla2\.(\w+)", piece)}
    return names - {"h"}


def test_every_public_name_is_documented() -> None:
    assert set(sla2.__all__) - documented_names(API) == set()


def test_every_name_for_training_is_documented() -> None:
    """sla2.train has all of it, what the package itself has included."""
    names = set(sla2.train.__all__)
    assert {"fit_router", "param_groups", "set_stage"} <= names
    for name in names & set(sla2.__all__):
        assert getattr(sla2.train, name) is getattr(sla2, name)
    section = API.read_text().partition("## Recording for stage 1")[2].partition("\n## ")[0]
    assert names - set(re.findall(r"`(\w+)`", section)) == set()


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "profiling.md"], ids=short)
def test_documented_names_exist(path: Path) -> None:
    for name in documented_names(path):
        module = importlib.util.find_spec(f"sla2.{name}")
        assert module is not None or hasattr(sla2, name), f"sla2.{name}"


def test_documented_operators_exist() -> None:
    from sla2 import ops, ops_bwd, ops_soft, rotary

    assert ops and ops_bwd and ops_soft and rotary  # importing them registers the operators
    (line,) = re.findall(r"`torch\.ops\.sla2\.route`.*?`soft_bwd`", API.read_text(), re.DOTALL)
    names = [name.removeprefix("torch.ops.sla2.") for name in re.findall(r"`([\w.]+)`", line)]
    assert len(names) == 6
    for name in names:
        assert hasattr(torch.ops.sla2, name)


def test_variables_exist() -> None:
    text = sources()
    named = {m for p in DOCUMENTS for m in re.findall(r"\bSLA2_[A-Z0-9_]+\b", p.read_text())}
    assert {"SLA2_CUDA_ARCHS", "SLA2_NVTX", "SLA2_PATH"} <= named
    assert {name for name in named if name not in text} == set()


def test_documented_kernels_exist() -> None:
    kernels = re.findall(r"\b(\w+_kernel)\b\(", sources())
    named = re.findall(r"\b(\w+_kernel)\b", (REPOSITORY / "docs" / "profiling.md").read_text())
    assert len(set(named)) >= 8
    assert set(named) - set(kernels) == set()


# ---- signatures ---------------------------------------------------------------------------------


def stubs() -> list[ast.FunctionDef | ast.ClassDef]:
    """The definitions in the Python blocks of docs/api.md."""
    nodes = [node for text in code_blocks(API, "python") for node in ast.parse(text).body]
    return [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def stub_parameters(node: ast.FunctionDef) -> list[tuple[str, bool, Any]]:
    """(name, keyword-only, default) of each parameter; inspect's `empty` without default."""
    positional, empty = node.args.args, inspect.Parameter.empty
    padding: list[ast.expr | None] = [None] * (len(positional) - len(node.args.defaults))
    defaults = [*padding, *node.args.defaults, *node.args.kw_defaults]
    names = [(a.arg, False) for a in positional] + [(a.arg, True) for a in node.args.kwonlyargs]
    values = [empty if d is None else ast.literal_eval(d) for d in defaults]
    return [(name, kind, value) for (name, kind), value in zip(names, values, strict=True)]


def real_parameters(function: Any) -> list[tuple[str, bool, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind is p.KEYWORD_ONLY, p.default) for p in parameters]


FUNCTIONS = [node for node in stubs() if isinstance(node, ast.FunctionDef)]
CLASSES = [node for node in stubs() if isinstance(node, ast.ClassDef)]


def test_signatures_cover_the_public_api() -> None:
    described = {node.name for node in (*FUNCTIONS, *CLASSES)}
    assert described == set(sla2.__all__) - {"__version__", "__git_sha__", "reference"}


@pytest.mark.parametrize("node", FUNCTIONS, ids=lambda node: node.name)
def test_documented_signature(node: ast.FunctionDef) -> None:
    assert stub_parameters(node) == real_parameters(getattr(sla2, node.name))


@pytest.mark.parametrize("node", CLASSES, ids=lambda node: node.name)
def test_documented_class(node: ast.ClassDef) -> None:
    cls = getattr(sla2, node.name)
    fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
    if fields:
        assert tuple(fields) == cls._fields
        return
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    for name, method in methods.items():
        member = inspect.getattr_static(cls, name)
        marks = [d.id for d in method.decorator_list if isinstance(d, ast.Name)]
        assert isinstance(member, property) == ("property" in marks)
        assert isinstance(member, classmethod) == ("classmethod" in marks)
        if not isinstance(member, property):
            real = real_parameters(getattr(cls, name))
            stub = stub_parameters(method)
            assert (stub[1:] if "classmethod" in marks else stub) == real
    inherited = dir(torch.nn.Module) if issubclass(cls, torch.nn.Module) else ()
    hooks = set(inherited) - {"forward"}
    public = {name for name in vars(cls) if not name.startswith("_")} - hooks
    assert set(methods) - {"__init__"} == public


# ---- Python code --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=short)
def test_python_code_compiles(path: Path) -> None:
    for text in code_blocks(path, "python"):
        compile(text, str(path), "exec")


def test_the_usage_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = code_blocks(README, "python")
    assert len(text.splitlines()) <= 10
    text = re.sub(r'"cuda" if sla2.is_available\(\) else "cpu"', '"cpu"', text)
    assert 'device = "cpu"' in text
    names: dict[str, Any] = {}
    exec(compile(text, "README.md", "exec"), names)
    assert names["out"].shape == names["q"].shape and names["out"].dtype == torch.bfloat16
    assert bool(names["out"].isfinite().all())
    assert "10% of the key blocks" in capsys.readouterr().out


def test_the_training_loop_lowers_the_loss() -> None:
    """docs/algorithm.md, stage 1."""
    (text,) = code_blocks(REPOSITORY / "docs" / "algorithm.md", "python")
    names: dict[str, Any] = {}
    exec(compile(text, "algorithm.md", "exec"), names)
    q, k, v = torch.randn(3, 1, 512, 2, 16)
    attention = sla2.SLA2Attention(2, 16, seq_len=512, topk=0.25, alpha_init=0.5)
    attention.set_stage(1)
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    before = (attention(q, k, v) - full).square().mean().item()
    names["train_router"](attention, [(q, k, v)] * 20, lr=1e-2)
    assert attention.stage == 2 and bool(attention.proj_q_delta.any())
    attention.set_stage(1)
    assert (attention(q, k, v) - full).square().mean().item() < before


SMALL = {
    "attention_in_a_block.py": ["--grid", "3x8x10", "--heads", "2"],
    "compare_with_dense.py": ["--tokens", "300", "--topk", "0.3", "1.0"],
}


# tests/test_examples_training.py runs these
TRAINING = {"fit_stage1.py", "run_folder.py", "train_stage2.py"}


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.name not in TRAINING], ids=short)
def test_examples_run(path: Path) -> None:
    command = [sys.executable, str(path), "--device", "cpu", *SMALL[path.name]]
    environment = {**os.environ, "PYTHONPATH": str(Path(sla2.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    if path.name == "compare_with_dense.py":
        # Every block kept is dense attention.
        *_, error, sparse, _ = done.stdout.splitlines()[-1].split()
        assert float(error) <= 1e-4 and float(sparse) <= 1e-4
    else:
        assert "gradient norm of alpha_offset" in done.stdout


# ---- C++ ----------------------------------------------------------------------------------------


def test_the_c_interface_is_documented() -> None:
    header, text = HEADER.read_text(), CPP.read_text()
    code = re.sub(r"//[^\n]*", "", header)
    public = set(re.findall(r"\bsla2_\w+", code)) | set(re.findall(r"^\s+(SLA2_\w+) =", code, re.M))
    public |= {"SLA2_BLOCK_Q", "SLA2_BLOCK_K", "SLA2_MAX_SEQLEN"}
    assert len(public) >= 25
    assert {name for name in public if not re.search(rf"\b{name}\b", text)} == set()
    cmake = {"sla2_CUDA_ARCHS", "sla2_CUDA_VERSION", "sla2_GIT_SHA", "sla2_DIR"}
    named = set(re.findall(r"\bsla2_\w+", text)) - cmake
    assert named - public == set()


def test_fields_in_the_documents_exist() -> None:
    header = HEADER.read_text()
    section = CPP.read_text().partition("## Structs")[2].partition("## Errors")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    fields = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert {"quant", "alpha_logit", "stream"} <= fields
    assert {name for name in fields if not re.search(rf"\b{name}\b", header)} == set()


def test_the_cpp_code_compiles() -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        missing("no host compiler on PATH")
    (text,) = code_blocks(CPP, "cpp")
    command = [compiler, "-x", "c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{HEADER.parents[1]}", "-isystem", str(cuda_include()), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_cmake_code_is_that_of_the_tested_project() -> None:
    (text,) = code_blocks(CPP, "cmake")
    project = (REPOSITORY / "tests" / "cpp" / "CMakeLists.txt").read_text()
    for call in ("find_package", "target_link_libraries"):
        (line,) = re.findall(rf"^{call}\(.*\)$", text, re.M)
        assert line in project


# ---- measured numbers ---------------------------------------------------------------------------


def load_readme_table() -> ModuleType:
    path = REPOSITORY / "bench" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme_table = load_readme_table()


def test_measured_block_is_current() -> None:
    assert readme_table.main(["--check"]) == 0


def measured_row(**changes: Any) -> dict[str, Any]:
    right = {
        "gpu": "NVIDIA H200", "driver": "580.65", "torch": "2.11.0", "cuda": "13.0",
        "commit": "0123456789abcdef", "date": "2026-03-01T10:00:00+00:00", "op": "sla2_attention",
        "B": 1, "H": 12, "N": 32760, "D": 128, "kept": 0.03, "quant": "int8_fp8",
        "path": "portable", "ms_median": 1.2345, "ms_min": 1.2, "ms_max": 1.3,
        "peers": {"sdpa-cudnn": 10.5}, "dtype": "bfloat16", "command": "sla2 bench --peers",
    }  # fmt: skip
    return {**right, **changes}


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """Writes rows as a file of results; calls the script on a README of its own."""
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- measured -->\n<!-- /measured -->\nafter\n")
    (tmp_path / "results").mkdir()

    class Table:
        text = staticmethod(readme.read_text)

        @staticmethod
        def write(content: Any, name: str = "bench.json") -> None:
            (tmp_path / "results" / name).write_text(json.dumps(content))

        @staticmethod
        def run(*flags: str) -> int:
            paths = ["--readme", str(readme), "--results", str(tmp_path / "results")]
            return int(readme_table.main([*flags, *paths]))

    return Table


def test_table_shows_the_rows(table: Any) -> None:
    table.write([
        measured_row(),
        measured_row(op="sla2_attention_fwd_bwd", quant="none", peers={}, ms_median=7.5),
        measured_row(op="route", ms_median=0.0625),
        measured_row(gpu=None, cpu="EPYC", path="cpu", command=None, ms_median=212.4),
    ])  # fmt: skip
    assert table.run("--check") == 1
    assert table.run() == 0 and table.run("--check") == 0
    text = table.text()
    assert text.startswith("before\n<!-- measured -->\n")
    assert text.endswith("<!-- /measured -->\nafter\n")
    row = "| forward | B1 H12 N32760 D128 bfloat16 | 3 % | int8_fp8 | portable |"
    assert f"{row} 1.23 (1.20 to 1.30) | 10.5 |" in text
    assert "| forward + backward |" in text and "0.06" not in text
    assert "**NVIDIA H200**" in text and "**EPYC**" in text and "212 (" in text
    assert "- `sla2 bench --peers`, `bench/results/bench.json`: commit 0123456789ab, " in text
    assert "2026-03-01, torch 2.11.0, CUDA 13.0, driver 580.65" in text


def test_table_takes_the_newest_row_of_a_case(table: Any) -> None:
    table.write([measured_row(ms_median=1.11, date="2026-03-02T00:00:00+00:00")])
    table.write([measured_row(ms_median=2.22)], "older.json")
    assert table.run() == 0
    assert "1.11 (" in table.text() and "2.22" not in table.text()


def test_table_leaves_other_cases_to_the_page(table: Any) -> None:
    """Lengths that are no model's, and portable kernels where a call takes others."""
    table.write([
        measured_row(ms_median=1.11), measured_row(path="sm90", ms_median=2.22),
        measured_row(quant="int8_fp16", ms_median=3.33), measured_row(N=8192, ms_median=4.44),
    ])  # fmt: skip
    assert table.run() == 0
    shown = [x for x in ("1.11 (", "2.22 (", "3.33 (", "4.44 (") if x in table.text()]
    assert shown == ["2.22 (", "3.33 ("]


def test_table_without_results_says_so(table: Any) -> None:
    table.write({"passed": True}, "selftest.json")
    table.write([{"op": "sla2_attention", "kernel": "pool", "ms_mean": 0.1}], "kernels.json")
    assert table.run() == 0
    assert "No measurement of this version is recorded" in table.text()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"op": "sla2_attention"}, "lacks gpu"),
        (measured_row(ms_min="1"), "ms_min is '1'"),
        (measured_row(peers=None), "peers is None"),
        (5, "no object"),
    ],
)
def test_table_refuses_broken_rows(
    table: Any, row: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write([row])
    before = table.text()
    assert table.run() == 2 and table.text() == before
    message = capsys.readouterr().err
    assert words in message and "bench.json, row 0" in message


def test_table_needs_its_markers() -> None:
    for text in ("", "<!-- /measured --> <!-- measured -->", "<!-- measured -->" * 2):
        with pytest.raises(readme_table.BadResults, match="each once"):
            readme_table.updated(text, "")
