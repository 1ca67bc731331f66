"""A layer by the kernels of its parts; and what is launched again is what would have been launched part by part."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mowe_kernels import LayerParameters, encoder_layer
from mowe_kernels.csrc.launch import Address, Launch
from mowe_kernels.triton import _launch, _repeat
from mowe_kernels.triton._launch import override
from mowe_kernels.triton._repeat import Temporary, _temporaries, laid_out, noted
from mowe_kernels.triton.grouped_linear import Tile
from mowe_kernels.triton.varlen_attention import Settings
from tests.mowe_kernels.checks import GROUPS, normal, offsets, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch
from tests.mowe_kernels.triton.no_gpu import needs_compiler, printed_by

D, HIDDEN, HEADS = 24, 40, 2
SMALL = {
    "gemm_tile": Tile(16, 32, 32, 4, 2), "wgrad_tile": Tile(32, 32, 16, 4, 2), "wgrad_chunk": 6,
    "layer_norm_block": 128, "layer_norm_chunk": 6, "mlp_block": None,
    **{f"attention_{kernel}": Settings(16, 16, 4, 1) for kernel in ("forward", "queries", "keys")},
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pre_norm", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("dtype", DTYPES)
@table(GROUPS, "sizes")
def test_is_as_accurate_as_torch(sizes, dtype, pre_norm):
    e, at = len(sizes), offsets(sizes).to(DEVICE)
    narrow = e, D
    shapes = narrow, narrow, (e, 3 * D, D), (e, 3 * D), (e, D, D), narrow
    shapes += narrow, narrow, (e, HIDDEN, D), (e, HIDDEN), (e, D, HIDDEN), narrow
    parameters = LayerParameters(*(normal(*shape) / shape[-1] ** 0.5 for shape in shapes))
    inputs = {"x": rows_with_tail(sum(sizes), 3, D), **parameters._asdict()}

    def layer(x: Tensor, **given: Tensor) -> Tensor:
        return encoder_layer(x, LayerParameters(**given), at, at, max(sizes), heads=HEADS, pre_norm=pre_norm)

    with override(**SMALL):
        assert_as_accurate_as_torch(layer, inputs, sum(sizes), dtype)


SCRIPT = """
import importlib
import itertools
import time
from types import SimpleNamespace
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from mowe_kernels import LayerParameters, backend
from mowe_kernels.ops import _op
from mowe_kernels.ops.encoder_layer import BACKWARD, FORWARD
from mowe_kernels.reference import encoder_layer as parts
from mowe_kernels.triton import _launch, _layers, _repeat, encoder_layer as repeated
from mowe_kernels.triton._descriptors import TMA_PRODUCTS
from mowe_kernels.triton.grouped_mlp import Block

_launch.Launch.__call__ = lambda self, programs, *args: programs and self._start(-1, programs, args)
# As on a GPU that has a table.
_op.implementation = lambda op, *args: importlib.import_module(
    backend._CHOOSERS.get(op, f"mowe_kernels.triton.{op}")
)
_layers._launches = lambda device: True
_layers.attention.choose = lambda *args: _layers.varlen_attention
# Each has a place of its own, by which it is told from the others.
_repeat.laid_out = lambda given: [sum(t.size for t in given[:i]) for i in range(len(given))]
D, E = 64, 2

def layer(shift=0, F=128):
    shapes = (E, D), (E, D), (E, 3 * D, D), (E, 3 * D), (E, D, D), (E, D)
    shapes += (E, D), (E, D), (E, F, D), (E, F), (E, D, F), (E, D)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.zeros(sum(sizes) + 8, dtype=torch.bfloat16)[shift:].split([*sizes, 8 - shift])
    return LayerParameters(*(part.view(shape) for part, shape in zip(flat, shapes)))

def named(inputs, results):
    # addresses as places: those of inputs and results, the others in the order in which they are met
    names = {tensor.data_ptr(): place for place, tensor in enumerate((*inputs, *results))}
    def name(value):
        if isinstance(value, tuple):
            return tuple(map(name, value))
        return names.setdefault(value, len(names)) if 2**32 < value < 2**48 else value
    found = [launch._replace(parameters=name(launch.parameters)) for launch in started()]
    return found, [(result.shape, result.dtype) for result in results]

class Torch(TorchDispatchMode):
    # Of its own, torch makes nothing but room: what else it launched would not be launched again.
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        assert name in ("empty", "new_empty", "empty_like", "view", "expand", "select", "slice", "launch_layers"), name
        return op(*args, **(kwargs or {}))

