"""Where tests run: Triton's interpreter stands in for a GPU that is not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything imports triton


def pytest_configure() -> None:
    """The interpreter of Triton 3.6 makes the bound of a loop, an array of one element, an integer as NumPy up to 2.3
    lets it.
    """
    if find_spec("triton") is None or not version("triton").startswith("3.6."):
        return
    from triton.runtime import interpreter

    def patch(tensor: type, scope: Any, known: Callable[..., None] = interpreter._patch_lang_tensor) -> None:
        known(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


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
