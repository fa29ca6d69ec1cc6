"""For all GPU tests: float32 products in the oracles, and errors reported where they arose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_tools import synchronize


@pytest.fixture(autouse=True)
def _float32_products() -> Iterator[None]:
    """TF32 would cost the references more than the kernels' own error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _errors_belong_to_their_test() -> Iterator[None]:
    """Kernels fail asynchronously: without the wait, the next test would get the error."""
    yield
    synchronize()
