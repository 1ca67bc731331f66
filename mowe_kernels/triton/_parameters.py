"""A kernel's arguments as the driver is given them: what Triton's own launcher makes of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mowe_kernels.csrc.launch import Address, Argument, Launch, Matrix, Value, parameter_sizes
from mowe_kernels.triton._launch import Started

WARP = 32  # threads
_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f"}
_NOTHING = Value(0, 8)


def as_launch(known: Started, programs: int, args: tuple[Any, ...], places: Mapping[int, Address]) -> Launch | None:
    """The launch of what was compiled, places being those of all tensors by their addresses.

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
    return Launch(known.function, programs, WARP * num_warps, shared, arguments)


def _arguments(known: Started, args: tuple[Any, ...], places: Mapping[int, Address]) -> Iterator[Argument]:
    """What is not a constant of the compiled code, a descriptor followed by its sizes and strides."""
    described = iter(known.compiled.metadata.tensordesc_meta or ())
    for kind, arg in zip(known.compiled.src.signature.values(), (*args, *known.constants), strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            yield places[arg.data_ptr()] if isinstance(arg, Tensor) and arg.numel() else _NOTHING
        elif kind.startswith("tensordesc"):
            yield from _descriptor(arg, next(described, None), places)
        else:
            yield _number(kind, arg)


def _descriptor(arg: Any, how: Mapping[str, Any] | None, places: Mapping[int, Address]) -> Iterator[Argument]:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    rows, columns = arg.shape
    if how is None or how["fp4_padded"] or arg.padding != "zero" or tuple(arg.strides) != (columns, 1):
        raise ValueError("a descriptor of another kind")
    kind, block = TMA_DTYPE_DEVICE_TO_HOST[how["elem_type"]], tuple(how["block_size"])
    yield Matrix(places[arg.base.data_ptr()], kind, how["swizzle"], how["elem_size"], (rows, columns), block)
    yield from (_number("i32", size) for size in arg.shape)
    yield from (_number("i64", stride) for stride in arg.strides)


def _number(kind: str, value: float) -> Value:
    packed = struct.pack(_PACKED[kind], value)
    return Value(int.from_bytes(packed, "little"), len(packed))
