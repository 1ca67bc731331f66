"""Launches that can be made again with other tensors, as those of a layer of an encoder are for the next one and for
batches of other lengths: all that the host does between them is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mowe_kernels.csrc import launch
from mowe_kernels.csrc.launch import OF_BATCH, Address, Layout, Program
from mowe_kernels.triton._launch import alike, cdiv, noting
from mowe_kernels.triton._parameters import Places, as_launch

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
    of_batch: Sequence[Tensor],
    shared: Sequence[Tensor],
    of_layer: Sequence[Tensor],
    compute: Callable[[], tuple[Tensor, ...]],
    results_of_batch: int | None = None,
) -> tuple[tuple[Tensor, ...], Program | None]:
    """The results of `compute`, which does nothing but launch kernels, and how to repeat that with other inputs of the
    same types, alignments and sizes, but for the number of rows, which may be another that is `alike`. Temporaries lie
    over one another where no launch sees both.

    of_batch: inputs that have as many rows as the batch, along the first axis of the first one, and in the others along
    the first axis of that size, which no axis before may have. shared, of_layer: inputs without such rows, of all
    layers and of one. results_of_batch: how many of the results, from the first on, have these rows; all without.
    Memory of temporaries is to grow no faster than the number of rows.
    None where it cannot be: there is no compiled library, an argument is neither a tensor, the descriptor of one that
    was seen, a number nor left out, two of the tensors begin at one address, temporaries take too much memory, or a
    kernel is not started by its arguments alone.
    """
    with noting() as launches:
        results = compute()
    count = len(results) if results_of_batch is None else results_of_batch
    with_rows, without = (of_batch, results[:count]), ((*shared, *of_layer), results[count:])
    given = (*of_batch, *without[0], *(result for result in results if result.numel()))
    addresses = {tensor.data_ptr(): Address(place) for place, tensor in enumerate(given)}
    temporaries = _temporaries([args for _, _, args in launches], addresses)
    if len(addresses) < len(given) or temporaries is None or not launch.available():
        return results, None
    rows = of_batch[0].shape[0]
    offsets, size = _room(temporaries, rows)
    addresses |= {address: Address(len(given), offset) for address, offset in offsets.items()}
    places = Places(rows, addresses, frozenset(tensor.data_ptr() for tensors in without for tensor in tensors))
    steps = [as_launch(*launched, places) for launched in launches]
    if size > MOST_BYTES or None in steps:
        return results, None
    inputs, outputs = (
        [*(_layout(tensor, rows) for tensor in moving), *map(_layout, still)]
        for moving, still in zip(with_rows, without, strict=True)
    )
    return results, Program(steps, inputs, len(of_layer), outputs, alike(rows), size, of_batch[0].get_device())


def _room(temporaries: dict[int, Temporary], rows: int) -> tuple[dict[int, int], int]:
    """Where each begins, by its address, and the size of all, for the most rows that are alike."""
    sized = [each._replace(size=_aligned(cdiv(each.size * alike(rows), rows))) for each in temporaries.values()]
    offsets = laid_out(sized)
    size = max((offset + each.size for offset, each in zip(offsets, sized, strict=True)), default=0)
    return dict(zip(temporaries, offsets, strict=True)), size


def _aligned(size: int) -> int:
    return cdiv(size, ALIGNMENT) * ALIGNMENT


def _layout(tensor: Tensor, rows: int | None = None) -> Layout:
    shape = list(tensor.shape)
    if rows is not None and tensor.numel():
        shape[shape.index(rows)] = OF_BATCH
    return Layout(tuple(shape), tensor.dtype, tensor.data_ptr() % 16 == 0)


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
                found[address] = Temporary(_aligned(arg.untyped_storage().nbytes()), step, step)
    return found
