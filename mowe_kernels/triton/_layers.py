"""Layers whose launches are made again: what one layer launched, the next ones launch too.

The first layer of a size goes through the ops; from then on, also for batches of about as many rows, the compiled
library finds that the tensors lie in memory as those did, and starts the same kernels on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mowe_kernels import attention
from mowe_kernels.csrc.launch import Program
from mowe_kernels.triton import varlen_attention
from mowe_kernels.triton._launch import alike, current_stream, forget_by, hooked, remembered
from mowe_kernels.triton._repeat import noted

# Of rows whose layers are repeated (our choice). Where there are more, the GPU takes longer than the host does, and the
# first time, when temporaries all live at once, would take memory for nothing: eleven times that of the rows in a
# forward, six in the ones after it, and in a backward several times as much.
MOST_BYTES = {"forward": 2**26, "backward": 2**24}
MOST_KEPT, MOST_ALIKE = 1024, 4  # keys; programs of a key, for tensors that lie otherwise than those of the others
_kept: dict[tuple, list[Program]] = {}  # none for a key: to be computed part by part
forget_by(_kept.clear)


class Asked(NamedTuple):
    """A layer's results that are wanted, or those of the last one of several.

    direction: "forward" or "backward". what: all that results depend on beside what is named here. how: host bound of
    the lengths, heads, pre_norm, eps, equal_lengths. All tensors that are read: of_batch, with as many rows as x
    [R, D], the first; shared by all layers, group_offsets and cu_seqlens being the first; of_layers, of each its own.
    """

    direction: str
    what: Any
    how: tuple[Any, ...]
    of_batch: Sequence[Tensor]
    shared: Sequence[Tensor]
    of_layers: Sequence[Sequence[Tensor]]


def again(asked: Asked) -> Sequence[Tensor]:
    """The results, where the launches that lead to them are known; nothing where they are not."""
    programs, device = _kept.get(_key(asked)), asked.of_batch[0].get_device()
    if not programs or not _launches(device) or not _attends(asked):
        return ()
    inputs, stream = [*asked.of_batch, *asked.shared, *chain.from_iterable(asked.of_layers)], current_stream(device)
    for program in programs:
        if results := program(inputs, stream):
            return results
    return ()


def computed(compute: Callable[[], tuple[Tensor, ...]], asked: Asked) -> tuple[Tensor, ...]:
    """What `compute` gives, of one layer; its launches are kept for the next layer, if they can be made again.

    compute: launches our kernels and those of attention, nothing else.
    """
    direction, _, (_, heads, *_), of_batch, shared, (of_layer,) = asked
    x, inputs, key = of_batch[0], (*of_batch, *shared, *of_layer), _key(asked)
    programs = _kept.get(key)
    if (
        x.nbytes > MOST_BYTES[direction]
        or x.shape[0] in (0, heads)  # of sums of exponentials [heads, R], the axis of the rows could not be told
        or (programs is not None and not 0 < len(programs) < MOST_ALIKE)
        or not _launches(x.get_device())
        or len({tensor.device for tensor in inputs}) > 1
        or not all(tensor.is_contiguous() for tensor in inputs)  # else they are copied before they are read
        or not _attends(asked)
    ):
        return compute()
    try:
        results, program = noted(of_batch, shared, of_layer, compute, None if direction == "forward" else 1)
    except torch.OutOfMemoryError:  # meanwhile no temporary makes room for another
        return compute()
    if program is not None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        _kept[key] = [*(programs or ()), program]
    elif len({tensor.data_ptr() for tensor in inputs}) == len(inputs):  # else others of these sizes may be told apart
        _kept.setdefault(key, [])
    return results


def _key(asked: Asked) -> tuple[Any, ...]:
    """What tells layers and batches apart whose launches differ; a program itself sees that all else is as it was."""
    direction, what, (_, heads, pre_norm, eps, _), (x, *_), (group_offsets, cu_seqlens, *_), _ = asked
    rows, d = x.shape
    aligned = group_offsets.data_ptr() % 16 == 0, cu_seqlens.data_ptr() % 16 == 0  # they are parts of the plan's
    sizes = alike(rows), d, group_offsets.shape, cu_seqlens.shape
    return direction, what, heads, pre_norm, eps, *sizes, x.dtype, group_offsets.dtype, *aligned, x.get_device()


def _launches(device: int) -> bool:
    """Whether it is a GPU, and nobody wants to hear of every launch."""
    return device >= 0 and not hooked()


def _attends(asked: Asked) -> bool:
    """Whether attention is computed by our own kernel, to which no length matters, and not by what launches others."""
    (max_seqlen, heads, _, _, equal_lengths), x = asked.how, asked.of_batch[0]
    return _chosen(asked.direction, x.device, x.dtype, *x.shape, max_seqlen, heads, equal_lengths)


@remembered
def _chosen(
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    d: int,
    max_seqlen: int,
    heads: int,
    equal_lengths: bool,
) -> bool:
    qkv, scale = _number(device, dtype).expand(rows, 3, heads, d // heads), (d // heads) ** -0.5
    return attention.choose(direction, qkv, max_seqlen, scale, equal_lengths) is varlen_attention


@remembered
def _number(device: torch.device, dtype: torch.dtype) -> Tensor:
    """One for all, since every batch has another longest sequence, and its backend is looked for."""
    return torch.empty((), device=device, dtype=dtype)
