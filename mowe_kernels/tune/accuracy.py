"""The yardstick of the Triton kernels: as close to float64 as plain torch in the same type, twice its error at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mowe_kernels.backend import use_backend

Inputs = dict[str, Tensor | None]


class Error(NamedTuple):
    """Distance from float64 of one result, of plain torch's, and the most that passes."""

    name: str
    error: float
    by_torch: float
    allowed: float

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed  # never of a NaN


def errors(
    op: Callable[..., Tensor], inputs: Inputs, rows: int, dtype: torch.dtype, frozen: tuple[str, ...] = ()
) -> list[Error]:
    """Of the result and the gradients of op(**inputs) under the Triton backend, in `dtype`.

    inputs: float64, on the device to try. rows: how many rows belong to somebody: no others are compared, and the
    gradient of the others is NaN. frozen: inputs that get no gradient.
    """
    rounded = {name: None if value is None else value.to(dtype) for name, value in inputs.items()}
    results = []
    for backend, computed_in in (("reference", torch.float64), ("reference", dtype), ("triton", dtype)):
        with use_backend(backend):
            results.append(differentiate(op, rounded, rows, computed_in, frozen))
    exact, by_torch, ours = results
    return [_error(name, value, by_torch[name], exact[name]) for name, value in ours.items()]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN (the largest value for integers), so that what a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def differentiate(
    op: Callable[..., Tensor], inputs: Inputs, rows: int, dtype: torch.dtype, frozen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The result and the gradients of op(**inputs), computed in `dtype` by the backend in force; the rest as above."""
    learning = [name for name, value in inputs.items() if value is not None and name not in frozen]
    leaves = {name: None if value is None else value.to(dtype).clone() for name, value in inputs.items()}
    for name in learning:
        leaves[name].requires_grad_()
    out = op(**leaves)
    result = {"result": out.detach()[:rows]}
    if learning:
        like = inputs[learning[0]]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)
        grad[rows:] = torch.nan
        grads = torch.autograd.grad(out, [leaves[name] for name in learning], grad.to(dtype))
        for name, value in zip(learning, grads, strict=True):
            result[f"gradient of {name}"] = value[:rows] if value.shape[:1] == out.shape[:1] else value
    return result


def _error(name: str, value: Tensor, by_torch: Tensor, exact: Tensor) -> Error:
    if value.shape != exact.shape:
        raise ValueError(f"{name}: shape {list(value.shape)} instead of {list(exact.shape)}")
    # Where there is little to add up, torch may be exact by luck.
    floor = 0.25 * torch.finfo(value.dtype).eps * exact.norm()
    error, theirs = ((x.double() - exact).norm() for x in (value, by_torch))
    return Error(name, float(error), float(theirs), float(2 * theirs + floor))
