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


def forward(parts: reference.Parts, *given: Any) -> Sequence[Tensor]:
    """As the reference."""
    asked = _asked(*given)
    return _layers.again(asked) or _layers.computed(partial(reference.forward, parts, *given), asked)


def again(*given: Any) -> Sequence[Tensor]:
    """As `forward`, but nothing where its launches are not known. It needs no check: it takes nothing but the like of
    tensors that were checked.
    """
    return _layers.again(_asked(*given))


def _asked(
    x: Tensor,
    parameters: Sequence[Tensor],
    matrices: Sequence[reference.Matrix],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    *how: Any,
) -> Asked:
    others, sizes = [group_offsets, cu_seqlens, code(x.device), *parameters], []
    for *tensors, of_matrix in matrices:
        others += [tensor for tensor in tensors if tensor.numel()]  # else there are no scales of the scales
        sizes += of_matrix
    return Asked("forward", ("nf4", len(others), *sizes), how, [x], others)
