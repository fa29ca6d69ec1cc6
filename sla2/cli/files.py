"""Result files and the folder they go to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sla2.cli.errors import CliError
from sla2.files import write_atomically


def output_folder(name: str) -> Path:
    """The folder `name`, created when absent."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinity are not JSON and are refused."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
