"""Triton `encoder_layer_nf4`: the kernels of its parts, those of one layer launched again for the next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mowe_kernels.reference import encoder_layer_nf4 as reference
from mowe_kernels.triton import _layers
from mowe_kernels.triton._layers import Asked
from mowe_kernels.triton.grouped_linear_nf4 import code

Layer = tuple[Sequence[Tensor], Sequence[reference.Matrix]]
"""Parameters and matrices, as the reference takes them."""


def forward(
    parts: reference.Parts, x: Tensor, parameters: Sequence[Tensor], matrices: Sequence[reference.Matrix], *others: Any
) -> Sequence[Tensor]:
    """As the reference."""
    asked = _asked(x, [(parameters, matrices)], *others)
    compute = partial(reference.forward, parts, x, parameters, matrices, *others)
    return _layers.again(asked) or _layers.computed(compute, asked)


def again(*given: Any) -> Sequence[Tensor]:
    """As `forward` of one layer after the other, all of them in the place of one's parameters and matrices, but nothing
    where their launches are not known. It needs no check: it takes nothing but the like of tensors that were checked.
    """
    return _layers.again(_asked(*given))


def _asked(x: Tensor, layers: Sequence[Layer], group_offsets: Tensor, cu_seqlens: Tensor, *how: Any) -> Asked:
    of_layers, sizes = [], set()
    for parameters, matrices in layers:
        # Where there are no scales of the scales, their tensors are empty.
        tensors = [tensor for *those, _ in matrices for tensor in those if tensor.numel()]
        of_layers.append([*parameters, *tensors])
        sizes.add((len(tensors), *(size for *_, of_matrix in matrices for size in of_matrix)))
    # Layers that differ are not known together.
    return Asked("forward", ("nf4", *sizes), how, [x], [group_offsets, cu_seqlens, code(x.device)], of_layers)
