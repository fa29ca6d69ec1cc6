"""`sla2 env`: the environment report; standard library only."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sla2.env import collect_env


def run(options: argparse.Namespace) -> int:
    """Prints the report as text or JSON."""
    report = collect_env()
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        reasons = report.pop("why_not")
        report["runs on the current GPU"] = {quant: reasons[quant] or "yes" for quant in reasons}
        print("\n".join(_lines(report)))
    return 0


def _lines(value: Any, indent: str = "") -> list[str]:
    """`key: value` lines, nested values indented."""
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif isinstance(item, list) and item:
            lines.append(f"{indent}{key}:")
            for element in item:
                text = (
                    ", ".join(f"{k} {v}" for k, v in element.items())
                    if isinstance(element, dict)
                    else str(element)
                )
                lines.append(f"{indent}  - {text}")
        else:
            lines.append(f"{indent}{key}: {_text(item)}")
    return lines


def _text(item: Any) -> str:
    return "none" if item is None or item in ({}, []) else str(item)
