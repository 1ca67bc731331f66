"""Compiled kernels started one after the other, without Python between them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

from mowe_kernels import csrc

_MOST_PARAMETERS = 64  # of a kernel


class Address(NamedTuple):
    """What lies so many bytes behind the one at this place among those that are given."""

    place: int
    offset: int = 0

    size = 8


class Matrix(NamedTuple):
    """A descriptor (TMA) of a row-major matrix. type, swizzle: as the driver numbers them. block: what is fetched."""

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


Argument = Address | Matrix | Value
"""`size`: bytes of the kernel's parameter."""


class Launch(NamedTuple):
    """function: the driver's. programs, threads: how many, and of how many each. shared: bytes of shared memory."""

    function: int
    programs: int
    threads: int
    shared: int
    arguments: tuple[Argument, ...]


class _Argument(ctypes.Structure):
    _fields_ = [("kind", c_int32), ("place", c_int32), ("value", c_uint64)]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("type", c_int32), ("swizzle", c_int32),
        ("rows", c_uint64), ("columns", c_uint64), ("itemsize", c_uint64),
        ("block_rows", c_uint32), ("block_columns", c_uint32),
        ("address", _Argument),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("function", c_void_p),
        ("programs", c_uint32), ("threads", c_uint32), ("shared", c_uint32), ("arguments", c_uint32),
    ]  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = [
        ("launches", ctypes.POINTER(_Launch)), ("arguments", ctypes.POINTER(_Argument)),
        ("matrices", ctypes.POINTER(_Matrix)), ("num_launches", c_int32), ("num_matrices", c_int32),
    ]  # fmt: skip


class Program:
    """Launches, to be made as often as is liked, with other addresses.

    num_addresses: how many it is given each time. num_matrices: how many descriptors are made of them.
    """

    def __init__(self, launches: Sequence[Launch], num_addresses: int):
        self._start, self._addresses = _library().mowe_launch, c_uint64 * num_addresses
        matrices: list[_Matrix] = []
        arguments = [_described(argument, matrices) for launch in launches for argument in launch.arguments]
        self.num_matrices = len(matrices)
        self._program = _Program(
            (_Launch * len(launches))(*((*launch[:4], len(launch.arguments)) for launch in launches)),
            (_Argument * len(arguments))(*arguments),
            (_Matrix * len(matrices))(*matrices),
            len(launches),
            self.num_matrices,
        )

    def __call__(self, addresses: Sequence[int], device: int, stream: int) -> None:
        """Make them on a stream of the device. Raises RuntimeError for what the driver says."""
        error = self._start(self._program, self._addresses(*addresses), device, stream)
        if error is not None:
            raise RuntimeError(f"CUDA error: {error.decode()}")


def available() -> bool:
    """Whether the library is there."""
    return csrc.available()


def parameter_sizes(function: int) -> list[int] | None:
    """Bytes of each parameter of a kernel; None where the driver cannot say."""
    sizes = (c_size_t * _MOST_PARAMETERS)()
    count = _library().mowe_parameters(function, sizes, _MOST_PARAMETERS)
    return None if count < 0 else list(sizes[:count])


@cache
def _library() -> Any:
    library = ctypes.CDLL(str(csrc.LIBRARIES["cpu"]))
    library.mowe_launch.argtypes = [ctypes.POINTER(_Program), ctypes.POINTER(c_uint64), c_int, c_void_p]
    library.mowe_launch.restype = c_char_p
    library.mowe_parameters.argtypes = [c_void_p, ctypes.POINTER(c_size_t), c_int]
    library.mowe_parameters.restype = c_int
    return library


def _described(argument: Argument, matrices: list[_Matrix]) -> Any:
    value, address, matrix = range(3)
    if isinstance(argument, Value):
        return value, 0, argument.bits
    if isinstance(argument, Address):
        return address, *argument
    at, kind, swizzle, itemsize, shape, block = argument
    matrices.append(_Matrix(kind, swizzle, *shape, itemsize, *block, (address, *at)))
    return matrix, len(matrices) - 1, 0
