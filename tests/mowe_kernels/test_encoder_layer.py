from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from mowe_kernels import LayerParameters, encoder_layer
from tests.mowe_kernels.checks import (
    GROUPS,
    Inputs,
    assert_matches,
    normal,
    offsets,
    raises,
    rows_with_tail,
    spans,
    table,
)

pytestmark = pytest.mark.usefixtures("poisoned")

D, HIDDEN, HEADS, EPS = 6, 10, 2, 0.1
NORM = pytest.mark.parametrize("pre_norm", [True, False], ids=["before", "after"])


def make_inputs(sizes: tuple[int, ...], tail: int) -> Inputs:
    e = len(sizes)
    shapes = (e, D), (e, D), (e, 3 * D, D), (e, 3 * D), (e, D, D), (e, D), (e, D), (e, D)
    shapes += (e, HIDDEN, D), (e, HIDDEN), (e, D, HIDDEN), (e, D)
    parameters = LayerParameters(*(normal(*shape) / 2 for shape in shapes))
    return {"x": rows_with_tail(sum(sizes), tail, D), **parameters._asdict()}


def op(sizes: tuple[int, ...], pre_norm: bool):
    """One sequence an encoder."""

    def call(x: Tensor, **parameters: Tensor) -> Tensor:
        at = offsets(sizes)
        return encoder_layer(
            x, LayerParameters(**parameters), at, at, max(sizes), heads=HEADS, pre_norm=pre_norm, eps=EPS
        )

    return call


def naive(sizes: tuple[int, ...], pre_norm: bool):
    """torch's own layer, an encoder at a time."""
    layer = nn.TransformerEncoderLayer(
        D, HEADS, HIDDEN, dropout=0.0, activation="gelu", layer_norm_eps=EPS, batch_first=True, norm_first=pre_norm
    ).double()
    theirs = ("norm1", "self_attn.in_proj_", "self_attn.out_proj", "norm2", "linear1", "linear2")
    names = [f"{part}{'' if part.endswith('_') else '.'}{kind}" for part in theirs for kind in ("weight", "bias")]

    def call(x: Tensor, **parameters: Tensor) -> Tensor:
        parts = []
        for e, span in enumerate(spans(sizes)):
            own = {name: stacked[e] for name, stacked in zip(names, parameters.values(), strict=True)}
            parts.append(torch.func.functional_call(layer, own, (x[None, span],))[0] if sizes[e] else x[span])
        return torch.cat(parts)

    return call


@NORM
@table(GROUPS, "sizes")
def test_is_the_layer_torch_has(sizes, pre_norm):
    assert_matches(op(sizes, pre_norm), naive(sizes, pre_norm), make_inputs(sizes, 3), sum(sizes))


def test_one_graph_of_torch_compile():
    sizes = (4, 3)
    inputs = make_inputs(sizes, 0)
    compiled = torch.compile(op(sizes, True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), op(sizes, True)(**inputs))


def test_one_graph_of_compiled_autograd():
    layer, inputs = op((4, 3), True), {n: v.requires_grad_() for n, v in make_inputs((4, 3), 0).items()}
    expected = torch.autograd.grad(layer(**inputs).sum(), [*inputs.values()])
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        layer(**inputs).sum().backward()
    assert all(map(torch.equal, expected, (value.grad for value in inputs.values())))


def test_no_second_derivative_instead_of_a_wrong_one():
    inputs = {name: value.requires_grad_() for name, value in make_inputs((4, 3), 0).items()}
    (grad,) = torch.autograd.grad(op((4, 3), True)(**inputs).sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="_backward"):
        grad.square().sum().backward()


def test_keys_may_have_no_bias():
    """Their part of the gradient is zero, under torch.compile too."""
    at, inputs = offsets((4, 3)), make_inputs((4, 3), 0)
    bias = inputs["qkv_bias"].requires_grad_()

    def layer(x: Tensor, **given: Tensor) -> Tensor:
        return encoder_layer(x, LayerParameters(**given), at, at, 4, heads=HEADS, key_bias=False)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call, create_graph in ((layer, False), (layer, True), (compiled, False)):
        (grad,) = torch.autograd.grad(call(**inputs).square().sum(), bias, create_graph=create_graph)
        assert [part.count_nonzero() > 0 for part in grad.chunk(3, dim=1)] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7)}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"x": normal(7, 5)}, ("2 heads do not divide 5 columns",)),
        ({"fc1_weight": normal(2, 7, 4)}, ("fc1_weight", "[any, any, 6]", "got [2, 7, 4]")),
        ({"qkv_weight": normal(2, 6, 6)}, ("qkv_weight", "[2, 18, 6]", "got [2, 6, 6]")),
        ({"out_bias": normal(3, 6)}, ("out_bias", "[2, 6]", "got [3, 6]")),
        ({"fc2_bias": normal(2, 6).half()}, ("fc2_bias must be torch.float64", "got torch.float16")),
        ({"qkv_weight": normal(2, 18, 6).to("meta")}, ("qkv_weight must be on cpu", "got meta")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    with raises("encoder_layer: ", *parts):
        op((4, 3), True)(**make_inputs((4, 3), 0) | change)


@pytest.mark.parametrize(
    ("group_offsets", "cu_seqlens", "parts"),
    [
        (offsets((7,)), offsets((7,)), ("group_offsets", "[3]", "got [2]")),
        (offsets((4, 3)), offsets((4, 3))[None], ("cu_seqlens", "[any]", "got [1, 3]")),
    ],
)
def test_says_which_offsets_do_not_fit(group_offsets, cu_seqlens, parts):
    inputs = make_inputs((4, 3), 0)
    with raises("encoder_layer: ", *parts):
        encoder_layer(inputs.pop("x"), LayerParameters(**inputs), group_offsets, cu_seqlens, 4, heads=HEADS)