def run(module, parameters, count, how, needs, sequences=2, integers=torch.int32):
    x, offsets = torch.zeros(count, D, dtype=torch.bfloat16), torch.tensor([0, count // 2, count], dtype=integers)
    cu_seqlens = torch.linspace(0, count, sequences + 1).to(integers)
    given = x, parameters, offsets, cu_seqlens
    inputs, grad = (x, *given[2:], *parameters), torch.zeros_like(x)
    with _launch.noting(), Torch():  # noting keeps temporaries, so that no two have one address
        plain = named(inputs, module.forward(FORWARD, False, *given, *how))
        results = module.forward(FORWARD, True, *given, *how)
        forward, saved = named(inputs, results), results[1:]
        results = module.backward(BACKWARD, needs, grad, *given, saved, *how)
        return plain, forward, named((*inputs, grad, *saved), results)

first, second, shifted, narrow = layer(), layer(), layer(shift=1), layer(F=64)
tries = (
    (first, 38), (first, 38), (second, 40), (second, 44), (first, 48), (shifted, 33), (narrow, 40), (first, 40, 3),
    (first, 40, 2, torch.int64), (second, 1000), (first, 1024), (second, 897), (first, 0), (second, 0), (first, 0, 0),
    (first, 2), (second, 2),
)
all_needed, some_needed = (True,) * 13, (False, *(True,) * 4, *(False,) * 8)
blocks = None, Block(64, 32, 64, 4, 2)
for pre_norm, block, products in itertools.product((True, False), blocks, (0, TMA_PRODUCTS)):
    needs = some_needed if block is None else all_needed
    settings = _launch.override(mlp_block=block, tma_products=products)
    with _launch.assume(_launch.ARCHITECTURES[90]), settings:
        run(parts, first, 40, (40, 2, pre_norm, 1e-5, False), needs)  # compiles
        for longest, (parameters, count, *others) in itertools.product((40, 57), tries):
            how = longest, 2, pre_norm, 1e-5, False
            expected = run(parts, parameters, count, how, needs, *others)
            assert not count or len(expected[0][0]) == (7 if block is None else 5 if pre_norm else 6)
            assert run(repeated, parameters, count, how, needs, *others) == expected
        # by direction, sizes that are not alike, types and alignments, not by layers and lengths
        assert sorted(map(len, _layers._kept.values())) == [1] * 15 + [2] * 3
        made = [program for programs in _layers._kept.values() for program in programs]
        assert any(program.num_matrices for program in made) == (not products)

how = 40, 2, True, 1e-5, False
kernel = _layers.varlen_attention
somebody_else = SimpleNamespace(__name__="somebody_else", forward=kernel.forward, backward=kernel.backward)
for module, name, value, kept, not_repeated in (
    (_layers.attention, "choose", lambda *args: somebody_else, 0, 0),
    (_repeat, "MOST_BYTES", 0, 3, 2),  # what a forward saves is no temporary
    (_layers, "MOST_BYTES", {"forward": 0, "backward": 0}, 0, 0),
):
    before = getattr(module, name)
    setattr(module, name, value)
    with _launch.assume(_launch.ARCHITECTURES[90]):
        for _ in range(2):
            assert run(repeated, first, 40, how, all_needed) == run(parts, first, 40, how, all_needed)
        assert len(_layers._kept) == kept
        assert [*_layers._kept.values()].count([]) == not_repeated
    setattr(module, name, before)
# Several layers at once: the launches of each, on what the one before it gave.
def each(launches, shared, layers):
    # of a layer, with addresses as numbers in the order in which they are met; and those numbers
    count = len(launches) // len(layers)
    for i, parameters in enumerate(layers):
        names = {tensor.data_ptr(): place for place, tensor in enumerate((*shared, *parameters))}
        def name(value):
            if isinstance(value, tuple):
                return tuple(map(name, value))
            return names.setdefault(value, len(names)) if 2**32 < value < 2**48 else value
        own = launches[i * count : (i + 1) * count]
        yield [launch._replace(parameters=name(launch.parameters)) for launch in own], names

layers = first, second, first
for pre_norm, products in itertools.product((True, False), (0, TMA_PRODUCTS)):
    how = 40, 2, pre_norm, 1e-5, False
    with _launch.assume(_launch.ARCHITECTURES[90]), _launch.override(tma_products=products):
        for count in (38, 40):
            rows = [torch.zeros(count, D, dtype=torch.bfloat16)]
            shared = torch.tensor([0, 20, count], dtype=torch.int32), torch.tensor([0, 9, count], dtype=torch.int32)
            assert count == 40 or repeated.again(rows[0], False, layers, *shared, *how) == () == tuple(started())
            repeated.forward(FORWARD, False, rows[0], first, *shared, *how), started()
            with _launch.noting():
                for parameters in layers:
                    rows += parts.forward(FORWARD, False, rows[-1], parameters, *shared, *how)
            expected = list(each(started(), shared, layers))
            (out,) = repeated.again(rows[0], False, layers, *shared, *how)
            given = rows[0].data_ptr()
            for (ours, names), (theirs, by_parts), x, result in zip(
                each(started(), shared, layers), expected, rows, rows[1:]
            ):
                assert ours == theirs
                addresses = {number: address for address, number in names.items()}
                assert addresses[by_parts[x.data_ptr()]] == given
                given = addresses[by_parts[result.data_ptr()]]
            assert given == out.data_ptr() and out.shape == rows[0].shape
        for others in ((first, shifted), (first, narrow), (first, second[:-1])):
            assert repeated.again(rows[0], False, others, *shared, *how) == () == tuple(started())
print("the same")

# What the host saves, in the best of several turns, where every batch has other rows than the one before.
def seconds(module):
    def turn():
        batches = [torch.zeros(33 + number % 8, D, dtype=torch.bfloat16) for number in range(50)]
        offsets = torch.tensor([0, 20, 33], dtype=torch.int32)
        cu_seqlens = offsets.clone()
        start = time.perf_counter()
        for x in batches:
            module.forward(FORWARD, False, x, first, offsets, cu_seqlens, *how)
        taken = time.perf_counter() - start
        started()
        return taken
    return min(turn() for _ in range(5))

with _launch.assume(_launch.ARCHITECTURES[90]):
    again, by_parts = seconds(repeated), seconds(parts)
    print("quicker" if 2 * again < by_parts else f"{again:.1e} and {by_parts:.1e} s")
"""


@needs_compiler
def test_a_repeated_layer_launches_what_its_parts_do_in_less_of_the_hosts_time():
    assert printed_by(SCRIPT).split("\n") == ["the same", "quicker"]


@pytest.mark.parametrize("seed", range(20))
def test_temporaries_lie_over_one_another_where_no_launch_sees_both(seed):
    draw = random.Random(seed)
    firsts = sorted(draw.randrange(12) for _ in range(15))
    temporaries = [Temporary(256 * draw.randint(1, 9), first, first + draw.randrange(6)) for first in firsts]
    places = [(at, at + t.size, t) for at, t in zip(laid_out(temporaries), temporaries, strict=True)]
    for (begin, end, one), (other_begin, other_end, other) in combinations(places, 2):
        together = one.first <= other.last and other.first <= one.last
        assert not together or end <= other_begin or other_end <= begin
    together = max(sum(t.size for t in temporaries if t.first <= launch <= t.last) for launch in range(20))
    assert together <= max(end for _, end, _ in places) < sum(t.size for t in temporaries)


def test_a_temporary_lives_until_its_last_launch_also_where_that_is_told_of_it_by_a_descriptor():
    x, out, *between = torch.zeros(5, 4, 8).unbind()
    between = [tensor.clone() for tensor in between]
    by_descriptor = TensorDescriptor.from_tensor(between[0], [4, 8])
    launches = (x, between[0]), (by_descriptor, between[1]), (between[1], between[2]), (between[2], out)
    found = _temporaries(launches, {x.data_ptr(): Address(0), out.data_ptr(): Address(1)})
    assert [*found.values()] == [Temporary(256, step, step + 1) for step in range(3)]


def test_what_cannot_be_repeated_is_not(monkeypatch):
    x, y, z = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    between = torch.zeros(64)
    monkeypatch.setattr(_repeat, "as_launch", lambda *about: Launch(0, 1, 1, 1, 32, 0, ()))

    def repeatable(inputs: tuple[Tensor, ...], result: Tensor, *args: Any) -> bool:
        """Whether a computation of `result` that launches a kernel with these arguments is."""

        def compute() -> tuple[Tensor, ...]:
            _launch._noting.launches.append((None, 1, (*inputs, *args, result)))
            return (result,)

        return noted(inputs[:1], (), inputs[1:], compute)[1] is not None

    assert repeatable((x, y), z)
    assert repeatable((x, y), z, between, 3, 0.5, None)
    assert not repeatable((x, x), z)
    assert not repeatable((x, y), x)
    assert not repeatable((x, y), z, object())
    matrix, another = torch.zeros(4, 8), torch.zeros(4, 8)
    assert repeatable((x, matrix), z, TensorDescriptor.from_tensor(matrix, [4, 8]))
    assert not repeatable((x, matrix), z, TensorDescriptor.from_tensor(another, [4, 8]))
    assert not repeatable((x, y), z, between[4:])  # who knows where it begins next time
    assert not repeatable((x, y), z, between.view(torch.uint8)[1:])
    assert _repeat.alike(5) == 5 and repeatable((torch.zeros(5, 3), y), torch.zeros(3, 5))  # rows along the last axis
    for module, name, says in ((_repeat, "as_launch", None), (_repeat.launch, "available", False)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *about, says=says: says)
            assert not repeatable((x, y), z)
    assert repeatable((x, y), z)
