"""Plain torch `grouped_linear_nf4`: the weights out of 4 bits, then `grouped_linear`."""

from __future__ import annotations

from torch import Tensor

from mowe_kernels.reference import grouped_linear, nf4_dequantize_grouped


def forward(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    nested_code: Tensor,
    sizes: list[int],
    bias: Tensor | None,
    group_offsets: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    stacks = ([tensor] for tensor in (codes, absmax, nested_absmax, nested_offset, nested_code))
    (weight,) = nf4_dequantize_grouped.forward(*stacks, sizes, group_offsets, x.dtype)
    return grouped_linear.forward(x, weight, bias, group_offsets, residual, None, activation, False)[0]
