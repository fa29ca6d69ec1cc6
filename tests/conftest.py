"""Shared by all tests: the `gpu` marker, the seed, and the inputs of `cases`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def _why_no_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here."""
    import sla2

    reason = sla2.why_not("cuda")
    return None if reason is None else f"needs an NVIDIA GPU: {reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _state_is_restored() -> Iterator[None]:
    """The package leaves the default dtype and the gradient mode as they were."""
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)
