"""Trains a small video diffusion transformer with full attention, SLA2 and its ablations.

    python bench/quality/run.py --output quality             # all of it, on the GPU
    python bench/quality/run.py --output quality --minutes 9 # start no new part after 9 minutes
    python bench/quality/run.py --output smoke --smoke       # toy size, on the CPU
    python bench/quality/run.py --report                     # docs/quality.md from the results

The same command goes on where the last one stopped, at the last part or checkpoint. Parts of stage
2 are independent, so several processes may share a folder once `--only base stage1` is done,
each with its own `--only` and device:

    python bench/quality/run.py --output quality --device cuda:1 --only sla2:0 sla2:1 sla2:2
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quality.report import document
from quality.results import BadResults, gather, missing_parts, read_results
from quality.study import SMOKE, VARIANTS, Settings, Study, Variant
from sla2.cli.device import pick_device
from sla2.cli.errors import CliError
from sla2.cli.files import output_folder, write_json
from sla2.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "h200_quality.json"
DOCUMENT = ROOT / "docs" / "quality.md"
TUNABLE = tuple(f.name for f in fields(Settings) if f.type in ("int", "float"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small video transformer with SLA2 and what it is compared to.",
        epilog="Every number of `Settings` in bench/quality/study.py is an option too.",
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder of the run, new or to go on in")
    parser.add_argument("--smoke", action="store_true", help="toy size: seconds on a CPU")
    parser.add_argument("--device", help="cpu, cuda or cuda:<index>; default: the GPU if it works")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="base, stage1, <variant> or <variant>:<seed>"
    )
    parser.add_argument("--minutes", type=float, help="start no part after so many")
    parser.add_argument("--commit", help="of the code, where it cannot be told from a checkout")
    for name in TUNABLE:
        option = f"--{name.replace('_', '-')}"
        kind = type(getattr(Settings(), name))
        parser.add_argument(option, type=kind, help=argparse.SUPPRESS)
    report = parser.add_argument_group("the document")
    report.add_argument("--report", action="store_true", help="write it; nothing is trained")
    report.add_argument("--check", action="store_true", help="with --report: exit 1 if it is stale")
    report.add_argument("--results", type=Path, default=RESULTS, help="quality.json of a run")
    report.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(argv)
    if options.report == (options.output is not None):
        parser.error("either --output FOLDER or --report is needed")
    return options


def write_report(options: argparse.Namespace) -> int:
    """0, or 1 where --check finds another text than the results give."""
    results, source = None, ""
    if options.results.exists():
        results = read_results(options.results)
        path = options.results.resolve()
        source = path.relative_to(ROOT).as_posix() if ROOT in path.parents else path.name
    text = document(results, source)
    if not options.check:
        write_atomically(options.document, lambda path: path.write_text(text, encoding="utf-8"))
        return 0
    if options.document.exists() and options.document.read_text(encoding="utf-8") == text:
        return 0
    print(
        f"{options.document} does not show {options.results}; run: python bench/quality/run.py "
        "--report",
        file=sys.stderr,
    )
    return 1


def open_study(options: argparse.Namespace) -> Study:
    """Raises CliError where the folder belongs to a run with other settings."""
    given = {name: getattr(options, name) for name in TUNABLE}
    settings = replace(
        SMOKE if options.smoke else Settings(), **{k: v for k, v in given.items() if v is not None}
    )
    device = pick_device(options.device or ("cpu" if options.smoke else None))
    folder = output_folder(options.output)
    path = folder / "settings.json"
    wanted = json.loads(json.dumps({**asdict(settings), "device": device.type}))
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if saved.get(name) != value:
                raise CliError(
                    f"{folder} holds a run with {name}={saved.get(name)}; now it is {value}. "
                    "Choose another folder, or go on with the settings it was begun with"
                )
    else:
        write_json(path, wanted)
    return Study(folder, settings, device, options.commit)


def parts(study: Study) -> dict[str, Callable[[], None]]:
    """Everything to compute, in order."""
    found: dict[str, Callable[[], None]] = {
        "base": study.train_base,
        "stage1": study.fit_stage1,
    }
    for seed in range(study.settings.seeds):
        for variant in VARIANTS:

            def fine_tune(variant: Variant = variant, seed: int = seed) -> None:
                study.fine_tune(variant, seed)

            found[f"{variant.name}:{seed}"] = fine_tune
    return found


def run(options: argparse.Namespace) -> int:
    """0 where everything asked for is done, 3 where --minutes ended it."""
    began = time.monotonic()
    study = open_study(options)
    found = parts(study)
    names = {name for part in found for name in (part, part.partition(":")[0])}
    if unknown := sorted(set(options.only or ()) - names):
        raise CliError(f"--only {' '.join(unknown)}: there are {', '.join(sorted(names))}")
    waiting = [
        name
        for name in missing_parts(study)
        if not options.only or {name, name.partition(":")[0]} & set(options.only)
    ]
    for index, name in enumerate(waiting):
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"stopped after {options.minutes:g} minutes; {len(waiting) - index} parts to go")
            return 3
        start = time.monotonic()
        found[name]()
        seconds = time.monotonic() - start
        print(
            f"{name} done in {seconds:.0f} s ({index + 1} of {len(waiting)})",
            file=sys.stderr,
            flush=True,
        )
        if study.device.type == "cuda":
            torch.cuda.empty_cache()
    if left := missing_parts(study):
        print(f"{len(left)} parts to go: {', '.join(left)}")
        return 0
    settings = [
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name in TUNABLE
        if getattr(options, name) is not None
    ]
    smoke = ["--smoke"] if options.smoke else []
    command = ["python bench/quality/run.py --output", shlex.quote(Path(options.output).name)]
    print(f"wrote {gather(study, ' '.join([*command, *smoke, *settings]))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        return write_report(options) if options.report else run(options)
    except (CliError, BadResults, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
