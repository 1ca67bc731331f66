"""Triton `encoder_layer`: the kernels of its parts, those of one layer launched again for the next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mowe_kernels.reference import encoder_layer as reference
from mowe_kernels.triton import _layers
from mowe_kernels.triton._layers import Asked

_FC1 = 8  # its weight among the parameters, which tells encoders of one width apart


def forward(parts: reference.Parts, *given: Any) -> Sequence[Tensor]:
    """As the reference."""
    saves, x, parameters, *others = given
    asked = _asked(x, saves, (parameters,), *others)
    return _layers.again(asked) or _layers.computed(partial(reference.forward, parts, *given), asked)


def again(*given: Any) -> Sequence[Tensor]:
    """As `forward` of one layer after the other, all their parameters in the place of one's, but nothing where their
    launches are not known. It needs no check: it takes nothing but the like of tensors that were checked.
    """
    return _layers.again(_asked(*given))


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
    what = needs, parameters[_FC1].shape
    asked = Asked("backward", what, how, [x, grad, *saved], [group_offsets, cu_seqlens], [parameters])
    return _layers.again(asked) or _layers.computed(compute, asked)


def _asked(
    x: Tensor, saves: bool, layers: Sequence[Sequence[Tensor]], group_offsets: Tensor, cu_seqlens: Tensor, *how: Any
) -> Asked:
    return Asked("forward", (saves, layers[0][_FC1].shape), how, [x], [group_offsets, cu_seqlens], layers)
