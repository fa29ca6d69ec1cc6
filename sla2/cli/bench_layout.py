"""What the numbers page is made of: its sections, one after the other."""

from __future__ import annotations

from typing import NamedTuple

from sla2.cli.bench_page_plots import Panel


class Section(NamedTuple):
    """blocks: paragraphs and tables, none where nothing is measured; make: command to measure."""

    name: str
    title: str
    introduction: str
    make: str
    paper: list[str]
    blocks: list[str]
    panels: list[Panel]
