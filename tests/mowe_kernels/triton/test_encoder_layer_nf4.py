"""A layer in 4 bits by the kernels of its parts; and what is launched again is what they would have launched."""

from __future__ import annotations

import pytest
from torch import Tensor

from mowe_kernels import Nf4LayerParameters, encoder_layer_nf4, nf4_quantize
from mowe_kernels.triton._launch import override
from mowe_kernels.triton.grouped_linear import Tile
from mowe_kernels.triton.varlen_attention import Settings
from tests.mowe_kernels.checks import GROUPS, normal, offsets, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch
from tests.mowe_kernels.triton.no_gpu import needs_compiler, printed_by

D, HIDDEN, HEADS = 24, 40, 2
WEIGHTS = {"qkv": (3 * D, D), "out": (D, D), "fc1": (HIDDEN, D), "fc2": (D, HIDDEN)}
WIDTHS = dict(zip(Nf4LayerParameters._fields, (D, D, 3 * D, D, D, D, HIDDEN, D), strict=False))
SMALL = {
    "nf4_tile": Tile(16, 16, 32, 4, 2), "layer_norm_block": 128, "attention_forward": Settings(16, 16, 4, 1),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pre_norm", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES)
@table(GROUPS, "sizes")
def test_is_as_accurate_as_torch(sizes, dtype, pre_norm):
    e, at = len(sizes), offsets(sizes).to(DEVICE)
    weights = {name: normal(e, *shape).float() / shape[-1] ** 0.5 for name, shape in WEIGHTS.items()}
    matrices = {name: nf4_quantize(weight, double_quant=True).to(DEVICE).matrix for name, weight in weights.items()}
    inputs = {"x": rows_with_tail(sum(sizes), 3, D)} | {name: normal(e, width) for name, width in WIDTHS.items()}

    def layer(x: Tensor, **given: Tensor) -> Tensor:
        parameters = Nf4LayerParameters(**given, **matrices)
        return encoder_layer_nf4(x, parameters, at, at, max(sizes), heads=HEADS, pre_norm=pre_norm)

    with override(**SMALL):
        assert_as_accurate_as_torch(layer, inputs, sum(sizes), dtype, frozen=tuple(inputs))


SCRIPT = """
import importlib
import itertools
import torch
from mowe_kernels import backend, nf4_quantize
from mowe_kernels.ops import _op
from mowe_kernels.ops.encoder_layer_nf4 import FORWARD
from mowe_kernels.ops.grouped_linear_nf4 import as_taken
from mowe_kernels.reference import encoder_layer_nf4 as parts
from mowe_kernels.triton import _launch, _layers, _repeat, encoder_layer_nf4 as repeated
from mowe_kernels.triton.grouped_linear_nf4 import code

_launch.Launch.__call__ = lambda self, programs, *args: programs and self._start(-1, programs, args)
_layers._launches = lambda device: True
_layers.attention.choose = lambda *args: _layers.varlen_attention
# Each has a place of its own, by which it is told from the others.
_repeat.laid_out = lambda given: [sum(t.size for t in given[:i]) for i in range(len(given))]
D, E = 64, 2

def layer(F=128, nested=True, blocksize=64):
    tensors = [torch.zeros(E, width, dtype=torch.bfloat16) for width in (D, D, 3 * D, D, D, D, F, D)]
    weights = [torch.randn(E, n, k) for n, k in ((3 * D, D), (D, D), (F, D), (D, F))]
    return tensors, [as_taken(nf4_quantize(w, double_quant=nested, blocksize=blocksize).matrix) for w in weights]

def run(module, parameters, count, how, integers=torch.int32):
    x, offsets = torch.zeros(count, D, dtype=torch.bfloat16), torch.tensor([0, count // 2, count], dtype=integers)
    cu_seqlens = offsets.clone()
    with _launch.noting():  # which keeps temporaries, so that no two have one address
        (result,) = module.forward(FORWARD, x, *parameters, offsets, cu_seqlens, *how)
    tensors, matrices = parameters
    of_matrices = [tensor for *of_one, _ in matrices for tensor in of_one if tensor.numel()]
    names = [x, offsets, cu_seqlens, code(x.device), *tensors, *of_matrices, result]
    names = {tensor.data_ptr(): place for place, tensor in enumerate(names)}
    name = lambda value: names.setdefault(value, len(names)) if 2**32 < value < 2**48 else value
    return [launch._replace(parameters=tuple(map(name, launch.parameters))) for launch in started()]

first, second, narrow, plain, coarse = layer(), layer(), layer(F=64), layer(nested=False), layer(blocksize=128)
# As on a GPU that has a table.
_op.implementation = lambda op, *args: importlib.import_module(
    backend._CHOOSERS.get(op, f"mowe_kernels.triton.{op}")
)
with _launch.assume(_launch.ARCHITECTURES[90]):
    for pre_norm, longest in itertools.product((True, False), (40, 57)):
        how = longest, 2, pre_norm, 1e-5, False
        layers = first, first, second, second, narrow, plain, plain, coarse
        for parameters, count in zip(layers, (40, 44, 38, 47, 33, 44, 36, 41)):
            expected = run(parts, parameters, count, how)
            assert len(expected) == 7
            assert run(repeated, parameters, count, how) == expected
        # Several at once, unless they differ.
        x, offsets = torch.zeros(39, D, dtype=torch.bfloat16), torch.tensor([0, 9, 39], dtype=torch.int32)
        given = offsets, offsets.clone(), *how
        (out,) = repeated.again(x, [first, second, first], *given)
        assert out.shape == x.shape and len(started()) == 3 * 7
        for others in ((first, narrow), (first, plain), (first, coarse)):
            assert repeated.again(x, others, *given) == () == tuple(started())
        for _ in range(2):
            assert run(repeated, first, 40, how, torch.int64) == run(parts, first, 40, how, torch.int64)
    assert len(_layers._kept) == 14 and all(_layers._kept.values())
print("the same")
"""


@needs_compiler
def test_a_repeated_layer_launches_what_its_parts_do():
    assert printed_by(SCRIPT) == "the same"
