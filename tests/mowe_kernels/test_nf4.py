"""The 4-bit format: bit for bit that of bitsandbytes, encoder by encoder, there and back."""

from __future__ import annotations

import json
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mowe_kernels import Nf4Weight, nf4_dequantize_grouped, nf4_quantize, use_backend
from mowe_kernels.reference import nf4_nested

SHAPES = [(1, 1), (3, 5), (7, 9), (8, 8), (64, 64), (33, 100), (130, 67), (96, 384), (300, 260)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
nested = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])


def weights(shape: tuple[int, int], dtype: torch.dtype = torch.float32, encoders: int = 2) -> Tensor:
    torch.manual_seed(shape[0] * shape[1])
    return (torch.randn(encoders, *shape) * torch.rand(encoders, shape[0], 1)).to(dtype)


def theirs(matrix: Tensor, double_quant: bool, blocksize: int = 64) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(matrix, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")


def exact(mine: Tensor, other: Tensor) -> None:
    assert_close(mine, other, rtol=0, atol=0)


def assert_same(mine: Nf4Weight, stack: Tensor, double_quant: bool) -> None:
    for e, matrix in enumerate(stack):
        data, state = theirs(matrix, double_quant, mine.blocksize)
        exact(mine.codes[e], data.flatten())
        exact(mine.absmax[e], state.absmax)
        if double_quant:
            exact(mine.nested_absmax[e], state.state2.absmax)
            exact(mine.nested_offset[e], state.offset)
            exact(mine.nested_code[e], state.state2.code)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@nested
def test_bits_are_those_of_bitsandbytes(shape, double_quant):
    for dtype in DTYPES:
        stack = weights(shape, dtype)
        assert_same(nf4_quantize(stack, double_quant=double_quant), stack, double_quant)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_other_block_sizes(blocksize):
    stack = weights((65, 127))
    assert_same(nf4_quantize(stack, blocksize, double_quant=True), stack, True)


def test_the_tables_do_not_depend_on_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            code, nearest = nf4_nested.dynamic_code.__wrapped__(), nf4_nested._nearest.__wrapped__()
    finally:
        torch.set_default_dtype(before)
    exact(code, bnb.create_dynamic_map())
    exact(nearest, nf4_nested._nearest())


def test_zero_blocks_and_values_between_two_codes():
    code = bnb.get_4bit_type("nf4", device="cpu")
    ties = torch.cat(((code[1:] + code[:-1]) / 2, code)).repeat(8)[None, :128]
    stack = torch.stack((ties, torch.zeros_like(ties)))
    assert_same(nf4_quantize(stack), stack, False)
    assert_same(nf4_quantize(stack, double_quant=True), stack, True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@nested
def test_dequantized_values_are_those_of_bitsandbytes(shape, double_quant):
    for dtype in DTYPES:
        stack = weights(shape, dtype)
        mine = nf4_quantize(stack, double_quant=double_quant).dequantize()
        assert mine.dtype == dtype and mine.shape == stack.shape
        for e, matrix in enumerate(stack):
            exact(mine[e], bnb.dequantize_4bit(*theirs(matrix, double_quant)))


def test_only_encoders_with_rows_are_dequantized_and_all_matrices_at_once():
    stacks = [weights((12, 20), encoders=3), weights((5, 7), encoders=3)]
    quantized = [nf4_quantize(stacks[0], double_quant=True), nf4_quantize(stacks[1])]
    out = nf4_dequantize_grouped([q.matrix for q in quantized], torch.tensor([0, 4, 4, 9]).int(), torch.float32)
    for mine, q in zip(out, quantized, strict=True):
        exact(mine[[0, 2]], q.dequantize()[[0, 2]])


def test_offsets_of_other_types_mean_the_same_or_are_refused():
    weight, offsets = nf4_quantize(weights((12, 20), encoders=3)), torch.tensor([0, 4, 4, 9])
    (out,) = nf4_dequantize_grouped([weight.matrix], offsets, torch.float32)
    exact(out[[0, 2]], weight.dequantize()[[0, 2]])
    for dtype in (torch.int16, torch.uint8, torch.float32):
        with pytest.raises(ValueError, match=f"group_offsets must be of type int32 or int64, got {dtype}"):
            nf4_dequantize_grouped([weight.matrix], offsets.to(dtype), torch.float32)
    with pytest.raises(ValueError, match="matrices must be one or more, got none"):
        nf4_dequantize_grouped([], offsets, torch.float32)


@nested
def test_quant_states_go_out_and_come_back(double_quant):
    stack = weights((33, 30), torch.bfloat16, encoders=3)
    mine = nf4_quantize(stack, double_quant=double_quant)
    entries = []
    for e, matrix in enumerate(stack):
        data, state = mine.quant_state(e)
        their_data, their_state = theirs(matrix, double_quant)
        exact(data, their_data)
        packed = their_state.as_dict(packed=True)
        assert state.keys() == packed.keys()
        for name, value in packed.items():
            exact(state[name], value)
        exact(
            bnb.dequantize_4bit(data, bnb.QuantState.from_dict(dict(state), torch.device("cpu"))), mine.dequantize()[e]
        )
        entries.append((their_data, {f"layers.0.weight.{k}": v for k, v in packed.items()}))
    back = Nf4Weight.from_quant_states(entries)
    assert (back.shape, back.dtype, back.blocksize) == ((33, 30), torch.bfloat16, 64)
    for name in ("codes", "absmax", "nested_absmax", "nested_offset", "nested_code"):
        if getattr(mine, name) is not None:
            exact(getattr(back, name), getattr(mine, name))


def entry(blocksize=64, double_quant=False, **changes):
    """Of a matrix in blocks of 64 values; blocksize: what its state says."""
    data, state = nf4_quantize(weights((16, 24), encoders=1), double_quant=double_quant).quant_state(0)
    (name,) = (name for name in state if name.startswith("quant_state"))
    settings = json.loads(bytes(state[name].tolist())) | {"blocksize": blocksize}
    return data, state | {name: torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)} | changes


def said(double_quant=False, **changes):
    """An entry whose state says something else."""
    data, state = entry(double_quant=double_quant)
    settings = json.loads(bytes(state["quant_state.bitsandbytes__nf4"].tolist())) | changes
    return [(data, state | packed(settings))]


def packed(settings):
    return {"quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)}


def fp4_entry():
    data, state = bnb.quantize_4bit(weights((16, 24), encoders=1)[0], quant_type="fp4")
    return data, state.as_dict(packed=True)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (lambda: [], "got none"),
        (lambda: [fp4_entry()], "encoder 0: expected 'quant_state.bitsandbytes__nf4'"),
        (lambda: [entry(quant_map=torch.linspace(-1, 1, 16))], "code table is not that of nf4"),
        (
            lambda: [entry(absmax=torch.ones(5))],
            r"absmax must be a scale every 64 values with sizes \[1, 6\], got \[1, 5\]",
        ),
        (lambda: [entry(), entry(double_quant=True)], "encoder 1 and encoder 0 differ in double quantisation"),
        (lambda: [entry(), nf4_quantize(weights((24, 16))).quant_state(0)], "encoder 1 has shape"),
        (lambda: [(torch.zeros(7, 1, dtype=torch.uint8), entry()[1])], "codes must be two values"),
        (lambda: [entry(blocksize=48)], "blocksize must be one of .*, got 48"),
        (lambda: [entry(), nf4_quantize(weights((16, 24)), 128).quant_state(0)], "encoder 1 has blocksize 128"),
        (lambda: said(shape=[384]), r"shape of two positive integers, got \[384\]"),
        (lambda: said(shape=[2, 8, 24]), "shape of two positive integers"),
        (lambda: said(shape="ab"), "shape of two positive integers, got 'ab'"),
        (lambda: said(shape=[-16, -24]), "shape of two positive integers"),
        (lambda: said(shape=[16.0, 24.0]), "shape of two positive integers"),
        (lambda: said(blocksize=64.0), "integer as blocksize, got 64.0"),
        (lambda: said(dtype=["float32"]), "dtype of float32, bfloat16, float16, got"),
        (lambda: said(True, nested_offset=None), "finite number as nested_offset, got None"),
        (lambda: said(True, nested_offset=float("nan")), "finite number as nested_offset, got nan"),
        (lambda: [entry(**packed([1]))], "to be a JSON object in uint8, got a list"),
        (
            lambda: [entry(**{"quant_state.bitsandbytes__nf4": torch.ones(5)})],
            r"to be a JSON object in uint8, got torch\.float32 values",
        ),
        (lambda: [entry(**{"quant_state.bitsandbytes__nf4": torch.ones(5).byte()})], "to be a JSON object in uint8"),
    ],
)
def test_bad_states_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        Nf4Weight.from_quant_states(entries())


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match=r"blocksize must be one of .* got 48"):
        nf4_quantize(weights((8, 8)), blocksize=48)
    with pytest.raises(ValueError, match=r"stacked weights \[E, N, K\]"):
        nf4_quantize(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        nf4_quantize(torch.ones(1, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="nested_code must be float32"):
        replace(nf4_quantize(weights((8, 8)), double_quant=True), nested_code=None)


def test_storage_with_double_quantisation():
    weight = nf4_quantize(weights((384, 384)), double_quant=True)
    assert weight.nbytes() <= 0.53 * 2 * 384 * 384


def test_ops_are_registered_well():
    weight = weights((9, 13))
    with use_backend("reference"):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.mowe.nf4_quantize.default, (weight, 64), test_utils=checks)
        q = nf4_quantize(weight, double_quant=True)
        nested = [[q.nested_absmax], [q.nested_offset], [q.nested_code]]
        args = ([q.codes], [q.absmax], *nested, [9, 13, 64], torch.tensor([0, 1, 2]).int(), torch.bfloat16)
        torch.library.opcheck(torch.ops.mowe.nf4_dequantize_grouped.default, args, test_utils=checks)
