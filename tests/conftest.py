"""Where tests run: Triton's interpreter stands in for a GPU that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything imports triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN (the largest value for integers), so that what a kernel forgets shows."""
    from mowe_kernels.tune.accuracy import poisoned

    with poisoned():
        yield
