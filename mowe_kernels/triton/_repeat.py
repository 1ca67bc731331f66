"""Launches made again with other tensors, as those of a layer of an encoder are for the next: all that the host does
between them is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mowe_kernels.triton._descriptors import Memory, descriptor
from mowe_kernels.triton._launch import Started, cdiv, current_stream, noting, start

ALIGNMENT = 256  # bytes, between temporaries: more than any kernel asks for
MOST_BYTES = 2**29  # of temporaries: they are one piece of memory, hard to find where little is left (our choice)
Step = tuple[Started, int, Callable[[Sequence[Any]], tuple[Any, ...]]]


class Described(NamedTuple):
    """A descriptor among the values: its place there, that of its matrix, and what is always the same about it."""

    place: int
    of: int
    dtype: torch.dtype
    shape: tuple[int, int]
    block: tuple[int, int]


class Repeat(NamedTuple):
    """Launches, and the values they pick their arguments from: addresses of the inputs, of the results and of the
    temporaries, then `fixed`, what is no tensor, and room for what is `described`.

    steps: how a kernel is started, how many programs, what it picks. results: shapes and types. offsets, size: bytes of
    the temporaries, which lie in one piece of memory, over one another where no launch sees both.
    """

    steps: tuple[Step, ...]
    results: tuple[tuple[torch.Size, torch.dtype], ...]
    fixed: tuple[Any, ...]
    described: tuple[Described, ...]
    offsets: tuple[int, ...]
    size: int

    def __call__(self, device: int, addresses: Sequence[int], like: Tensor) -> tuple[Tensor, ...]:
        """The results for inputs that lie at these addresses, on the device of `like`."""
        results = tuple([like.new_empty(shape, dtype=dtype) for shape, dtype in self.results])
        memory = like.new_empty(self.size, dtype=torch.uint8)
        first, stream = memory.data_ptr(), current_stream(device)
        temporaries = [first + offset for offset in self.offsets]
        made = [result.data_ptr() for result in results if result.numel()]
        values = [*addresses, *made, *temporaries, *self.fixed]
        for place, of, dtype, shape, block in self.described:
            values[place] = descriptor(Memory(values[of], dtype, like.device), shape, block)
        for known, programs, pick in self.steps:
            start(known, programs, stream, pick(values))
        return results


class Temporary(NamedTuple):
    """Bytes, and the first and the last launch that sees them."""

    size: int
    first: int
    last: int


def laid_out(temporaries: Sequence[Temporary]) -> list[int]:
    """Where each begins: as low as those allow that are still to be seen. In the order of their first launches."""
    offsets: list[int] = []
    for size, first, _ in temporaries:
        taken = sorted((at, at + t.size) for at, t in zip(offsets, temporaries, strict=False) if t.last >= first)
        place = 0
        for begin, end in taken:
            if begin - place >= size:
                break
            place = max(place, end)
        offsets.append(place)
    return offsets


def noted(
    inputs: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], Repeat | None]:
    """The results of `compute`, which does nothing but launch kernels, and how to repeat that with other inputs of the
    same sizes, types and alignments. None where it cannot be: an argument is neither a tensor, the descriptor of one
    that was seen, a number nor left out, two of the tensors begin at one address, or temporaries take too much memory.
    """
    with noting() as launches:
        results = compute()
    given = (*inputs, *(result for result in results if result.numel()))
    places = {tensor.data_ptr(): place for place, tensor in enumerate(given)}
    if len(places) < len(given):
        return results, None
    steps: list[Step] = []
    fixed: list[Any] = []  # picked from the end: how many temporaries come before is not known yet
    described: list[Described] = []
    temporaries: list[Temporary] = []

    def seen(place: int, step: int) -> None:
        if place >= len(given):
            temporaries[place - len(given)] = temporaries[place - len(given)]._replace(last=step)

    for step, (known, programs, args) in enumerate(launches):
        picked = []
        for arg in args:
            if not isinstance(arg, Tensor) or not arg.numel():
                value = 0 if isinstance(arg, Tensor) else arg  # nothing is read where nothing lies
                if isinstance(value, TensorDescriptor):
                    of = places.get(value.base.data_ptr())
                    if of is None:
                        return results, None
                    seen(of, step)
                    same = value.base.dtype, tuple(value.shape), tuple(value.block_shape)
                    described.append(Described(-1 - len(fixed), of, *same))
                    value = None
                elif not (value is None or isinstance(value, (int, float))):
                    return results, None
                fixed.append(value)
                picked.append(-len(fixed))
                continue
            place = places.get(address := arg.data_ptr())
            if place is None:
                if arg.storage_offset() or address % 16:
                    return results, None
                place = places[address] = len(places)
                size = cdiv(arg.untyped_storage().nbytes(), ALIGNMENT) * ALIGNMENT
                temporaries.append(Temporary(size, step, step))
            seen(place, step)
            picked.append(place)
        steps.append((known, programs, itemgetter(*picked)))
    offsets = laid_out(temporaries)
    size = max((offset + each.size for offset, each in zip(offsets, temporaries, strict=True)), default=0)
    if size > MOST_BYTES:
        return results, None
    shapes = tuple((result.shape, result.dtype) for result in results)
    return results, Repeat(tuple(steps), shapes, tuple(reversed(fixed)), tuple(described), tuple(offsets), size)
