"""Transformer layers of every encoder, one after the other, asked for at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mowe_kernels.ops import encoder_layer as plain
from mowe_kernels.ops import encoder_layer_nf4 as nf4


def encoder_layers(
    x: Tensor,
    layers: Sequence[plain.LayerParameters] | Sequence[nf4.Nf4LayerParameters],
    group_offsets: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    heads: int,
    pre_norm: bool = True,
    eps: float = 1e-5,
    key_bias: bool = True,
    equal_lengths: bool = False,
) -> Tensor:
    """`encoder_layer` or `encoder_layer_nf4` of one layer after the other.

    x: [R, D] packed rows. layers: the parameters of each. The others: as for `encoder_layer`, the same for all; what is
    in 4 bits has no gradient that `key_bias` could say anything of.
    Returns [R, D] in the type of x, x itself without layers; rows past group_offsets[-1] are unspecified.
    Raises ValueError as those two do.

    Where a GPU has launched such a layer before, over few rows, and nobody wants a gradient, one call of the compiled
    library launches all.
    """
    how = max_seqlen, heads, pre_norm, eps, equal_lengths
    kinds = {type(layer) for layer in layers}
    together = plain.again if kinds == {plain.LayerParameters} else nf4.again if len(kinds) == 1 else None
    if together and (results := together(x, layers, group_offsets, cu_seqlens, how)):
        return results[0]
    offsets = group_offsets, cu_seqlens, max_seqlen
    shared = {"heads": heads, "pre_norm": pre_norm, "eps": eps, "equal_lengths": equal_lengths}
    for parameters in layers:
        if isinstance(parameters, plain.LayerParameters):
            x = plain.encoder_layer(x, parameters, *offsets, **shared, key_bias=key_bias)
        else:
            x = nf4.encoder_layer_nf4(x, parameters, *offsets, **shared)
    return x
