from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mowe_kernels import grouped_mlp
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

EPS = 0.1
NORMED = pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])


def make_inputs(sizes: tuple[int, ...], tail: int, normed: bool, d: int = 5, hidden: int = 7) -> Inputs:
    encoders = len(sizes)
    return {
        "x": rows_with_tail(sum(sizes), tail, d),
        "norm_weight": normal(encoders, d) if normed else None,
        "norm_bias": normal(encoders, d) if normed else None,
        "fc1_weight": normal(encoders, hidden, d),
        "fc1_bias": normal(encoders, hidden),
        "fc2_weight": normal(encoders, d, hidden),
        "fc2_bias": normal(encoders, d),
    }


def op(sizes: tuple[int, ...]):
    return lambda **inputs: grouped_mlp(**inputs, group_offsets=offsets(sizes), eps=EPS)


def naive(sizes: tuple[int, ...]):
    def call(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> Tensor:
        parts = []
        for e, rows in enumerate(spans(sizes)):
            h = x[rows]
            if norm_weight is not None:
                h = functional.layer_norm(h, h.shape[1:], norm_weight[e], norm_bias[e], EPS)
            h = functional.gelu(functional.linear(h, fc1_weight[e], fc1_bias[e]))
            parts.append(x[rows] + functional.linear(h, fc2_weight[e], fc2_bias[e]))
        return torch.cat(parts)

    return call


@table(GROUPS, "sizes")
@NORMED
@pytest.mark.parametrize(("tail", "chunk"), [(0, 4), (3, 1024)])
def test_matches_a_block_per_encoder(sizes, normed, tail, chunk, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", chunk)
    assert_matches(op(sizes), naive(sizes), make_inputs(sizes, tail, normed), sum(sizes))


@NORMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, normed, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", 4)
    sizes = (0, 509)  # enough chunks to lose a sum kept in a narrow type
    assert_accurate(op(sizes), naive(sizes), make_inputs(sizes, 0, normed), sum(sizes), dtype)


def test_accepts_any_strides():
    inputs = {name: value.mT.contiguous().mT for name, value in make_inputs((4, 3), 0, True).items()}
    assert_matches(op((4, 3)), naive((4, 3)), inputs, 7)


@NORMED
def test_derivatives(normed):
    gradcheck(op((2, 0, 3)), make_inputs((2, 0, 3), 0, normed))


@NORMED
def test_registration(normed):
    sizes = (2, 0, 3)
    inputs = [None if t is None else t.requires_grad_() for t in make_inputs(sizes, 0, normed).values()]
    opcheck(torch.ops.mowe.grouped_mlp.default, (*inputs, offsets(sizes), EPS))


@NORMED
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_registration_of_the_backward(normed, needs):
    sizes = (2, 0, 3)
    args = (normal(5, 5), *make_inputs(sizes, 0, normed).values(), offsets(sizes), EPS, *needs)
    opcheck(torch.ops.mowe.grouped_mlp_backward.default, args)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7)}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"norm_bias": None}, ("norm_weight and norm_bias",)),
        ({"norm_weight": normal(2, 4)}, ("norm_weight", "[2, 5]", "got [2, 4]")),
        ({"norm_bias": normal(2, 4)}, ("norm_bias", "[2, 5]", "got [2, 4]")),
        ({"fc1_weight": normal(2, 7, 4)}, ("fc1_weight", "[any, any, 5]", "got [2, 7, 4]")),
        ({"fc1_bias": normal(2, 5)}, ("fc1_bias", "[2, 7]", "got [2, 5]")),
        ({"fc2_weight": normal(2, 7, 5)}, ("fc2_weight", "[2, 5, 7]", "got [2, 7, 5]")),
        ({"fc2_bias": normal(2, 7)}, ("fc2_bias", "[2, 5]", "got [2, 7]")),
        ({"fc2_bias": normal(2, 5).half()}, ("fc2_bias must be torch.float64", "got torch.float16")),
        ({"group_offsets": offsets((7,))}, ("group_offsets", "[3]", "got [2]")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    with raises("grouped_mlp: ", *parts):
        grouped_mlp(**make_inputs((4, 3), 0, True) | {"group_offsets": offsets((4, 3))} | change)
