"""For all GPU tests: float32 products in the oracles, errors reported where they arose, and the
choice of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_tools import synchronize, why_not_sm90

from sla2 import ops


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


@pytest.fixture(params=["portable", "sm90"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs with either set of kernels, as far as there are two for its `quant`. Gradients
    too: autograd has threads of its own otherwise, which would choose theirs."""
    quant = request.node.callspec.params.get("quant", "none")
    if request.param == "sm90" and (reason := why_not_sm90(quant)) is not None:
        pytest.skip(reason)
    with torch.autograd.set_multithreading_enabled(False), ops.kernel_path(request.param):
        yield request.param
