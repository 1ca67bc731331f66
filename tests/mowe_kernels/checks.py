"""What the tests of the ops share: awkward layouts, and the comparison of an op with an independent computation."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

Inputs = dict[str, Tensor | None]

# Rows of each encoder.
GROUPS = {
    "primes": (7, 0, 13, 3),
    "one row": (0, 1, 0),
    "one encoder": (11,),
    "all to one": (0, 0, 17, 0),
    "no rows": (0, 0),
}
# Rows of each sequence.
LENGTHS = {
    "primes": (7, 0, 13, 3, 0),
    "one frame": (1,),
    "empty ends": (0, 5, 0),
    "no rows": (0, 0),
}


def table(cases: dict[str, Any], name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, list(cases.values()), ids=list(cases))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def spans(lengths: tuple[int, ...]) -> list[slice]:
    bounds = offsets(lengths).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rows_with_tail(rows: int, tail: int, *widths: int) -> Tensor:
    """Rows, then some that belong to nobody and must never be read."""
    return torch.cat([normal(rows, *widths), torch.full((tail, *widths), torch.nan, dtype=torch.float64)])


def assert_matches(
    op: Callable[..., Tensor],
    naive: Callable[..., Tensor],
    inputs: Inputs,
    rows: int,
    passes_tail: tuple[str, ...] = (),
) -> None:
    """op(**inputs) equals naive(**inputs), and so does every gradient, asked for together and one by one.

    rows: how many rows of the result belong to somebody; the gradient of the others is NaN and must not spread, except
    into the same rows of the inputs named in passes_tail.
    """
    wanted = [name for name, value in inputs.items() if value is not None]
    expected, cotangent, expected_grads = _differentiate(naive, inputs, wanted, rows)
    with torch.no_grad():
        assert_close(op(**inputs)[:rows], expected, msg=lambda m: f"without gradient: {m}")
    for names in (wanted, *([name] for name in wanted)):
        out, _, grads = _differentiate(op, inputs, names, rows, cotangent)
        assert_close(out, expected, msg=lambda m: f"forward: {m}")
        for name in names:
            kept = slice(rows if name in passes_tail else None)
            assert_close(grads[name][kept], expected_grads[name][kept], msg=lambda m, n=name: f"gradient of {n}: {m}")


def assert_accurate(
    op: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Inputs, rows: int, dtype: torch.dtype
) -> None:
    """In a narrower type, result and gradients are at most twice as far from float64 as those of plain torch."""
    rounded = {name: None if value is None else value.to(dtype) for name, value in inputs.items()}
    exact = {name: None if value is None else value.double() for name, value in rounded.items()}
    wanted = [name for name, value in inputs.items() if value is not None]
    out, cotangent, grads = _differentiate(op, rounded, wanted, rows)
    plain, _, plain_grads = _differentiate(naive, rounded, wanted, rows, cotangent)
    expected, _, expected_grads = _differentiate(naive, exact, wanted, rows, cotangent.double())
    named = [("result", out, plain, expected), *((n, grads[n], plain_grads[n], expected_grads[n]) for n in wanted)]
    allowed = torch.finfo(dtype).eps + 2 * max(_error(theirs, value) for _, _, theirs, value in named)
    for name, ours, _, value in named:
        assert _error(ours, value) <= allowed, f"{name}: error {_error(ours, value):.1e}, allowed {allowed:.1e}"


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _differentiate(
    function: Callable[..., Tensor], inputs: Inputs, wanted: list[str], rows: int, cotangent: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {name: None if value is None else value.clone() for name, value in inputs.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(**leaves)
    if cotangent is None:
        cotangent = torch.randn(out[:rows].shape, dtype=torch.float64).to(out.dtype)
    whole = torch.full_like(out, torch.nan)
    whole[:rows] = cotangent
    grads = torch.autograd.grad(out, [leaves[n] for n in wanted], whole, allow_unused=True, materialize_grads=True)
    return out[:rows].detach(), cotangent, dict(zip(wanted, grads, strict=True))


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """Schema, fake, autograd registration and dispatch under torch.compile of a registered op."""
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}


def gradcheck(function: Callable[..., Any], inputs: Inputs) -> None:
    """Numerical derivatives in float64 of every input."""
    names = [name for name, value in inputs.items() if value is not None]
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    fixed = dict.fromkeys(inputs)
    assert torch.autograd.gradcheck(lambda *values: function(**fixed | dict(zip(names, values, strict=True))), leaves)


def raises(*parts: str) -> Any:
    """A ValueError naming all of these, in this order."""
    return pytest.raises(ValueError, match=".*".join(map(re.escape, parts)))
