"""Launches made again with other tensors, as those of a layer of an encoder are for the next: all that the host does
between them is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mowe_kernels.triton._launch import Started, cdiv, current_stream, noting, start

ALIGNMENT = 256  # bytes, between temporaries: more than any kernel asks for


class Repeat(NamedTuple):
    """Launches, and the values they pick their arguments from: addresses of the inputs, of the result and of the
    temporaries, then `fixed`, what is no tensor.

    steps: how a kernel is started, how many programs, what it picks. offsets, size: bytes of the temporaries, which lie
    in one piece of memory.
    """

    steps: tuple[tuple[Started, int, Callable[[Sequence[Any]], tuple[Any, ...]]], ...]
    fixed: tuple[Any, ...]
    offsets: tuple[int, ...]
    size: int

    def __call__(self, device: int, addresses: Sequence[int], like: Tensor) -> Tensor:
        """The result, of the shape and type of `like`, for inputs that lie at these addresses."""
        out, memory = torch.empty_like(like), like.new_empty(self.size, dtype=torch.uint8)
        first, stream = memory.data_ptr(), current_stream(device)
        values = (*addresses, out.data_ptr(), *[first + offset for offset in self.offsets], *self.fixed)
        for known, programs, pick in self.steps:
            start(known, programs, stream, pick(values))
        return out


def noted(inputs: Sequence[Tensor], compute: Callable[[], Tensor]) -> tuple[Tensor, Repeat | None]:
    """The result of `compute`, which does nothing but launch kernels, and how to repeat that with other inputs of the
    same sizes, types and alignments. None where it cannot be: an argument is neither a tensor, a number nor left out,
    or two of the tensors begin at one address.
    """
    with noting() as launches:
        out = compute()
    places = {tensor.data_ptr(): place for place, tensor in enumerate((*inputs, out))}
    if len(places) <= len(inputs):
        return out, None
    steps: list[tuple[Started, int, Callable[[Sequence[Any]], tuple[Any, ...]]]] = []
    fixed: list[Any] = []
    offsets, size = [], 0
    for known, programs, args in launches:
        picked = []
        for arg in args:
            if arg is None or isinstance(arg, (int, float)):
                fixed.append(arg)
                picked.append(-len(fixed))  # they end the values, the first one last
                continue
            if not isinstance(arg, Tensor):
                return out, None
            place = places.get(address := arg.data_ptr())
            if place is None:
                if arg.storage_offset() or address % 16:
                    return out, None
                place = places[address] = len(places)
                offsets.append(size)
                size += cdiv(arg.untyped_storage().nbytes(), ALIGNMENT) * ALIGNMENT
            picked.append(place)
        steps.append((known, programs, itemgetter(*picked)))
    return out, Repeat(tuple(steps), tuple(reversed(fixed)), tuple(offsets), size)
