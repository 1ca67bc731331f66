"""A transformer layer of every encoder whose weights are in 4 bits, over few rows: what the ops of its parts do, asked
for at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mowe_kernels.backend import implementation
from mowe_kernels.ops import grouped_layer_norm, grouped_linear_nf4, varlen_attention
from mowe_kernels.ops._op import check, check_dtype, check_offsets, check_shape, launched_again, needs_grad, traced
from mowe_kernels.ops.grouped_linear_nf4 import as_taken
from mowe_kernels.ops.nf4_dequantize_grouped import Nf4Matrix
from mowe_kernels.reference import encoder_layer_nf4 as reference


class Nf4LayerParameters(NamedTuple):
    """Of E layers of width D with F hidden values, each stacked along the first axis.

    The norms' weights and biases: [E, D]. The other biases: [E, N]. Weights: of E matrices [N, K] each, qkv [3 D, D],
    out [D, D], fc1 [F, D], fc2 [D, F].
    """

    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    qkv_bias: Tensor
    out_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    fc1_bias: Tensor
    fc2_bias: Tensor
    qkv: Nf4Matrix
    out: Nf4Matrix
    fc1: Nf4Matrix
    fc2: Nf4Matrix


_PARTS = grouped_layer_norm.OP, grouped_linear_nf4.OP, varlen_attention.OP
FORWARD = tuple(op.compute for op in _PARTS)  # see `encoder_layer`


def encoder_layer_nf4(
    x: Tensor,
    parameters: Nf4LayerParameters,
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    heads: int,
    pre_norm: bool = True,
    eps: float = 1e-5,
    equal_lengths: bool = False,
) -> Tensor:
    """`encoder_layer` with weights that leave 4 bits in the loops of the products, for where `multiplies_in_4_bits`
    says that this is quicker.

    x: [R, D] packed rows. parameters: of the E layers. The others: as for `encoder_layer`.
    Returns [R, D] in the type of x; rows past group_offsets[-1] are unspecified.
    Raises ValueError for shapes or types that do not fit, and where a gradient would be asked for: there is none.
    """
    tensors, matrices = taken = _taken(parameters)
    how = max_seqlen, heads, pre_norm, eps, equal_lengths
    if needs_grad(x, *tensors):
        raise ValueError("encoder_layer_nf4: has no gradient; dequantise the weights and use encoder_layer")
    is_traced = traced(x, *tensors)
    if not is_traced and (results := launched_again("encoder_layer_nf4", x, [taken], group_offsets, cu_seqlens, *how)):
        return results[0]
    _check(x, parameters, group_offsets, cu_seqlens, heads)
    about = x, tensors, matrices, group_offsets, cu_seqlens, *how
    if is_traced:
        return reference.forward(_PARTS, *about)[0]
    return implementation("encoder_layer_nf4", (x,)).forward(FORWARD, *about)[0]


def again(
    x: Tensor, layers: Sequence[Nf4LayerParameters], group_offsets: Tensor, cu_seqlens: Tensor, how: tuple
) -> Sequence[Tensor]:
    """As that of `encoder_layer`."""
    taken = [_taken(parameters) for parameters in layers]
    tensors = [x, *(tensor for parameters, _ in taken for tensor in parameters)]
    if traced(*tensors) or needs_grad(*tensors):
        return ()
    return launched_again("encoder_layer_nf4", x, taken, group_offsets, cu_seqlens, *how)


def _taken(parameters: Nf4LayerParameters) -> tuple[Sequence[Tensor], list[reference.Matrix]]:
    return parameters[:8], [as_taken(matrix) for matrix in parameters[8:]]


def _check(x: Tensor, parameters: Nf4LayerParameters, group_offsets: Tensor, cu_seqlens: Tensor, heads: int) -> None:
    op, p = "encoder_layer_nf4", parameters
    check_shape(op, "x", x, (None, None), "packed rows [R, D]")
    d = x.shape[1]
    check(heads > 0 and d % heads == 0, op, f"{heads} heads do not divide {d} columns")
    e, f = p.qkv.codes.shape[0], p.fc1.rows
    for name, rows, columns in (("qkv", 3 * d, d), ("out", d, d), ("fc1", f, d), ("fc2", d, f)):
        matrix: Nf4Matrix = getattr(p, name)
        matrix.check(op)
        got = len(matrix.codes), matrix.rows, matrix.columns
        check(got == (e, rows, columns), op, f"{name} must be {e} matrices [{rows}, {columns}], got {list(got)}")
        check(columns % 2 == 0, op, f"{name} must have an even number of columns, got {columns}")
    widths = d, d, 3 * d, d, d, d, f, d
    for name, tensor, width in zip(p._fields, p[:8], widths, strict=False):
        check_shape(op, name, tensor, (e, width), "stacked parameters")
        check_dtype(op, x, **{name: tensor})
    check_offsets(op, "group_offsets", group_offsets, e + 1, "[E+1]")
    check_offsets(op, "cu_seqlens", cu_seqlens, None, "[S+1]")
