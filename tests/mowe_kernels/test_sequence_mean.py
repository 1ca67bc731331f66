from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe_kernels import sequence_mean
from tests.mowe_kernels.checks import (
    LENGTHS,
    assert_accurate,
    assert_matches,
    gradcheck,
    int32,
    normal,
    offsets,
    opcheck,
    raises,
    rows_with_tail,
    spans,
    table,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def op(lengths: tuple[int, ...]):
    return lambda x: sequence_mean(x, offsets(lengths)[:-1], int32(*lengths))


def naive(lengths: tuple[int, ...]):
    def call(x) -> Tensor:
        return torch.stack([x[rows].sum(0) / max(1, rows.stop - rows.start) for rows in spans(lengths)])

    return call


@table(LENGTHS, "lengths")
@pytest.mark.parametrize("tail", [0, 3])
def test_matches_the_mean_of_each_sequence(lengths, tail):
    assert_matches(op(lengths), naive(lengths), {"x": rows_with_tail(sum(lengths), tail, 5)}, len(lengths))


def test_sequences_lie_anywhere():
    x, starts, lengths = normal(10, 3), int32(6, 0, 9), int32(3, 4, 0)
    expected = torch.stack([x[6:9].mean(0), x[:4].mean(0), torch.zeros(3)])
    torch.testing.assert_close(sequence_mean(x, starts, lengths), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    assert_accurate(op((0, 61)), naive((0, 61)), {"x": normal(61, 5)}, 2, dtype)
    assert op((0, 61))(normal(61, 5).to(dtype)).dtype == torch.float32


def test_accepts_any_strides():
    assert_matches(op((4, 3)), naive((4, 3)), {"x": normal(5, 7).T}, 2)


def test_derivatives():
    gradcheck(op((2, 0, 3)), {"x": normal(5, 3)})


def test_registration():
    x, starts, lengths = normal(5, 3), int32(0, 2, 2), int32(2, 0, 3)
    opcheck(torch.ops.mowe.sequence_mean.default, (x.clone().requires_grad_(), starts, lengths))
    opcheck(torch.ops.mowe.sequence_mean.default, (x.bfloat16().T.contiguous().T, starts, lengths))
    opcheck(torch.ops.mowe.sequence_mean_backward.default, (normal(3, 3), x, starts, lengths))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7)}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"starts": int32(0)[None]}, ("starts", "[any]", "got [1, 1]")),
        ({"lengths": int32(7)}, ("lengths", "[2]", "got [1]")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    with raises("sequence_mean: ", *parts):
        sequence_mean(**{"x": normal(7, 5), "starts": int32(0, 4), "lengths": int32(4, 3)} | change)
