"""`mowe::grouped_linear_nf4`: linear layers whose weights are in 4 bits, and when they are multiplied as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mowe_kernels.backend import implementation
from mowe_kernels.ops._op import Op, check, check_dtype, check_offsets, check_shape, needs_grad
from mowe_kernels.ops.grouped_linear import ACTIVATIONS, grouped_linear
from mowe_kernels.ops.nf4_dequantize_grouped import Nf4Matrix, nf4_dequantize_grouped


def _fake(x, codes, absmax, nested_absmax, nested_offset, nested_code, sizes, *rest):
    return x.new_empty(x.shape[0], sizes[0])


OP = Op(
    "grouped_linear_nf4",
    "(Tensor x, Tensor codes, Tensor absmax, Tensor nested_absmax, Tensor nested_offset, Tensor nested_code,"
    " int[] sizes, Tensor? bias, Tensor group_offsets, Tensor? residual, str activation) -> Tensor",
    _fake,
    module="grouped_linear_nf4",
    function="forward",
)


def grouped_linear_nf4(
    x: Tensor,
    matrix: Nf4Matrix,
    bias: Tensor | None,
    group_offsets: Tensor,
    *,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """act(x @ weight[e].T + bias[e]) + residual, e being the encoder whose group a row lies in, weights as in `matrix`.

    x: [R, K] packed rows. matrix: E matrices [N, K]. bias: [E, N]. group_offsets: int32 [E+1] from 0 on, first row of
    each. activation: "" or "gelu". residual: [R, N].
    Returns [R, N] in the type of x, to which the weights are rounded, accumulated in float32.
    Raises ValueError for shapes or types that do not fit or an unknown activation.
    """
    if not multiplies_in_4_bits(x, matrix, bias, residual):
        (weight,) = nf4_dequantize_grouped([matrix], group_offsets, x.dtype)
        return grouped_linear(x, weight, bias, group_offsets, activation=activation, residual=residual)
    op = "grouped_linear_nf4"
    matrix.check(op)
    encoders = matrix.codes.shape[0]
    check_shape(op, "x", x, (None, matrix.columns), "packed rows [R, K]")
    check_offsets(op, "group_offsets", group_offsets, encoders + 1, "[E+1]")
    for name, tensor, shape in (("bias", bias, (encoders, matrix.rows)), ("residual", residual, (len(x), matrix.rows))):
        if tensor is not None:
            check_shape(op, name, tensor, shape, "a value for every column of the result")
    check(activation in ACTIVATIONS, op, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    check_dtype(op, x, bias=bias, residual=residual)
    return OP(x, *as_taken(matrix), bias, group_offsets, residual, activation)


def as_taken(matrix: Nf4Matrix) -> Any:
    """Its tensors, empty where there are none, and its sizes, as the op takes them."""
    tensors = matrix[:5]
    if any(tensor is None for tensor in tensors):
        absent = matrix.codes.new_empty(0)
        tensors = tuple(absent if tensor is None else tensor for tensor in tensors)
    return *tensors, [*matrix[5:]]


def multiplies_in_4_bits(x: Tensor, matrix: Nf4Matrix, *others: Tensor | None) -> bool:
    """Whether a product with this matrix takes its weights out of 4 bits block by block, in the loop of the kernel.

    It does for few rows, where a kernel computes that has such a loop, and nobody asks for a gradient. How many are few
    is measured by `python -m mowe_kernels.tune`. others: what is added to the product.
    """
    if matrix.columns % 2 or needs_grad(x, *others):
        return False
    kernel = implementation("grouped_linear_nf4", [x])
    in_loop = kernel.__name__.startswith("mowe_kernels.triton.")
    return in_loop and x.shape[0] <= kernel.few_rows(x) * matrix.codes.shape[0]
