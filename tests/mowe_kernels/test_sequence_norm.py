from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mowe_kernels import sequence_norm
from mowe_kernels.reference import _rows
from tests.mowe_kernels.checks import (
    LENGTHS,
    Inputs,
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

EPS = 0.1
ENCODERS = 3


def make_inputs(lengths: tuple[int, ...], tail: int, n: int = 5) -> Inputs:
    return {"x": rows_with_tail(sum(lengths), tail, n), "weight": normal(ENCODERS, n), "bias": normal(ENCODERS, n)}


def encoder(lengths: tuple[int, ...]) -> Tensor:
    """Several sequences an encoder, and one encoder without any; meaningless where there are no frames."""
    return int32(*(99 if length == 0 else 2 * (p % 2) for p, length in enumerate(lengths)))


def op(lengths: tuple[int, ...], activation: str):
    return lambda x, weight, bias: sequence_norm(
        x, weight, bias, encoder=encoder(lengths), cu_seqlens=offsets(lengths), eps=EPS, activation=activation
    )


def naive(lengths: tuple[int, ...], activation: str):
    def call(x, weight, bias) -> Tensor:
        parts = [x[:0]]
        for p, (e, rows) in enumerate(zip(encoder(lengths).tolist(), spans(lengths), strict=True)):
            if lengths[p] == 0:
                continue
            if lengths[p] == 1:  # torch refuses a group of one value, whose norm is its bias
                y = bias[e][None] + 0 * (x[rows] + weight[e])
            else:
                y = functional.group_norm(x[rows].T[None], x.shape[1], weight[e], bias[e], EPS)[0].T
            parts.append(functional.gelu(y) if activation else y)
        return torch.cat(parts)

    return call


@table(LENGTHS, "lengths")
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize(("tail", "chunk"), [(0, 4), (3, 1024)])
def test_matches_a_group_norm_per_sequence(lengths, activation, tail, chunk, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", chunk)
    assert_matches(op(lengths, activation), naive(lengths, activation), make_inputs(lengths, tail), sum(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", 8)
    lengths = (0, 509)
    assert_accurate(op(lengths, "gelu"), naive(lengths, "gelu"), make_inputs(lengths, 0), sum(lengths), dtype)


def test_accepts_any_strides():
    inputs = {name: value.mT.contiguous().mT for name, value in make_inputs((4, 3), 0).items()}
    assert_matches(op((4, 3), "gelu"), naive((4, 3), "gelu"), inputs, 7)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_derivatives(activation):
    gradcheck(op((2, 0, 3), activation), make_inputs((2, 0, 3), 0))


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_registration(activation):
    lengths = (2, 0, 3)
    x, weight, bias = make_inputs(lengths, 0).values()
    args = (x.requires_grad_(), weight, bias.requires_grad_(), encoder(lengths), offsets(lengths), EPS, activation)
    opcheck(torch.ops.mowe.sequence_norm.default, args)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_registration_of_the_backward(needs):
    lengths = (2, 0, 3)
    args = (normal(5, 5), *make_inputs(lengths, 0).values(), encoder(lengths), offsets(lengths), EPS, "gelu", *needs)
    opcheck(torch.ops.mowe.sequence_norm_backward.default, args)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7)}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"weight": normal(2, 4)}, ("weight", "[any, 5]", "got [2, 4]")),
        ({"bias": normal(5)}, ("bias", "[3, 5]", "got [5]")),
        ({"encoder": int32(0, 1)[None]}, ("encoder", "[any]", "got [1, 2]")),
        ({"cu_seqlens": offsets((7,))}, ("cu_seqlens", "[3]", "got [2]")),
        ({"activation": "relu"}, ("activation", "'', 'gelu'", "got 'relu'")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    fits = {"encoder": int32(0, 1), "cu_seqlens": offsets((4, 3))}
    with raises("sequence_norm: ", *parts):
        sequence_norm(**make_inputs((4, 3), 0) | fits | change)
