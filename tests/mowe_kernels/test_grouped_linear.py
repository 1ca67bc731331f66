from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mowe_kernels import grouped_linear, use_backend
from mowe_kernels.reference import _linear, _rows
from tests.mowe_kernels.checks import (
    GROUPS,
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

EPILOGUES = {
    "plain": (),
    "bias": ("bias",),
    "residual": ("bias", "residual"),
    "scale": ("row_scale",),
    "all": ("bias", "residual", "row_scale"),
}


def make_inputs(sizes: tuple[int, ...], tail: int, epilogue: tuple[str, ...], k: int = 5, n: int = 3) -> Inputs:
    rows, encoders = sum(sizes), len(sizes)
    inputs = {
        "x": rows_with_tail(rows, tail, k),
        "weight": normal(encoders, n, k),
        "bias": normal(encoders, n),
        "residual": rows_with_tail(rows, tail, n),
        "row_scale": rows_with_tail(rows, tail),
    }
    return {name: value if name in ("x", "weight", *epilogue) else None for name, value in inputs.items()}


def op(sizes: tuple[int, ...], activation: str):
    def call(x, weight, bias, residual, row_scale):
        return grouped_linear(
            x, weight, bias, offsets(sizes), activation=activation, residual=residual, row_scale=row_scale
        )

    return call


def naive(sizes: tuple[int, ...], activation: str):
    def call(x, weight, bias, residual, row_scale) -> Tensor:
        parts = []
        for e, rows in enumerate(spans(sizes)):
            y = functional.linear(x[rows], weight[e], None if bias is None else bias[e])
            y = functional.gelu(y) if activation else y
            y = y if row_scale is None else y * row_scale[rows, None]
            parts.append(y if residual is None else y + residual[rows])
        return torch.cat(parts)

    return call


@table(GROUPS, "sizes")
@table(EPILOGUES, "epilogue")
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize(("tail", "chunk"), [(0, 4), (3, 1024)])
def test_matches_a_linear_layer_per_encoder(sizes, epilogue, activation, tail, chunk, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", chunk)
    inputs = make_inputs(sizes, tail, epilogue)
    assert_matches(op(sizes, activation), naive(sizes, activation), inputs, sum(sizes), passes_tail=("residual",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, monkeypatch):
    monkeypatch.setattr(_rows, "CHUNK", 4)
    sizes = (0, 509)  # enough chunks to lose a sum kept in a narrow type
    inputs = make_inputs(sizes, 0, EPILOGUES["all"])
    assert_accurate(op(sizes, "gelu"), naive(sizes, "gelu"), inputs, sum(sizes), dtype)


def test_accepts_any_strides():
    inputs = make_inputs((4, 3), 0, EPILOGUES["all"])
    strided = {name: value.mT.contiguous().mT if value.dim() > 1 else value for name, value in inputs.items()}
    assert_matches(op((4, 3), "gelu"), naive((4, 3), "gelu"), strided, 7)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_accepts_any_strides_in_float32(activation):
    """Where oneDNN multiplies."""
    inputs = make_inputs((4, 3), 0, ("bias", "residual"))
    inputs = {name: None if value is None else value.float() for name, value in inputs.items()}
    expected = op((4, 3), activation)(**inputs)
    strided = {name: None if value is None else value.mT.contiguous().mT for name, value in inputs.items()}
    torch.testing.assert_close(op((4, 3), activation)(**strided), expected)
    inputs["bias"] = torch.ones(2, 1).expand(2, 3)
    torch.testing.assert_close(op((4, 3), "")(**inputs), op((4, 3), "")(**inputs | {"bias": torch.ones(2, 3)}))


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("sizes", [(4, 3), (7, 0)])
def test_computes_in_the_types_given_whatever_autocast_says(sizes, onednn, monkeypatch):
    monkeypatch.setattr(_linear, "_goes_to_onednn", lambda x: onednn)
    inputs = {n: v if v is None else v.float() for n, v in make_inputs(sizes, 0, ("bias",)).items()}
    expected = op(sizes, "gelu")(**inputs)
    inputs["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = op(sizes, "gelu")(**inputs)
        assert torch.is_autocast_enabled("cpu")
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected)


@pytest.mark.parametrize("group_offsets", [(0, 4, 8), (-1, 4, 7), (0, 5, 4)])
def test_no_rows_that_are_not_there(group_offsets):
    x, weight, *_ = make_inputs((4, 3), 0, ()).values()
    with use_backend("reference"), raises("row offsets must rise from 0", f"got {list(group_offsets)}"):
        grouped_linear(x, weight, None, int32(*group_offsets))


@table(EPILOGUES, "epilogue")
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_derivatives(epilogue, activation):
    sizes = (2, 0, 3)
    gradcheck(op(sizes, activation), make_inputs(sizes, 0, epilogue))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("epilogue", [(), EPILOGUES["all"]])
@pytest.mark.parametrize("save_pre", [False, True])
def test_registration(strided, epilogue, save_pre):
    sizes = (2, 0, 3)
    x, weight, bias, residual, row_scale = make_inputs(sizes, 1, epilogue).values()
    x = x.nan_to_num()
    if strided:
        x, weight = x.T.contiguous().T, weight.mT.contiguous().mT
    leaves = [None if t is None else t.requires_grad_(save_pre) for t in (x, weight, bias, residual, row_scale)]
    x, weight, bias, residual, row_scale = leaves
    args = (x, weight, bias, offsets(sizes), residual, row_scale, "gelu" if save_pre else "", save_pre)
    opcheck(torch.ops.mowe.grouped_linear.default, args)


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False), (True, False, True, False)])
def test_registration_of_the_backward(needs):
    sizes = (2, 0, 3)
    x, weight, _, residual, row_scale = make_inputs(sizes, 0, EPILOGUES["all"]).values()
    args = (residual, x, weight, offsets(sizes), row_scale, normal(5, 3), "gelu", *needs, normal(*x.shape))
    opcheck(torch.ops.mowe.grouped_linear_backward.default, args)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7)}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"x": normal()}, ("x must be packed rows", "[any, any]", "got []")),
        ({"weight": normal(2, 3, 4)}, ("weight", "[any, any, 5]", "got [2, 3, 4]")),
        ({"bias": normal(3)}, ("bias", "[2, 3]", "got [3]")),
        ({"residual": normal(6, 3)}, ("residual", "[7, 3]", "got [6, 3]")),
        ({"row_scale": normal(7, 1)}, ("row_scale", "[7]", "got [7, 1]")),
        ({"group_offsets": offsets((7,))}, ("group_offsets", "[3]", "got [2]")),
        ({"residual": normal(7, 3).float()}, ("residual must be torch.float64", "got torch.float32")),
        ({"weight": normal(2, 3, 5).float()}, ("weight must be torch.float64", "got torch.float32")),
        ({"weight": normal(2, 3, 5).to("meta")}, ("weight must be on cpu", "got meta")),
        (
            {"group_offsets": offsets((4, 3)).float()},
            ("group_offsets must be of type int32 or int64", "got torch.float32"),
        ),
        ({"activation": "relu"}, ("activation", "'', 'gelu'", "got 'relu'")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    inputs = make_inputs((4, 3), 0, EPILOGUES["all"]) | {"group_offsets": offsets((4, 3))}
    with raises("grouped_linear: ", *parts):
        grouped_linear(**inputs | change)
