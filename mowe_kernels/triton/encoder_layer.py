"""Triton `encoder_layer`: the kernels of its parts. What one layer launched, the next ones launch again.

The first layer of a number of rows goes through the ops; from then on the compiled library finds that the tensors lie
in memory as those did, and starts the same kernels on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mowe_kernels import attention
from mowe_kernels.csrc.launch import Program
from mowe_kernels.reference import encoder_layer as reference
from mowe_kernels.triton import varlen_attention
from mowe_kernels.triton._launch import current_stream, forget_by, hooked, remembered
from mowe_kernels.triton._repeat import noted

# Of rows whose layers are repeated (our choice). Where there are more, the GPU takes longer than the host does, and the
# first time, when temporaries all live at once, would take memory for nothing: eleven times that of the rows in a
# forward, six in the ones after it, and in a backward several times as much.
MOST_BYTES = {"forward": 2**26, "backward": 2**24}
MOST_KEPT = 256
_kept: dict[tuple, Program | None] = {}  # None: to be computed part by part
forget_by(_kept.clear)


def forward(
    parts: reference.Parts,
    saves: bool,
    x: Tensor,
    parameters: Sequence[Tensor],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    *how: Any,
) -> Sequence[Tensor]:
    """As the reference."""
    compute = partial(reference.forward, parts, saves, x, parameters, group_offsets, cu_seqlens, *how)
    inputs = [x, *parameters, group_offsets, cu_seqlens]
    return again("forward", saves, how, inputs) or _computed(compute, "forward", saves, how, inputs)


def backward(
    parts: reference.Parts,
    needs: Sequence[bool],
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    saved: Sequence[Tensor],
    *how: Any,
) -> Sequence[Tensor]:
    """As the reference."""
    compute = partial(reference.backward, parts, needs, grad, x, parameters, group_offsets, cu_seqlens, saved, *how)
    inputs = [x, *parameters, group_offsets, cu_seqlens, grad, *saved]
    return again("backward", needs, how, inputs) or _computed(compute, "backward", needs, how, inputs)


def again(direction: str, asked: Any, how: tuple[Any, ...], inputs: list[Tensor]) -> Sequence[Tensor]:
    """What `forward` or `backward` gives, where its launches are known; nothing where they are not.

    asked: what is to be saved, or whose gradients are needed. inputs: x, parameters, group_offsets, cu_seqlens and what
    a backward is given beside these.
    """
    program, device = _kept.get(_key(direction, asked, how, inputs)), inputs[0].get_device()
    if program is None or not _launches(device) or not _attends(direction, how, inputs[0]):
        return ()
    return program(inputs, current_stream(device))


def _computed(
    compute: Callable[[], tuple[Tensor, ...]], direction: str, asked: Any, how: tuple[Any, ...], inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """What `compute` gives; its launches are kept for the next, if they can be made again."""
    x, key = inputs[0], _key(direction, asked, how, inputs)
    if (
        x.nbytes > MOST_BYTES[direction]
        or _kept.get(key, compute) is None
        or not _launches(x.get_device())
        or len({tensor.device for tensor in inputs}) > 1
        or not all(tensor.is_contiguous() for tensor in inputs)  # else they are copied before they are read
        or not _attends(direction, how, x)
    ):
        return compute()
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    results, program = noted(inputs, compute)
    if program is not None or len({tensor.data_ptr() for tensor in inputs}) == len(inputs):
        _kept[key] = program  # else others of these sizes may be told apart
    return results


def _key(direction: str, asked: Any, how: tuple[Any, ...], inputs: list[Tensor]) -> tuple[Any, ...]:
    """What tells layers and batches apart whose launches differ; a program itself sees that all else is as it was."""
    x, fc1_weight, group_offsets, cu_seqlens = inputs[0], inputs[9], inputs[13], inputs[14]
    _, heads, pre_norm, eps, _ = how
    sizes = x.shape, fc1_weight.shape, cu_seqlens.shape
    aligned = group_offsets.data_ptr() % 16 == 0, cu_seqlens.data_ptr() % 16 == 0  # they are parts of the plan's
    return direction, asked, heads, pre_norm, eps, *sizes, x.dtype, group_offsets.dtype, *aligned, x.get_device()


def _launches(device: int) -> bool:
    """Whether it is the current GPU, and nobody wants to hear of every launch."""
    return device >= 0 and device == torch.cuda.current_device() and not hooked()


def _attends(direction: str, how: tuple[Any, ...], x: Tensor) -> bool:
    """Whether attention is computed by our own kernel, to which no length matters, and not by what launches others."""
    max_seqlen, heads, _, _, equal_lengths = how
    return _chosen(direction, x.device, x.dtype, *x.shape, max_seqlen, heads, equal_lengths)


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
    like = torch.empty((), device=device, dtype=dtype).expand(rows, 3, heads, d // heads)
    scale = (d // heads) ** -0.5
    return attention.choose(direction, like, max_seqlen, scale, equal_lengths) is varlen_attention
