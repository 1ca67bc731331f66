"""What a layer launches again is what it would have launched part by part."""

from __future__ import annotations

import torch

from mowe_kernels.triton._repeat import noted
from tests.mowe_kernels.triton.no_gpu import printed_by

SCRIPT = """
import itertools
import torch
from mowe_kernels import LayerParameters
from mowe_kernels.ops.encoder_layer import _STRAIGHT
from mowe_kernels.triton import _launch, encoder_layer as module
from mowe_kernels import use_backend
from mowe_kernels.reference.encoder_layer import forward as composed
from mowe_kernels.triton.grouped_mlp import Block

_launch.Launch.__call__ = lambda self, programs, *args: self._start(-1, programs, args)
module._repeatable = lambda inputs: True
module.attention.fastest = lambda *args: "kernel"
D, F, E = 64, 128, 2

def layer(shift):
    shapes = (E, D), (E, D), (E, 3 * D, D), (E, 3 * D), (E, D, D), (E, D)
    shapes += (E, D), (E, D), (E, F, D), (E, F), (E, D, F), (E, D)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.zeros(sum(sizes) + 8, dtype=torch.bfloat16)[shift:].split([*sizes, 8 - shift])
    return LayerParameters(*(part.view(shape) for part, shape in zip(flat, shapes)))

def rows(count):
    offsets = torch.tensor([0, count // 2, count], dtype=torch.int32)
    return torch.zeros(count, D, dtype=torch.bfloat16), offsets

def named(inputs, out):
    # addresses as places: those of the inputs and of the result, the others in the order in which they are met
    names = {tensor.data_ptr(): place for place, tensor in enumerate((*inputs, out))}
    def name(value):
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        return names.setdefault(address, len(names)) if isinstance(address, int) and address > 2**20 else address
    found = [(hash, programs, *map(name, values)) for hash, programs, values in started]
    started.clear()
    return found

def run(forward, x, parameters, offsets, pre_norm):
    with _launch.noting():  # which keeps temporaries, so that no two have one address
        groups = offsets.clone()
        out = forward(_STRAIGHT, False, x, parameters, groups, offsets, 40, 2, pre_norm, 1e-5, False)
        return named((x, *parameters, groups, offsets), out)

first, second, shifted = layer(0), layer(0), layer(1)
tries = (first, 40), (first, 40), (second, 40), (second, 44), (shifted, 40), (first, 40), (shifted, 40)
for pre_norm, block in itertools.product((True, False), (None, Block(64, 32, 64, 4, 2))):
    with use_backend("triton"), _launch.assume(_launch.ARCHITECTURES[90]), _launch.override(mlp_block=block):
        run(composed, *rows(40)[:1], first, rows(40)[1], pre_norm)  # compiles
        for parameters, count in tries:
            x, offsets = rows(count)
            expected = run(composed, x, parameters, offsets, pre_norm)
            assert len(expected) == (7 if block is None else 5 if pre_norm else 6)
            assert run(module.forward, x, parameters, offsets, pre_norm) == expected
        # by sizes and alignments, not by layers
        assert len(module._kept) == 3 and all(module._kept.values())
print("the same")
"""


def test_a_repeated_layer_launches_what_its_parts_do():
    assert printed_by(SCRIPT) == "the same"


def test_what_cannot_be_repeated_is_not():
    x, y, z = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    assert noted((x, y), lambda: z)[1] is not None
    assert noted((x, x), lambda: z)[1] is None
    assert noted((x, y), lambda: x)[1] is None
