"""Linear layers with their epilogue, for the plain torch ops.

float32 rows on the CPU go to oneDNN, which torch.compile too puts in the place of nn.Linear: it is faster than BLAS,
and adds the activation or the residual while its tile of the result is in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._rows import add_product


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "",
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """row_scale * activation(x @ weight.T + bias) + residual."""
    if _goes_to_onednn(x):
        onednn = torch.ops.mkldnn._linear_pointwise
        bias = None if bias is None else bias.contiguous()  # its strides are not looked at
        if residual is not None and row_scale is None and not activation:
            return onednn.binary(x, residual, weight, bias, "add")
        y = onednn(x, weight, bias, activation or "none", [], "none")
    else:
        y = activate(torch.nn.functional.linear(x, weight, bias), activation)
    return scale_and_add(y, row_scale, residual)


def add_linear(y: Tensor, x: Tensor, weight: Tensor, scale: float = 1.0) -> None:
    """y += scale * x @ weight.T."""
    if _goes_to_onednn(x):
        y.copy_(linear(x if scale == 1.0 else x * scale, weight, None, residual=y))
    else:
        add_product(y, x, weight.T, scale)


def activate(x: Tensor, activation: str) -> Tensor:
    """activation(x)."""
    return torch.nn.functional.gelu(x) if activation == "gelu" else x


def scale_and_add(y: Tensor, row_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """row_scale * y + residual."""
    if row_scale is not None:
        y = (y * row_scale[:, None]).to(y.dtype)
    return y if residual is None else y + residual


def _goes_to_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
