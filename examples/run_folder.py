"""What the training examples share: an output folder that goes on, but never as another run.

The same command goes on with what is in its --output. A JSON file there keeps the settings that it
was begun with; a call with others is refused, naming the first that differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sla2.constants import QUANT_MODES
from sla2.files import write_atomically
from sla2.train import read_report

_PIECE = 4096  # bytes
_PIECES = 1024  # of all files together: weights of 28 GB are told apart in seconds


# ---- settings -----------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Of a file, or of all safetensors files in a folder; the place they are in is no part of it.

    Sees names, sizes and pieces spread evenly over each file; files of up to 4 MB are read whole.
    """
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    count = max(2, _PIECES // max(1, len(files)))
    digest, total = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
        with file.open("rb", buffering=0) as stream:
            for index in range(count):
                stream.seek(max(0, size - _PIECE) * index // (count - 1))
                digest.update(stream.read(_PIECE))
    return f"{total} bytes, sha256 {digest.hexdigest()[:16]}"


def settings_of(options: argparse.Namespace, free: Collection[str]) -> dict[str, Any]:
    """All options but the `free` ones, as JSON has them; of a file or folder its fingerprint."""
    settings = {
        name: fingerprint(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in free
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # tuples to lists
    return plain


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError unless the file holds these settings."""
    if not path.exists():
        raise ValueError(f"{path.parent} is in use, but lacks {path.name}: choose another --output")
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in {**settings, **saved}:
        before, now = saved.get(name), settings.get(name)
        if before != now:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{path.parent} was begun with {option} {before!r}, this call has {now!r}: give "
                "the option as before, or choose another --output"
            )


# ---- stage 1 ------------------------------------------------------------------------------------

# Of `add_stage1_arguments`, those of the fit: `fit_router` keeps and checks them in its own folder.
FIT_OPTIONS = ("topk", "steps", "quant")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{value} is no share of the key blocks, in (0, 1]")
    return value


class Descending(argparse.Action):
    """Stores the values where each is less than the one before."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        if sorted(set(values), reverse=True) != values:
            text = " ".join(map(str, values))
            raise argparse.ArgumentError(
                self, f"{text} must descend: each router starts from the one that keeps more"
            )
        setattr(namespace, self.dest, values)


def add_stage1_arguments(parser: argparse.ArgumentParser, *, samples: int) -> None:
    """Options of recording and fit, checked here: a mistake must not come to light after hours."""
    parser.add_argument(
        "--samples", type=positive, default=samples, help="recorded calls of each layer"
    )
    parser.add_argument(
        "--topk", type=share, nargs="+", action=Descending, default=[0.05, 0.04, 0.03]
    )
    parser.add_argument(
        "--steps", type=positive, default=500, help="of the fit, for each layer and topk"
    )
    parser.add_argument(
        "--quant",
        choices=QUANT_MODES,
        default="int8_fp8",
        help="of stage 2; noted in the router files",
    )


def record_once(output: Path, settings: dict[str, Any], record: Callable[[Path], None]) -> Path:
    """The folder of samples that `record` fills, unless `output` has a finished recording.

    It gets its name when complete; what an interrupted recording left is discarded. settings: what
    the samples depend on. Raises ValueError where `output` has samples or a fit of others.
    """
    samples, partial = output / "samples", output / "samples.partial"
    kept = output / "recording.json"
    if samples.exists() or (output / "fit").exists():
        check_settings(kept, settings)
        return samples
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    write_settings(kept, settings)
    record(partial)
    partial.rename(samples)
    return samples


def print_errors(fit: Path, routers: dict[float, Path]) -> None:
    """Relative errors in hard mode, over the recorded samples, in the mean over layers."""
    report = read_report(fit)
    for topk, path in routers.items():
        own = [row for row in report if row.topk == topk]
        start = statistics.fmean(row.error_start for row in own)
        fitted = statistics.fmean(row.error_fitted for row in own)
        kept = sum(row.kept == "start" for row in own)
        print(
            f"topk {topk:g}: relative error {start:.3f} at the start, {fitted:.3f} fitted; "
            f"{kept} of {len(own)} layers kept the start; {path}"
        )
