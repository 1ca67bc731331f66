"""A kernel's arguments as the driver is given them: what Triton's own launcher makes of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mowe_kernels.csrc.launch import OF_BATCH, Address, Argument, Launch, Matrix, Rows, Value, parameter_sizes
from mowe_kernels.triton._launch import Programs, Started

WARP = 32  # threads
_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f"}
_NOTHING = Value(0, 8)
_MORE_ROWS = 2**31 - 1  # than any batch has: as the `block` of a grid, it makes a fixed one


class Places(NamedTuple):
    """Where tensors lie, by their addresses. rows: of the batch. others: addresses of those that have no such rows."""

    rows: int
    addresses: Mapping[int, Address]
    others: frozenset[int]


def as_launch(known: Started, programs: int, args: tuple[Any, ...], places: Places) -> Launch | None:
    """The launch of what was compiled, for a batch of other rows too.

    None where Triton gives the kernel more than its arguments, or those in a way that is not known here; the driver
    is asked whether it takes what it would be given.
    """
    try:
        compiled = known.compiled.metadata
        num_warps, num_ctas, shared = known.metadata
        scratch = compiled.global_scratch_size or compiled.profile_scratch_size
        if num_ctas != 1 or scratch or compiled.launch_cooperative_grid or compiled.launch_pdl:
            return None
        # Behind the arguments, two pieces of memory of which these kernels want none.
        arguments = *_arguments(known, args, places), _NOTHING, _NOTHING
    except (ImportError, AttributeError, LookupError, TypeError, ValueError):  # a Triton that has it otherwise
        return None
    if parameter_sizes(known.function) != [argument.size for argument in arguments]:
        return None
    counted = programs if isinstance(programs, Programs) else Programs(0, _MORE_ROWS, 1, programs)
    grid = counted.block, counted.more, counted.times
    return Launch(known.function, *grid, WARP * num_warps, shared, arguments)


def _arguments(known: Started, args: tuple[Any, ...], places: Places) -> Iterator[Argument]:
    """What is not a constant of the compiled code, a descriptor followed by its sizes and strides."""
    described = iter(known.compiled.metadata.tensordesc_meta or ())
    for (name, kind), arg in zip(known.compiled.src.signature.items(), (*args, *known.constants), strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            yield places.addresses[arg.data_ptr()] if isinstance(arg, Tensor) and arg.numel() else _NOTHING
        elif kind.startswith("tensordesc"):
            yield from _descriptor(arg, next(described, None), places)
        else:
            yield _rows(kind, arg, places) if name == "num_rows" else _number(kind, arg)


def _descriptor(arg: Any, how: Mapping[str, Any] | None, places: Places) -> Iterator[Argument]:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    rows, columns = arg.shape
    if how is None or how["fp4_padded"] or arg.padding != "zero" or tuple(arg.strides) != (columns, 1):
        raise ValueError("a descriptor of another kind")
    kind, block = TMA_DTYPE_DEVICE_TO_HOST[how["elem_type"]], tuple(how["block_size"])
    address, height, count = arg.base.data_ptr(), rows, _number("i32", rows)
    if address not in places.others:
        height, count = OF_BATCH, _rows("i32", rows, places)
    yield Matrix(places.addresses[address], kind, how["swizzle"], how["elem_size"], (height, columns), block)
    yield from (count, _number("i32", columns))
    yield from (_number("i64", stride) for stride in arg.strides)


def _rows(kind: str, value: int, places: Places) -> Rows:
    if value != places.rows:
        raise ValueError(f"{value} rows in a batch of {places.rows}")
    return Rows(_number(kind, value).size)


def _number(kind: str, value: float) -> Value:
    packed = struct.pack(_PACKED[kind], value)
    return Value(int.from_bytes(packed, "little"), len(packed))
