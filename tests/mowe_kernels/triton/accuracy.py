"""The yardstick of the Triton kernels: as close to float64 as plain torch in the same type, twice its error at most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mowe_kernels import use_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter multiplies bfloat16 matrices as if they held integers.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()

Inputs = dict[str, Tensor | None]


def assert_as_accurate_as_torch(
    op: Callable[..., Tensor], inputs: Inputs, rows: int, dtype: torch.dtype, frozen: tuple[str, ...] = ()
) -> None:
    """Result and gradients of op(**inputs) under the Triton backend, in `dtype`, against the plain torch backend.

    inputs: float64, of any device. rows: how many rows belong to somebody: no others are compared, and the gradient
    of the others is NaN. frozen: inputs that get no gradient.
    """
    rounded = {name: None if value is None else value.to(DEVICE, dtype) for name, value in inputs.items()}
    learning = [name for name, value in inputs.items() if value is not None and name not in frozen]
    results = {}
    for backend, computed_in in (("reference", torch.float64), ("reference", dtype), ("triton", dtype)):
        with use_backend(backend):
            results[backend, computed_in] = _differentiate(op, rounded, learning, rows, computed_in)
    exact, torch_result, result = results.values()
    for name, value in result.items():
        _assert_close(name, value, torch_result[name], exact[name])


def _differentiate(
    op: Callable[..., Tensor], inputs: Inputs, learning: list[str], rows: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaves = {name: None if value is None else value.to(dtype).clone() for name, value in inputs.items()}
    for name in learning:
        leaves[name].requires_grad_()
    out = op(**leaves)
    result = {"result": out.detach()[:rows]}
    if learning:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, inputs[learning[0]].dtype)
        grad[rows:] = torch.nan
        grads = torch.autograd.grad(out, [leaves[name] for name in learning], grad.to(dtype))
        for name, value in zip(learning, grads, strict=True):
            result[f"gradient of {name}"] = value[:rows] if value.shape[:1] == out.shape[:1] else value
    return result


def _assert_close(name: str, value: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    # Where there is little to add up, torch may be exact by luck.
    floor = 0.25 * torch.finfo(value.dtype).eps * exact.norm()
    error, allowed = (value.double() - exact).norm(), (by_torch.double() - exact).norm()
    assert value.shape == exact.shape
    assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, plain torch {allowed:.2e}"
