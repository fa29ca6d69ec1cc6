"""The seeded faults of mutation.py still fit the sources and name tests that exist."""

from __future__ import annotations

import re

import pytest
from mutation import REPOSITORY, patched
from mutation_faults import FAULTS, Fault


def test_names_are_distinct() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 10


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_applies(fault: Fault) -> None:
    text = (REPOSITORY / fault.file).read_text()
    assert patched(fault, text) != text
    for test in (*fault.tests, *fault.fallback):
        path, function = test.split("::")
        name = re.sub(r"\[.*", "", function)
        assert f"def {name}(" in (REPOSITORY / path).read_text()


def test_text_that_moved_is_an_error() -> None:
    with pytest.raises(ValueError, match="occurs 0 times"):
        patched(FAULTS[0], "")
