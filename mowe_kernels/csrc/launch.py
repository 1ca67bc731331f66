"""Compiled kernels started one after the other, without Python between them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mowe_kernels import csrc

_SCALAR_TYPES = {
    torch.uint8: 0, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15,
}  # fmt: skip
"""As torch numbers them."""
_ARGUMENT = "iiQ"  # the fields of an `_Argument`, for `struct`
_MOST_PARAMETERS = 64  # of a kernel
OF_BATCH = -1
"""In the place of a size: the number of rows of a batch, the first size of the first of a program's inputs."""


class Address(NamedTuple):
    """What lies so many bytes behind the one at this place among those that are given."""

    place: int
    offset: int = 0

    size = 8


class Matrix(NamedTuple):
    """A descriptor (TMA) of a row-major matrix. type, swizzle: as the driver numbers them. block: what is fetched.
    shape: rows, OF_BATCH or so many, and columns.
    """

    address: Address
    type: int
    swizzle: int
    itemsize: int
    shape: tuple[int, int]
    block: tuple[int, int]

    size = 128


class Value(NamedTuple):
    """A number as the kernel takes it, so many bytes."""

    bits: int
    size: int


class Rows(NamedTuple):
    """How many rows the batch has, as the kernel takes it, so many bytes."""

    size: int


Argument = Address | Matrix | Value | Rows
"""`size`: bytes of the kernel's parameter."""


class Launch(NamedTuple):
    """(rows // block + more) * times programs of so many threads. function: the driver's. shared: bytes of shared
    memory of a program.
    """

    function: int
    block: int
    more: int
    times: int
    threads: int
    shared: int
    arguments: tuple[Argument, ...]


class Layout(NamedTuple):
    """How a contiguous tensor lies in memory. shape: with OF_BATCH for the number of rows. aligned: to 16 bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool = True


class _Argument(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("place", c_int32), ("value", c_uint64)]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("type", c_int32), ("swizzle", c_int32),
        ("rows", c_int64), ("columns", c_uint64), ("itemsize", c_uint64),
        ("block_rows", c_uint32), ("block_columns", c_uint32),
        ("address", _Argument),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", c_void_p),
        ("block", c_uint32), ("more", c_uint32), ("times", c_uint32),
        ("threads", c_uint32), ("shared", c_uint32), ("arguments", c_uint32),
    ]  # fmt: skip


class _Layout(ctypes.Structure):
    _fields_ = [("sizes", ctypes.POINTER(c_int64)), ("dims", c_int32), ("type", c_int32), ("aligned", c_int32)]


class _Program(ctypes.Structure):
    _fields_ = [
        ("inputs", ctypes.POINTER(_Layout)), ("results", ctypes.POINTER(_Layout)),
        ("launches", ctypes.POINTER(_Launch)), ("arguments", ctypes.POINTER(_Argument)),
        ("matrices", ctypes.POINTER(_Matrix)), ("most_rows", c_int64), ("bytes", c_int64),
        ("num_inputs", c_int32), ("num_of_layer", c_int32), ("num_results", c_int32), ("num_launches", c_int32),
        ("num_matrices", c_int32), ("device", c_int32),
    ]  # fmt: skip


class Program:
    """Launches, to be made as often as is liked, on tensors that lie in memory as `inputs` say.

    Addresses are told by their places among the inputs, the results that are not empty, and one piece of memory of so
    many bytes, `size`, for all else of a batch of at most `most_rows` rows. of_layer: how many of the inputs, from the
    last one back, every layer has of its own, at least one. device: of the tensors, -1 for the host.
    num_matrices: how many descriptors are made each time.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        inputs: Sequence[Layout],
        of_layer: int,
        results: Sequence[Layout],
        most_rows: int,
        size: int,
        device: int,
    ):
        matrices: list[_Matrix] = []
        arguments = [_described(argument, matrices) for launch in launches for argument in launch.arguments]
        packed = struct.pack("<" + len(arguments) * _ARGUMENT, *chain.from_iterable(arguments))
        self.num_matrices = len(matrices)
        self._program = _Program(
            (_Layout * len(inputs))(*map(_layout, inputs)),
            (_Layout * len(results))(*map(_layout, results)),
            (_Launch * len(launches))(*((*launch[:-1], len(launch.arguments)) for launch in launches)),
            (_Argument * len(arguments)).from_buffer_copy(packed),  # ctypes takes long to turn each into one
            (_Matrix * len(matrices))(*matrices),
            most_rows,
            size,
            len(inputs),
            of_layer,
            *map(len, (results, launches, matrices)),
            device,
        )
        self._address, self._launch = ctypes.addressof(self._program), torch.ops.mowe.launch_layers.default

    def __call__(self, inputs: list[Tensor], stream: int) -> list[Tensor]:
        """The results, launched on a stream of the device; none where the inputs lie otherwise.

        inputs: where those of further layers follow that each has of its own, they are taken one after the other, the
        first result of one being the first input of the next, and the results are those of the last one.
        Raises torch.OutOfMemoryError where there is no room for them, RuntimeError for what the driver says.
        """
        try:
            return self._launch(self._address, inputs, stream)
        except RuntimeError as error:
            if "out of memory" in str(error):  # the compiled library knows no other kind of error
                raise torch.OutOfMemoryError(str(error)) from None
            raise


def available() -> bool:
    """Whether the library is there."""
    return csrc.available()


@cache
def parameter_sizes(function: int) -> list[int] | None:
    """Bytes of each parameter of a kernel; None where the driver cannot say."""
    sizes = (c_size_t * _MOST_PARAMETERS)()
    count = _library().mowe_parameters(function, sizes, _MOST_PARAMETERS)
    return None if count < 0 else list(sizes[:count])


@cache
def _library() -> Any:
    library = ctypes.CDLL(str(csrc.LIBRARIES["cpu"]))
    library.mowe_parameters.argtypes = [c_void_p, ctypes.POINTER(c_size_t), c_int]
    library.mowe_parameters.restype = c_int
    return library


def _layout(layout: Layout) -> Any:
    dims = len(layout.shape)
    return (c_int64 * dims)(*layout.shape), dims, _SCALAR_TYPES[layout.dtype], layout.aligned


def _described(argument: Argument, matrices: list[_Matrix]) -> tuple[int, int, int]:
    """The fields of an `_Argument`."""
    value, address, matrix, rows = range(4)
    if isinstance(argument, Value):
        return value, 0, argument.bits
    if isinstance(argument, Rows):
        return rows, 0, 0
    if isinstance(argument, Address):
        return address, *argument
    at, kind, swizzle, itemsize, shape, block = argument
    matrices.append(_Matrix(kind, swizzle, *shape, itemsize, *block, (address, *at)))
    return matrix, len(matrices) - 1, 0
