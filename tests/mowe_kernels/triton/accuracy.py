"""The yardstick of the kernels, as an assertion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mowe_kernels.tune.accuracy import Inputs, errors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter multiplies bfloat16 matrices as if they held integers.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()


def assert_as_accurate_as_torch(
    op: Callable[..., Tensor], inputs: Inputs, rows: int, dtype: torch.dtype, frozen: tuple[str, ...] = ()
) -> None:
    """Result and gradients of op(**inputs) under the Triton backend, in `dtype`, against the plain torch backend.

    inputs: float64, of any device. rows: how many rows belong to somebody. frozen: inputs that get no gradient.
    """
    placed = {name: None if value is None else value.to(DEVICE) for name, value in inputs.items()}
    for error in errors(op, placed, rows, dtype, frozen):
        assert error.passes, f"{error.name}: error {error.error:.2e}, plain torch {error.by_torch:.2e}"
