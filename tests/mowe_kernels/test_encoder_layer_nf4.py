from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe_kernels import LayerParameters, Nf4LayerParameters, encoder_layer, encoder_layer_nf4, nf4_quantize
from tests.mowe_kernels.checks import GROUPS, normal, offsets, raises, rows_with_tail, table

pytestmark = pytest.mark.usefixtures("poisoned")

D, HIDDEN, HEADS = 6, 10, 2
WEIGHTS = {"qkv": (3 * D, D), "out": (D, D), "fc1": (HIDDEN, D), "fc2": (D, HIDDEN)}
WIDTHS = {
    "attention_norm_weight": D, "attention_norm_bias": D, "qkv_bias": 3 * D, "out_bias": D, "mlp_norm_weight": D,
    "mlp_norm_bias": D, "fc1_bias": HIDDEN, "fc2_bias": D,
}  # fmt: skip
NORM = pytest.mark.parametrize("pre_norm", [True, False], ids=["before", "after"])


def make(encoders: int, double_quant: bool = False) -> tuple[Nf4LayerParameters, LayerParameters]:
    """A layer in 4 bits, and the same with its weights taken out of them."""
    tensors = {name: normal(encoders, width).float() for name, width in WIDTHS.items()}
    quantized = {name: nf4_quantize(normal(encoders, *shape).float() / 2, double_quant=double_quant)
                 for name, shape in WEIGHTS.items()}  # fmt: skip
    full = {f"{name}_weight": weight.dequantize() for name, weight in quantized.items()}
    matrices = {name: weight.matrix for name, weight in quantized.items()}
    return Nf4LayerParameters(**tensors, **matrices), LayerParameters(**tensors, **full)


def call(x: Tensor, parameters: Nf4LayerParameters, sizes: tuple[int, ...], pre_norm: bool = True) -> Tensor:
    at = offsets(sizes)
    return encoder_layer_nf4(x, parameters, at, at, max(sizes), heads=HEADS, pre_norm=pre_norm)


@NORM
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@table(GROUPS, "sizes")
def test_is_the_layer_of_the_dequantised_weights(sizes, double_quant, pre_norm):
    in_4_bits, full = make(len(sizes), double_quant)
    x, at = rows_with_tail(sum(sizes), 3, D).float(), offsets(sizes)
    expected = encoder_layer(x, full, at, at, max(sizes), heads=HEADS, pre_norm=pre_norm)
    got = call(x, in_4_bits, sizes, pre_norm)
    assert got.shape == x.shape
    torch.testing.assert_close(got[: sum(sizes)], expected[: sum(sizes)], rtol=1e-4, atol=1e-4)


def test_one_graph_of_torch_compile():
    parameters, _ = make(2)
    x = normal(7, D).float()
    compiled = torch.compile(lambda x: call(x, parameters, (4, 3)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x, parameters, (4, 3)))


def test_there_is_no_gradient():
    parameters, _ = make(2)
    with raises("encoder_layer_nf4: ", "no gradient", "encoder_layer"):
        call(normal(7, D).float().requires_grad_(), parameters, (4, 3))
    with torch.no_grad():
        call(normal(7, D).float().requires_grad_(), parameters, (4, 3))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(7).float()}, ("x must be packed rows", "[any, any]", "got [7]")),
        ({"x": normal(7, 5).float()}, ("2 heads do not divide 5 columns",)),
        ({"out_bias": normal(3, D).float()}, ("out_bias", "[2, 6]", "got [3, 6]")),
        ({"fc2_bias": normal(2, D).half()}, ("fc2_bias must be torch.float32", "got torch.float16")),
        ({"qkv_bias": normal(2, 3 * D).float().to("meta")}, ("qkv_bias must be on cpu", "got meta")),
        ({"out": make(2)[0].fc2}, ("out must be 2 matrices [6, 6]", "got [2, 6, 10]")),
        ({"fc1": make(3)[0].fc1}, ("fc1 must be 2 matrices [10, 6]", "got [3, 10, 6]")),
        ({"qkv": make(2)[0].qkv._replace(blocksize=65)}, ("blocksize must be one of", "got 65")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    given = {"x": normal(7, D).float()} | make(2)[0]._asdict() | change
    with raises("encoder_layer_nf4: ", *parts):
        call(given.pop("x"), Nf4LayerParameters(**given), (4, 3))
