"""Launches that can be made again with other tensors, as those of a layer of an encoder are for the next: all that the
host does between them is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mowe_kernels.csrc import launch
from mowe_kernels.csrc.launch import Address, Program
from mowe_kernels.triton._launch import cdiv, noting
from mowe_kernels.triton._parameters import as_launch

ALIGNMENT = 256  # bytes, between temporaries: more than any kernel asks for
MOST_BYTES = 2**29  # of temporaries: they are one piece of memory, hard to find where little is left (our choice)


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
) -> tuple[tuple[Tensor, ...], Program | None]:
    """The results of `compute`, which does nothing but launch kernels, and how to repeat that with other inputs of the
    same sizes, types and alignments, temporaries lying over one another where no launch sees both.

    None where it cannot be: there is no compiled library, an argument is neither a tensor, the descriptor of one that
    was seen, a number nor left out, two of the tensors begin at one address, temporaries take too much memory, or a
    kernel is not started by its arguments alone.
    """
    with noting() as launches:
        results = compute()
    given = (*inputs, *(result for result in results if result.numel()))
    places = {tensor.data_ptr(): Address(place) for place, tensor in enumerate(given)}
    temporaries = _temporaries([args for _, _, args in launches], places)
    if len(places) < len(given) or temporaries is None or not launch.available():
        return results, None
    offsets = laid_out([*temporaries.values()])
    size = max((offset + each.size for offset, each in zip(offsets, temporaries.values(), strict=True)), default=0)
    places |= {address: Address(len(given), offset) for address, offset in zip(temporaries, offsets, strict=True)}
    steps = [as_launch(*launched, places) for launched in launches]
    if size > MOST_BYTES or None in steps:
        return results, None
    return results, Program(steps, inputs, results, size)


def _temporaries(launches: Sequence[Sequence[Any]], places: dict[int, Address]) -> dict[int, Temporary] | None:
    """By address, what the arguments of the launches name beside what has a place; None for what cannot have one."""
    found: dict[int, Temporary] = {}
    for step, args in enumerate(launches):
        for arg in args:
            described = isinstance(arg, TensorDescriptor)
            if not described and not isinstance(arg, Tensor):
                if arg is None or isinstance(arg, (int, float)):
                    continue
                return None
            address = (arg.base if described else arg).data_ptr()
            if address in places or (not described and not arg.numel()):
                continue
            if address in found:
                found[address] = found[address]._replace(last=step)
            elif described or arg.storage_offset() or address % 16:
                return None
            else:
                size = cdiv(arg.untyped_storage().nbytes(), ALIGNMENT) * ALIGNMENT
                found[address] = Temporary(size, step, step)
    return found
