"""The `sla2` command: what it prints and writes, its exit codes, and that its checks can fail."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sla2
from sla2.cli import accuracy, bench_work, files, main, selftest
from sla2.cli.bench_report import COLUMNS
from sla2.cli.bench_timing import time_call
from sla2.cli.selftest_cases import Case, cases, make_inputs
from sla2.files import write_atomically

CPU = torch.device("cpu")


def run_cli(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which the packages `without` cannot be imported."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({without!r}))\n"
        "from sla2.cli import main\n"
        f"sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(sla2.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- env, arguments and errors ----------------------------------------------------------------


def test_env_needs_the_standard_library_alone() -> None:
    done = run_cli("env", "--json", without=("torch", "numpy", "rich", "matplotlib", "PIL"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sla2"]["version"] == sla2.__version__
    assert "ModuleNotFoundError" in report["torch"]["error"]
    assert set(report["why_not"]) == {"none", "int8_fp16", "int8_fp8"}


def test_env_as_text_names_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert f"version: {sla2.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "package", "distribution"),
    [
        ("bench", "rich", "rich"),
        ("bench", "matplotlib", "matplotlib"),
        ("demo", "PIL", "pillow"),
        ("demo", "numpy", "numpy"),
        ("selftest", "rich", "rich"),
    ],
)
def test_a_missing_extra_is_named_with_its_remedy(
    command: str, package: str, distribution: str
) -> None:
    done = run_cli(command, "--device", "cpu", without=(package,))
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"package {distribution}, which is not installed" in done.stderr
    assert 'pip install "sla2[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_selftest_json_needs_no_extra() -> None:
    done = run_cli(
        "selftest", "--json", "--device", "cpu", "--filter", "N65 ", without=("rich", "matplotlib")
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--topk", "1.5"], "not in (0, 1]"),
        (["bench", "--heads", "2"], "give --seqlen too"),
        (["bench", "--device", "cpu", "--dtype", "float64"], "invalid choice"),
        (["selftest", "--filter", "no such case"], "no case has"),
        (["selftest", "--device", "tpu0"], "--device tpu0"),
        (["selftest", "--device", "meta"], "allowed are cpu"),
        (["demo", "--grid", "21x30"], "21x30x52"),
        (["demo", "--grid", "1x2x2", "--heads", "1", "--head", "1"], "there are 1 heads"),
        (["demo", "--grid", "1x2x2", "--input", "absent.png"], "absent.png is not a file"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ],
)
def test_wrong_arguments_give_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_gives_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "--refcheck" in capsys.readouterr().out


# ---- selftest ---------------------------------------------------------------------------------


def selftest_json(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, dict[str, Any]]:
    code = main(["selftest", "--device", "cpu", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_selftest_quick_passes_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = selftest_json(capsys, "--quick")
    failed = [result for result in report["results"] if not result["passed"]]
    assert (code, failed) == (0, [])
    assert report["cases"] == len(cases("quick", CPU)) and report["skipped"] == 0
    for result in report["results"]:
        names = {check["name"] for check in result["checks"]}
        assert "repeat differs" in names
        assert ("dq rel L2" in names) if "gradient" in result["name"] else ("router gap" in names)


def test_selftest_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cpu", "--filter", "N65 "]) == 0
    printed = capsys.readouterr().out
    assert "B1 H2 N65 D64 fp16 none K 1/2" in printed
    assert "passed: 1 cases, 0 failed" in printed


def _scaled(out: torch.Tensor) -> torch.Tensor:
    return out * 1.03


def _last_row_missing(out: torch.Tensor) -> torch.Tensor:
    out[:, -1] = 0.0
    return out


def _uninitialised_row(out: torch.Tensor) -> torch.Tensor:
    out[:, 7] = torch.empty_like(out[:, 7])
    return out


def _heads_mixed(out: torch.Tensor) -> torch.Tensor:
    return out + 0.0 * out.sum()


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (_scaled, "out rel L2"),
        (_last_row_missing, "out max error"),
        (_uninitialised_row, "out rel L2"),
        (_heads_mixed, "NaN leaks"),
    ],
)
def test_selftest_catches_faults_of_the_output(
    fault: Any,
    caught_by: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = sla2.sla2_attention

    def wrong(*args: Any, **options: Any) -> Any:
        result = right(*args, **options)
        if options.get("return_aux"):
            return fault(result[0]), result[1]
        return fault(result)

    monkeypatch.setattr(sla2, "sla2_attention", wrong)
    code, report = selftest_json(capsys, "--filter", "N193 D128 fp16 none")
    failed = {check["name"] for check in report["results"][0]["checks"] if not check["passed"]}
    assert code == 1 and caught_by in failed


def test_selftest_catches_changed_inputs_and_unequal_calls(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sla2.sla2_attention
    calls = []

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        calls.append(1)
        k -= 1e-3 * len(calls)
        return right(q, k, v, **options)

    monkeypatch.setattr(sla2, "sla2_attention", wrong)
    code, report = selftest_json(capsys, "--filter", "N193 D128 fp16 none")
    failed = {check["name"] for check in report["results"][0]["checks"] if not check["passed"]}
    assert code == 1 and {"inputs changed", "repeat differs"} <= failed


def test_selftest_catches_a_wrong_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sla2.sla2_attention

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        return right(q + 0.1 * (q - q.detach()), k, v, **options)

    monkeypatch.setattr(sla2, "sla2_attention", wrong)
    code, report = selftest_json(capsys, "--filter", "bf16 none K 1/9 gradient")
    failed = {check["name"] for check in report["results"][0]["checks"] if not check["passed"]}
    assert code == 1 and "dq rel L2" in failed and "dk rel L2" not in failed


def test_an_exception_is_a_failure_and_the_table_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(sla2, "route", broken)
    code, report = selftest_json(capsys, "--filter", "N520 D64 bf16 none")
    assert code == 1 and report["failed"] == len(report["results"]) == 2
    assert report["results"][0]["error"] == "RuntimeError: launch failed"


def test_poisoned_memory_is_nan_and_the_switch_goes_back() -> None:
    with selftest.poisoned_memory():
        assert torch.empty(64, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(64, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_router_check_counts_wrong_lists_and_measures_the_gap() -> None:
    case = Case(520, num_kv_blocks=3, pinned_kv=(8,))
    inputs = make_inputs(case, CPU, 0)
    dense = sla2.route(inputs.q, inputs.k, **inputs.router(case)).to_dense()

    def check(mask: torch.Tensor) -> dict[str, bool]:
        figures = accuracy.check_router(
            mask,
            inputs.q,
            inputs.k,
            proj_q=inputs.proj_q,
            proj_k=inputs.proj_k,
            num_kv_blocks=3,
            pinned_kv=(8,),
        )
        return {figure.name: figure.passed for figure in figures}

    assert check(dense) == {"router wrong lists": True, "router gap": True}
    other = dense.clone()
    row = other[0, 1, 2]
    chosen, left_out = row[:8].nonzero()[0, 0], (~row[:8]).nonzero()[0, 0]
    row[chosen], row[left_out] = False, True
    assert check(other) == {"router wrong lists": True, "router gap": False}
    unpinned = dense.clone()
    unpinned[0, 0, 0, 8] = False
    assert check(unpinned)["router wrong lists"] is False


def test_nan_fails_every_comparison() -> None:
    exact = torch.randn(4, 8)
    broken = exact.clone()
    broken[0, 0] = torch.nan
    assert not any(c.passed for c in accuracy.check_unquantised("x", broken, exact, exact))
    assert not any(c.passed for c in accuracy.check_quantised("x", broken, exact, exact))
    assert not any(c.passed for c in accuracy.check_lse(broken, exact))


# ---- bench ------------------------------------------------------------------------------------

BENCH = ["bench", "--device", "cpu", "--seqlen", "300", "--heads", "2", "--head-dim", "64"]


def test_bench_writes_rows_with_the_agreed_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*BENCH, "--topk", "0.3", "0.6", "--quant", "none", "int8_fp8", "--iters", "2"]
    arguments += ["--warmup", "1", "--peers", "--stages", "--refcheck", "--backward"]
    arguments += ["--commit", "abc", "--output", str(tmp_path / "new" / "folder")]
    assert main(arguments) == 0
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "bench.csv",
        "bench.json",
        "bench.png",
    ]

    rows = json.loads((folder / "bench.json").read_text())
    types: dict[str, Any] = {
        **dict.fromkeys(("gpu", "torch", "commit", "date", "op", "quant", "path", "dtype"), str),
        **dict.fromkeys(("B", "H", "N", "D"), int),
        **dict.fromkeys(("kept", "ms_median", "ms_min", "ms_max", "executed_tflops"), float),
        "peers": dict,
        "command": str,
    }
    for row in rows:
        assert tuple(row) == COLUMNS
        assert all(isinstance(row[name], kind) for name, kind in types.items())
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"]
        assert (row["B"], row["H"], row["N"], row["D"]) == (1, 2, 300, 64)
        assert (row["path"], row["commit"], row["cuda"]) == ("cpu", "abc", None)
        assert row["command"] == "sla2 " + " ".join(arguments)
    ops = {(row["op"], row["kept"], row["quant"]) for row in rows}
    for topk in (0.3, 0.6):
        for quant in ("none", "int8_fp8"):
            for op in ("sla2_attention", "sla2_attention_fwd_bwd", "block_sparse_attention"):
                assert (op, topk, quant) in ops
        assert {("route", topk, "none"), ("complement_linear_attention", topk, "none")} <= ops
    by_op = {row["op"]: row for row in rows}
    dense = by_op["sdpa-flash"]
    assert dense["kept"] == 1.0
    assert dense["executed_tflops"] == dense["dense_equivalent_tflops"]
    assert by_op["sla2_attention"]["peers"] == {"sdpa-flash": dense["ms_median"]}
    backward = by_op["sla2_attention_fwd_bwd"]["peers"]
    assert backward == {"sdpa-flash": by_op["sdpa-flash_fwd_bwd"]["ms_median"]}

    with (folder / "bench.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["op"] for row in table] == [row["op"] for row in rows]
    assert json.loads(table[-1]["peers"]) == rows[-1]["peers"]
    with Image.open(folder / "bench.png") as image:
        assert image.format == "PNG" and image.width > 600
    printed = capsys.readouterr().out
    assert "dense-equivalent TFLOP/s" in printed and "not run: flex" in printed


def test_bench_prints_without_an_output_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*BENCH, "--dtype", "float32", "--iters", "1", "--warmup", "0"]) == 0
    assert "sla2_attention" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_bench_refcheck_fails_on_a_wrong_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sla2.sla2_attention

    def wrong(*args: Any, **options: Any) -> Any:
        result = right(*args, **options)
        return (result[0] * 1.03, result[1]) if options.get("return_aux") else result

    monkeypatch.setattr(sla2, "sla2_attention", wrong)
    assert main([*BENCH, "--refcheck", "--iters", "1", "--warmup", "0"]) == 1
    assert "FAILED: out rel L2" in capsys.readouterr().out


def test_time_call_counts_its_calls_and_keeps_to_a_budget() -> None:
    calls: list[int] = []
    timing = time_call(lambda: calls.append(1), CPU, iters=7, warmup=2)
    assert (len(calls), timing.iterations) == (9, 7)
    assert timing.min <= timing.median <= timing.max
    slow = time_call(lambda: torch.randn(400, 400) @ torch.randn(400, 400), CPU, iters=10_000,
                     warmup=5, budget_s=1e-6)  # fmt: skip
    assert slow.iterations == 3


def test_counted_work_is_that_of_the_matrix_products() -> None:
    shape = bench_work.Shape(batch=2, heads=3, seqlen=300, head_dim=64)
    assert (shape.q_blocks, shape.kv_blocks, shape.kept_blocks(0.45)) == (3, 5, 2)
    pairs = 2 * 3 * 300 * 300
    assert bench_work.dense_flop(shape) == 2 * 2 * pairs * 64
    assert bench_work.dense_flop(shape, backward=True) == 7 * 2 * pairs * 64
    assert bench_work.sparse_flop(shape, 2) == 2 * 2 * (2 * 3 * 300 * 128) * 64
    # Five blocks hold 320 keys, of which 300 exist.
    assert bench_work.sparse_flop(shape, 5) == bench_work.dense_flop(shape)
    products = 2 * 300 * 64 * 64 + 3 * 5 * 64 * 64  # h_j and phi(Q) H; H = (1 - M) h
    assert bench_work.linear_flop(shape) == 2 * 2 * 3 * products
    assert bench_work.route_flop(shape) == 2 * 2 * 3 * ((3 + 5) * 64 * 64 + 3 * 5 * 64)


# ---- files ------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    files.write_json(path, [1])

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


# ---- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_selftest_quick_passes_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["selftest", "--device", "cuda", "--quick", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, [r for r in report["results"] if not r["passed"]]) == (0, [])
    assert report["cases"] > 0


@pytest.mark.gpu
def test_demo_on_the_gpu_is_faster_than_full_attention(tmp_path: Path) -> None:
    assert main(["demo", "--device", "cuda", "--output", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "demo.json").read_text())
    assert (summary["tokens"], summary["heads"], summary["head_dim"]) == (32760, 12, 128)
    ours = next(result for result in summary["results"] if result["name"] == "SLA2")
    assert ours["speedup"] > 2.0
