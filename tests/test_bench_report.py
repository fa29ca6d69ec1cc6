"""`sla2 bench --report`: the numbers page says what the results say, and refuses damaged ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from package_tools import REPOSITORY
from PIL import Image

from sla2.cli import bench_paper, main
from sla2.cli.bench_page import page
from sla2.cli.bench_page_plots import Bar, Bars, Lines, digest, digest_in, draw

Row = dict[str, Any]
NAMES = ("forward", "backward", "stage1", "stages", "scaling", "end_to_end")
TITLES = ("Forward", "Backward", "Stage 1", "Stages", "Scaling", "End to end")

PROVENANCE = {
    "gpu": "NVIDIA H200", "driver": "580.65", "torch": "2.11.0", "cuda": "13.0",
    "commit": "0123456789abcdef", "date": "2026-03-01T10:00:00+00:00",
}  # fmt: skip
COMMAND = "sla2 bench --peers"


def row(**changes: Any) -> Row:
    right = {
        **PROVENANCE, "op": "sla2_attention", "B": 1, "H": 12, "N": 32760, "D": 128, "kept": 0.03,
        "quant": "int8_fp8", "path": "sm90", "ms_median": 0.5, "ms_min": 0.4, "ms_max": 0.75,
        "peers": {"sdpa-flash": 10.0, "sdpa-cudnn": 6.0}, "dtype": "bfloat16", "command": COMMAND,
    }  # fmt: skip
    return {**right, **changes}


def case(**changes: Any) -> Row:
    sums = [("pool", 0.1), ("reduce", 0.0), ("attention", 0.3), ("all", 0.4)]
    right = {
        **{name: row()[name] for name in ("B", "H", "N", "D", "dtype", "kept", "quant", "path")},
        "whole_ms": {"median": 0.45, "min": 0.44, "max": 0.5},
        "sums": [{"group": name, "ms": ms, "floor_ms": ms / 2} for name, ms in sums],
    }
    return {**right, **changes}


def step(**changes: Any) -> Row:
    right = {
        **PROVENANCE, "op": "wan_step", "model": "1.3b", "attention": "sla2", "kept": 0.03,
        "quant": "int8_fp8", "path": "sm90", "compile": False, "ms_median": 700.0, "ms_min": 690.0,
        "ms_max": 720.0, "profile": {"self_attention_ms": 100.0, "cross_attention_ms": 20.0},
        "peak_bytes": 2**34, "command": COMMAND,
    }  # fmt: skip
    return {**right, **changes}


def stage1(**changes: Any) -> Row:
    right = row(
        op="stage1_step", kept=0.05, quant="none", path="portable", inputs="clip",
        gradients="router", listed=0.34567, iterations=5, ms_median=20.0, ms_min=19.0, ms_max=22.0,
        peers={"sdpa-flash": 70.0, "sdpa-cudnn": 42.0}, peak_extra_bytes=3 * 12 * 32760 * 128 * 5,
    )  # fmt: skip
    return {**right, **changes}


DENSE_STAGE1 = stage1(
    op="stage1_dense", kept=1.0, path="sdpa-flash", gradients="all", listed=1.0, peers={}
)
DENSE_STEP = step(attention="dense-flash", kept=1.0, quant="none", path=None, ms_median=2100.0)
EVERYTHING = {
    "forward": [row(), row(kept=0.05, ms_median=0.8)],
    "backward": [row(op="sla2_attention_fwd_bwd", ms_median=2.5, peers={"sdpa-flash": 50.0})],
    "stages": {**PROVENANCE, "command": "python bench/bench_stages.py", "cases": [case()]},
    "scaling": [row(N=n, ms_median=n / 1e4) for n in (8192, 16384, 65536)],
    "calls": [
        row(op="block_sparse_attention", ms_median=0.25, peers={}),
        row(op="route", quant="none", ms_median=0.03125, peers={}),
        row(op="complement_linear_attention", quant="none", ms_median=0.125, peers={}),
    ],
    "stage1": [DENSE_STAGE1, stage1(), stage1(gradients="all"), stage1(inputs="gaussian")],
    "steps": [step(), DENSE_STEP, step(model="14b", profile=None, peak_bytes=None)],
}


class Report:
    """A folder of results and one of documents."""

    def __init__(self, folder: Path) -> None:
        self.results, self.docs = folder / "results", folder / "docs"
        self.results.mkdir()

    def write(self, content: Any, name: str = "bench") -> Path:
        path = self.results / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def run(self, *flags: str) -> int:
        folders = ["--results", str(self.results), "--output", str(self.docs)]
        return main(["bench", "--report", *folders, *flags])

    def text(self) -> str:
        return page(self.results)[0]

    def section(self, title: str) -> str:
        return self.text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path)


def with_everything(report: Report) -> Report:
    for name, content in EVERYTHING.items():
        report.write(content, name)
    return report


# ---- the page of this repository ----------------------------------------------------------------


def test_the_page_is_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["bench", "--report", "--check"]) == 0


# ---- what it shows ------------------------------------------------------------------------------


def test_sections_stand_in_order_and_name_their_command_without_data(report: Report) -> None:
    text = report.text()
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == (*TITLES, "Runs")
    for title in TITLES:
        assert "Not measured" in report.section(title)
        assert re.search(r"^```bash\n(sla2 bench|python bench/)", report.section(title), re.M)
    assert report.run() == 0
    assert sorted(path.name for path in report.docs.rglob("*.png")) == []


def test_a_row_has_its_run_and_its_peers(report: Report) -> None:
    report.write([row()], "h200")
    section = report.section("Forward")
    assert "Not measured" not in section and "**NVIDIA H200**" in section
    run = "[2026-03-01, 0123456](#run-1)"
    cells = f"| 3 % | int8_fp8 | sm90 | {run} | 0.500 (0.400 to 0.750) | 13188 | 6.00 (12.00x) |"
    assert f"| wan1.3b-480p bfloat16 {cells} 10.0 (20.00x) |" in section  # 4 B H N^2 D / 0.5 ms
    runs = report.section("Runs")
    for part in ('<a id="run-1"></a>1', "0123456789abcdef", "2026-03-01T10:00:00+00:00"):
        assert part in runs
    assert f"`bench/results/h200.json` | `{COMMAND}` |" in runs


def test_the_papers_figures_stand_beside_ours(report: Report) -> None:
    assert "| SLA2 | 3 % | 4079 | 18.6x |\n" in report.section("Forward")
    with_everything(report)
    forward = report.section("Forward")
    assert "| FlashAttention-2 | 100 % | 219 | 1.0x | 659 |" in forward
    assert "| SLA2 | 3 % | 4079 | 18.6x | 13188 (20.0x, sm90) |" in forward
    assert "| SLA2 | 5 % | 3610 | 16.5x | 8242 (12.5x, sm90) |" in forward
    assert "The GPUs differ. NVIDIA GeForce RTX 5090: " in forward
    end = report.section("End to end")
    assert "| 62 | 97 | 7 | 2.30x | 3.00x (SLA2, 3 % kept, int8_fp8, sm90) |" in end
    assert "| Wan2.1 14B, 720p | 493 | 2550 | 207 | 4.35x |  |" in end


def test_the_papers_speedups_follow_from_its_times() -> None:
    rates = {(kernel.method, kernel.kept): kernel.tops for kernel in bench_paper.KERNELS}
    assert rates["SLA2", 0.03] / bench_paper.BASELINE.tops == pytest.approx(18.6, abs=0.05)
    speedups = {name: found.speedup for name, found in bench_paper.END_TO_END.items()}
    assert speedups == pytest.approx({"1.3b": 2.30, "14b": 4.35}, abs=5e-3)


def test_every_section_has_its_table_and_plot(report: Report) -> None:
    with_everything(report)
    assert report.run() == 0
    for name, title in zip(NAMES, TITLES, strict=True):
        assert f"![{title}](benchmarks/{name}.png)" in report.section(title)
        assert "Not measured" not in report.section(title)
        with Image.open(report.docs / "benchmarks" / f"{name}.png") as image:
            assert image.width > 500
    assert "| 2.50 (0.400 to 0.750) |" in report.section("Backward")
    stages = report.section("Stages")
    assert "| 0.031 | 0.125 | 0.250 |  |" in stages  # the whole call is of another file
    assert "| 0.450 | 0.100 (0.050) |  | 0.300 (0.150) | 0.400 (0.200) |" in stages
    scaling = report.section("Scaling")
    assert re.findall(r"B1 H12 N(\d+)", scaling) == ["8192", "16384", "65536"]
    assert "N16384" not in report.section("Forward")
    assert "| 700 (690 to 720) | 100 | 20.0 | 580 | 16.0 | 3.00x |" in report.section("End to end")
    assert "| 700 (690 to 720) |  |  |  |  |  |" in report.section("End to end")


def test_the_stages_of_one_run_stand_beside_its_whole_call(report: Report) -> None:
    report.write([row(), *EVERYTHING["calls"]])
    assert "| 0.031 | 0.125 | 0.250 | 0.500 |" in report.section("Stages")


def test_a_step_of_stage_1_has_its_inputs_peers_and_memory(report: Report) -> None:
    cpu = {"gpu": None, "cuda": None, "driver": None, "cpu": "a processor", "path": "cpu"}
    rows = [
        *(stage1(inputs="gaussian", listed=1.0, ms_median=80.0), stage1(gradients="all")),
        *(stage1(), stage1(**cpu, dtype="float32", peers={}, peak_extra_bytes=None)),
    ]
    report.write([DENSE_STAGE1, *rows])
    section = report.section("Stage 1")
    run = "[2026-03-01, 0123456](#run-1) | 12 | 32760 | 5 %"
    model = "| wan1.3b-480p bfloat16 |"
    call = "20.0 (19.0 to 22.0) | 42.0 (2.10x) | 70.0 (3.50x) | 2.50 |"
    noise = "80.0 (19.0 to 22.0) | 42.0 (0.53x) | 70.0 (0.88x) | 2.50 |"
    assert [line for line in section.splitlines() if line.startswith(model)] == [
        f"{model} clip | router | portable | {run} | 34.6 % | {call}",
        f"{model} clip | all | portable | {run} | 34.6 % | {call}",
        f"{model} gaussian | router | portable | {run} | 100.0 % | {noise}",
    ]
    assert "**a processor**" in section
    assert "| clip | router | cpu |" in section and "| 20.0 (19.0 to 22.0) |  |\n" in section
    for title in ("Forward", "Backward", "Stages", "Scaling"):
        assert "Not measured" in report.section(title)
    report.write([*rows[::-1], DENSE_STAGE1])
    assert report.section("Stage 1") == section


def test_dense_attention_of_stage_1_alone_is_no_measurement(report: Report) -> None:
    report.write([DENSE_STAGE1])
    section = report.section("Stage 1")
    assert "Not measured" in section and "python bench/bench_stage1.py" in section
    assert report.section("Runs").strip() == "None."


def test_a_wan_shape_among_the_lengths_stays_in_forward(report: Report) -> None:
    report.write([row(N=n) for n in (8192, 32760, 65536)])
    assert "wan1.3b-480p" in report.section("Forward")
    assert "N8192" not in report.section("Forward")
    assert "wan1.3b-480p" in report.section("Scaling")


def test_two_lengths_make_no_curve(report: Report) -> None:
    report.write([row(N=n) for n in (8192, 16384)])
    assert "Not measured" in report.section("Scaling")
    assert "N8192" in report.section("Forward")


def test_the_newest_row_counts(report: Report) -> None:
    newer = row(ms_median=0.45, date="2026-03-02", commit="f" * 40 + "-dirty")
    report.write([newer, row()])
    section = report.section("Forward")
    assert "0.450 (" in section and "0.500 (" not in section
    assert "[2026-03-02, fffffff-dirty](#run-1)" in section
    assert report.section("Runs").count("#") == 0 and "0123456" not in report.section("Runs")


def test_the_page_does_not_depend_on_the_order_of_rows(report: Report) -> None:
    rows = [row(N=n, kept=kept, H=h) for n in (64, 128) for kept in (0.03, 0.1) for h in (1, 2)]
    report.write(rows)
    text = report.text()
    report.write(rows[::-1])
    assert report.text() == text


def test_other_reports_are_passed_over(report: Report) -> None:
    before = report.text()
    report.write({"faults": []}, "mutation")
    report.write({"cases": 3, "results": []}, "selftest")
    report.write({"settings": {}}, "quality")
    report.write([{"op": "sla2_attention", "kernel": "pool_kernel", "ms_mean": 1.0}], "kernels")
    assert report.text() == before


# ---- --check ------------------------------------------------------------------------------------


def test_check_finds_a_stale_page_and_stale_plots(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    report.write([row()])
    assert report.run() == 0 and report.run("--check") == 0
    document, plot = report.docs / "benchmarks.md", report.docs / "benchmarks" / "forward.png"
    right = document.read_text()
    document.write_text(right.replace("0.500", "0.400"))
    assert report.run("--check") == 1
    assert f"{document} does not show the results; run: " in capsys.readouterr().err
    document.write_text(right)
    plot.write_bytes(b"no picture")
    assert report.run("--check") == 1
    assert f"{plot} does not show" in capsys.readouterr().err
    plot.unlink()
    assert report.run("--check") == 1 and not plot.exists()
    assert report.run() == 0 and report.run("--check") == 0
    report.write([row(ms_median=0.5001)])  # the same digits on the page, another bar
    assert report.run("--check") == 1
    assert document.read_text() == right


def test_check_without_a_page(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.run("--check") == 2
    assert "cannot read" in capsys.readouterr().err


# ---- refusals -----------------------------------------------------------------------------------


def without(value: Row, name: str) -> Row:
    return {key: item for key, item in value.items() if key != name}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", " is not JSON"),
        ("\x00", " is not JSON"),
        ("3", " is neither a list of rows nor a report with one of cases, faults"),
        ({"rows": []}, " is neither a list of rows"),
        ({"cases": 3}, " is neither a list of rows"),
        ([3], ", row 0 is no object but int"),
        ([row(), without(row(), "commit")], ", row 1 lacks commit"),
        ([row(ms_median="fast")], ", row 0: ms_median is 'fast', a positive number is needed"),
        ([row(ms_min=float("nan"))], ", row 0: ms_min is nan"),
        ([row(N=True)], ", row 0: N is True, a positive integer"),
        ([row(kept=1.5)], ", row 0: kept is 1.5, a share in (0, 1]"),
        ([row(date="yesterday")], ", row 0: date is 'yesterday', an ISO 8601 date"),
        ([row(date=None)], ", row 0: date is None"),
        ([row(peers={"sdpa-flash": None})], ", row 0: peers is {'sdpa-flash': None}"),
        ([row(gpu=3)], ", row 0: gpu is 3, text or null"),
        ([row(command=["sla2"])], ", row 0: command is ['sla2'], text or null"),
        ([row(gpu=None, cpu=3)], ", row 0: cpu is 3, text or null"),
        ([row(op="sla3")], ", row 0: op is 'sla3', which this page does not know"),
        ({"cases": [case()]}, " lacks gpu, driver"),
        ({**PROVENANCE, "cases": [case(sums=[{}])]}, ", case 0, sum 0 lacks group, ms, floor_ms"),
        ({**PROVENANCE, "cases": [case(whole_ms={})]}, ", case 0 lacks median, min, max"),
        ([step(compile=0)], ", row 0: compile is 0, true or false"),
        ([without(step(), "profile")], ", row 0 lacks profile"),
        ([stage1(inputs="video")], ", row 0: inputs is 'video', one of clip, gaussian is needed"),
        ([stage1(gradients=["all"])], ", row 0: gradients is ['all'], one of router, all"),
        ([stage1(listed=0)], ", row 0: listed is 0, a share in (0, 1]"),
        ([stage1(), without(stage1(), "listed")], ", row 1 lacks listed"),
        ([stage1(peers=None)], ", row 0: peers is None, an object of positive milliseconds"),
        ([stage1(iterations=0)], ", row 0: iterations is 0, a positive integer"),
        ([stage1(peak_extra_bytes=-1)], ", row 0: peak_extra_bytes is -1, a positive integer or"),
        ([without(DENSE_STAGE1, "inputs")], ", row 0 lacks inputs"),
        ([step(profile={})], ", row 0, profile lacks self_attention_ms, cross_attention_ms"),
    ],
)
def test_damaged_results_are_refused_by_file_and_field(
    content: Any, words: str, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    path = report.write(content)
    assert report.run() == 2
    assert f"sla2 bench: {path}{words}" in capsys.readouterr().err
    assert not report.docs.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check"], "--check and --results belong to --report"),
        (["--results", "."], "--check and --results belong to --report"),
        (["--report", "--results", "absent"], "absent is no folder of results"),
        (["--report", "--peers", "--topk", "0.1"], "takes no --peers, --topk"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


# ---- plots --------------------------------------------------------------------------------------


def bars() -> Bars:
    return Bars("one", [Bar("a", {"call": 1.0}, (0.9, 1.1)), Bar("b", {"call": 9.0}, peer=True)])


def stacked() -> Bars:
    return Bars("parts", [Bar("a", {"route": 1.0, "attention": 2.0}), Bar("b", {"route": 1.0})])


def lines() -> Lines:
    return Lines("length", {"SLA2": {1024: 1.0, 4096: 3.0}, "dense": {1024: 2.0}})


@pytest.mark.parametrize("panel", [bars, stacked, lines])
def test_a_plot_carries_the_digest_of_what_it_shows(
    panel: Callable[[], Bars | Lines], tmp_path: Path
) -> None:
    path = tmp_path / "plot.png"
    assert digest_in(path) is None
    draw([panel()], path)
    assert digest_in(path) == digest([panel()])
    assert digest_in(path) != digest([panel()._replace(title="another")])
