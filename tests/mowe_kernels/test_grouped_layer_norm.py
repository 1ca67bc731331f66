from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mowe_kernels import grouped_layer_norm
from mowe_kernels.reference import _rows
from tests.mowe_kernels.checks import (
    GROUPS,
    Inputs,
    assert_accurate,
    assert_matches,
    gradcheck,
    normal,
    offsets,
    opcheck,
    raises,
    rows_with_tail,
    spans,
    table,
)

pytestmark = pytest.mark.usefixtures("poisoned")

EPS = 0.1  # large enough that forgetting it shows


def make_inputs(sizes: tuple[int, ...], tail: int, d: int = 5) -> Inputs:
    encoders = len(sizes)
    return {"x": rows_with_tail(sum(sizes), tail, d), "weight": normal(encoders, d), "bias": normal(encoders, d)}


def op(sizes: tuple[int, ...], activation: str):
    return lambda x, weight, bias: grouped_layer_norm(x, weight, bias, offsets(sizes), eps=EPS, activation=activation)


def naive(sizes: tuple[int, ...], activation: str):
    def call(x, weight, bias) -> Tensor:
        parts = []
        for e, rows in enumerate(spans(sizes)):
            centred = x[rows] - x[rows].mean(-1, keepdim=True)
            y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight[e] + bias[e]
            parts.append(functional.gelu(y) if activation else y)
        return torch.cat(parts)

    return call


@table(GROUPS, "sizes")
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize(("tail", "chunk"), [(0, 4), (3, 1024)])
def test_matches_a_norm_per_encoder(sizes, activation, tail, chunk, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", chunk)
    assert_matches(op(sizes, activation), naive(sizes, activation), make_inputs(sizes, tail), sum(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_precision(dtype, activation, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", 4)
    sizes = (0, 509)  # enough chunks to lose a sum kept in a narrow type
    assert_accurate(op(sizes, activation), naive(sizes, activation), make_inputs(sizes, 0, 31), sum(sizes), dtype)


def test_accepts_any_strides():
    inputs = {name: value.mT.contiguous().mT for name, value in make_inputs((4, 3), 0).items()}
    assert_matches(op((4, 3), "gelu"), naive((4, 3), "gelu"), inputs, 7)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_derivatives(activation):
    gradcheck(op((2, 0, 3), activation), make_inputs((2, 0, 3), 0))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_registration(strided, activation):
    sizes = (2, 0, 3)
    x, weight, bias = make_inputs(sizes, 0).values()
    x = x.T.contiguous().T if strided else x
    args = (x.requires_grad_(), weight.requires_grad_(), bias, offsets(sizes), EPS, activation)
    opcheck(torch.ops.mowe.grouped_layer_norm.default, args)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_registration_of_the_backward(needs):
    sizes = (2, 0, 3)
    args = (normal(5, 5), *make_inputs(sizes, 0).values(), offsets(sizes), EPS, "gelu", *needs, normal(5, 5))
    opcheck(torch.ops.mowe.grouped_layer_norm_backward.default, args)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7)}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"weight": normal(2, 4)}, ("weight", "[any, 5]", "got [2, 4]")),
        ({"bias": normal(5)}, ("bias", "[2, 5]", "got [5]")),
        ({"group_offsets": offsets((7,))}, ("group_offsets", "[3]", "got [2]")),
        ({"activation": "relu"}, ("activation", "'', 'gelu'", "got 'relu'")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    with raises("grouped_layer_norm: ", *parts):
        grouped_layer_norm(**make_inputs((4, 3), 0) | {"group_offsets": offsets((4, 3))} | change)
