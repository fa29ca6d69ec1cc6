"""`sla2 bench --report`: the numbers page, benchmarks.md and its plots, from recorded results."""

from __future__ import annotations

import argparse
import sys
import textwrap
from functools import partial
from pathlib import Path

from sla2.cli.bench_cells import table
from sla2.cli.bench_layout import Section
from sla2.cli.bench_page_plots import digest, digest_in, draw
from sla2.cli.bench_results import Run, read_results
from sla2.cli.bench_sections import sections
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder
from sla2.cli.parser import build_parser
from sla2.files import write_atomically

DOCUMENT, PLOTS = "benchmarks.md", "benchmarks"
OWN_OPTIONS = {"command", "command_line", "report", "results", "output", "check"}

WIDTH = 120  # of a line of text, as in the other documents
HEADING = "# Benchmarks"
INTRODUCTION = (
    "Written by `sla2 bench --report` from `bench/results/*.json`; `sla2 bench --report --check` "
    "says whether it still is. To add a measurement, run the command of its section, keep the JSON "
    "file that it writes as `bench/results/NAME.json`, and write the page anew. Of rows that "
    "measure the same thing on the same machine, the newest counts.",
    "Times are milliseconds per call, routing included: median (lowest to highest). Columns named "
    "after other attention hold its median in the same run, on the same inputs, and in brackets "
    "that time over SLA2's. `sdpa-flash` and `sdpa-cudnn` are full attention in torch with "
    "FlashAttention-2 and with cuDNN; `flex` is FlexAttention with the block map given: the sparse "
    "branch alone, without routing or a linear branch.",
    "C/t, in TFLOP/s, is the operations of full attention over the time, as the paper counts. It "
    "is a speedup in disguise and not the rate of a machine.",
    "The run of a row links to its machine, command, commit and date in the [list](#runs).",
)


def run(options: argparse.Namespace) -> int:
    """0, or 1 where --check finds that the results give another page."""
    _refuse_other_options(options)
    results = Path(options.results or "bench/results").expanduser()
    folder = Path(options.output or "docs").expanduser()
    text, found = page(results)
    if options.check:
        stale = _stale(folder, text, found)
        for reason in stale:
            print(f"sla2 bench --report --check: {reason}", file=sys.stderr)
        return 1 if stale else 0
    output_folder(str(folder / PLOTS))
    written = [folder / PLOTS / f"{section.name}.png" for section in found if section.panels]
    for section, path in zip((s for s in found if s.panels), written, strict=True):
        write_atomically(path, partial(draw, section.panels))
    document = folder / DOCUMENT
    write_atomically(document, lambda path: path.write_text(text, encoding="utf-8"))
    print("wrote " + ", ".join(str(path) for path in (document, *written)))
    return 0


def page(folder: Path) -> tuple[str, list[Section]]:
    """The document of the results in `folder`, and the sections whose plots it shows."""
    results = read_results(folder)
    numbers: dict[Run, int] = {}  # in the order in which the page names them

    def cite(run: Run) -> str:
        number = numbers.setdefault(run, len(numbers) + 1)
        return f"[{run.date[:10]}, {_short(run.commit)}](#run-{number})"

    found = sections(results, cite)
    blocks = [HEADING, *INTRODUCTION]
    for section in found:
        blocks += [f"## {section.title}", section.introduction]
        if section.panels:
            blocks.append(f"![{section.title}]({PLOTS}/{section.name}.png)")
        blocks += section.blocks or [
            "Not measured. The command for it:",
            f"```bash\n{section.make}\n```",
        ]
        blocks += section.paper
    blocks += ["## Runs", _run_table(numbers)]
    return "\n\n".join(map(_wrapped, blocks)) + "\n", found


def _wrapped(block: str) -> str:
    """`block` in lines of the documents' width, unless it is a table, a picture or code."""
    if block.startswith(("|", "!", "```")):
        return block
    return textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)


def _short(commit: str) -> str:
    """Seven digits, and whether the sources were changed since."""
    digits, dash, changed = commit.partition("-")
    return digits[:7] + dash + changed


def _run_table(numbers: dict[Run, int]) -> str:
    if not numbers:
        return "None."
    cells = []
    for run, number in numbers.items():
        versions = [("torch", run.torch), ("CUDA", run.cuda), ("driver", run.driver)]
        cells.append(
            [
                *(f'<a id="run-{number}"></a>{number}', run.machine, run.date, run.commit),
                ", ".join(f"{name} {value}" for name, value in versions if value),
                f"`bench/results/{run.file}`",
                "not recorded" if run.command is None else f"`{run.command}`",
            ]
        )
    header = ["run", "machine", "date", "commit", "versions", "file", "command"]
    return table(header, cells, left=len(header))


def _stale(folder: Path, text: str, found: list[Section]) -> list[str]:
    """What in `folder` is not what the results give."""
    document, stale = folder / DOCUMENT, []
    try:
        present = document.read_text(encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot read {document}: {error.strerror}") from error
    if present != text:
        stale.append(f"{document} does not show the results")
    for section in found:
        plot = folder / PLOTS / f"{section.name}.png"
        if section.panels and digest_in(plot) != digest(section.panels):
            stale.append(f"{plot} does not show the results")
    return [f"{reason}; run: sla2 bench --report" for reason in stale]


def _refuse_other_options(options: argparse.Namespace) -> None:
    """A measurement asked for together with a report would silently not be made."""
    defaults = vars(build_parser().parse_args(["bench"]))
    given = [name for name, value in vars(options).items() if defaults.get(name, value) != value]
    others = sorted(set(given) - OWN_OPTIONS)
    if others:
        names = ", ".join("--" + name.replace("_", "-") for name in others)
        raise CliError(f"--report measures nothing and takes no {names}")
