"""Triton `encoder_layer`: the kernels of its parts, those of one layer launched again for the next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mowe_kernels.reference import encoder_layer as reference
from mowe_kernels.triton import _layers

_FC1 = 8  # its weight among the parameters, which tells encoders of one width apart


def forward(parts: reference.Parts, *given: Any) -> Sequence[Tensor]:
    """As the reference."""
    about = _about(*given)
    return _layers.again(*about) or _layers.computed(partial(reference.forward, parts, *given), *about)


def again(*given: Any) -> Sequence[Tensor]:
    """As `forward`, but nothing where its launches are not known. It needs no check: it takes nothing but the like of
    tensors that were checked.
    """
    return _layers.again(*_about(*given))


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
    inputs = [x, group_offsets, cu_seqlens, *parameters, grad, *saved]
    about = "backward", (needs, parameters[_FC1].shape), how, inputs
    return _layers.again(*about) or _layers.computed(compute, *about)


def _about(
    saves: bool, x: Tensor, parameters: Sequence[Tensor], group_offsets: Tensor, cu_seqlens: Tensor, *how: Any
) -> tuple[str, Any, tuple, list[Tensor]]:
    return "forward", (saves, parameters[_FC1].shape), how, [x, group_offsets, cu_seqlens, *parameters]
