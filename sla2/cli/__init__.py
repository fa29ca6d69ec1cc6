"""The `sla2` command: env, selftest, bench and demo.

Only the argument parser is loaded here, so that `sla2 env` and `sla2 --help` need the standard
library alone. A command that meets a missing optional package says which extra provides it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from sla2.cli.errors import CliError, explain_missing_packages
from sla2.cli.parser import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit code.

    0: done and every check passed. 1: a check failed. 2: wrong arguments, or the command cannot run
    here; the reason is on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after wrong arguments
        return stop.code if isinstance(stop.code, int) else 2
    options.command_line = " ".join(["sla2", *arguments])
    try:
        with explain_missing_packages(f"sla2 {options.command}"):
            return int(import_module(f"sla2.cli.{options.command}").run(options))
    except CliError as error:
        print(f"sla2 {options.command}: {error}", file=sys.stderr)
        return 2
