"""Stacked linear layers whose weights are in 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mowe_kernels import (
    Level,
    Nf4LayerParameters,
    Nf4Matrix,
    Nf4Stacks,
    Nf4Weight,
    grouped_linear_nf4,
    multiplies_in_4_bits,
    nf4_dequantize_grouped,
    nf4_quantize,
)

_SCALES = ("absmax", "nested_absmax", "nested_offset", "nested_code")


class Nf4StackedLinear(nn.Module):
    """E linear layers, weights as in `Nf4Weight`, frozen; bias: [E, N], in the type that is computed in."""

    kept_stacks: tuple[list[Tensor | None], list[torch.Size | None], Nf4Stacks] | None = None  # see `_stacks`

    def __init__(self, weight: Nf4Weight, bias: nn.Parameter):
        super().__init__()
        self.shape, self.blocksize = weight.shape, weight.blocksize
        self.register_buffer("codes", weight.codes)
        for name in _SCALES:
            self.register_buffer(name, getattr(weight, name))
        self.bias = bias

    @property
    def quantized(self) -> Nf4Weight:
        scales = {name: getattr(self, name) for name in _SCALES}
        return Nf4Weight(self.codes, shape=self.shape, dtype=self.bias.dtype, blocksize=self.blocksize, **scales)

    @property
    def matrix(self) -> Nf4Matrix:
        """The same as the ops take it, which check it themselves."""
        held: Any = self._buffers  # nn.Module's own lookup takes as long as a launch
        return Nf4Matrix(held["codes"], *map(held.get, _SCALES), *self.shape, self.blocksize)

    @property
    def weight(self) -> Tensor:
        """[E, N, K], dequantised anew at every use."""
        return self.quantized.dequantize()

    def forward(self, x: Tensor, rows: Level) -> Tensor:
        """[R, K] -> [R, N], every row through its encoder's layer."""
        return grouped_linear_nf4(x, self.matrix, self.bias, rows.group_offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept_stacks": None}  # else the first linear of a layer would carry the others

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves between devices; the scales stay in float32 whatever type the model is cast to."""
        self.kept_stacks = None  # else the old ones would stay in memory
        before = {name: getattr(self, name) for name in _SCALES}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            moved = getattr(self, name)
            if scale is not None and moved.dtype != scale.dtype:
                setattr(self, name, scale.to(moved.device))
        return self


def own(module: nn.Module, name: str) -> Any:
    """A parameter of a module. nn.Module's own lookup, which takes as long as a launch, is left to wrappers, replicas
    and parametrizations, which have none under that name.
    """
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def quantize_linear(model: nn.Module, name: str, linear: Any, double_quant: bool) -> None:
    """Put one stacked linear layer of a model in 4 bits; on the meta device, only its shapes."""
    model.set_submodule(name, Nf4StackedLinear(_quantize(linear.weight, double_quant), linear.bias))


def parameters_in_4_bits(parts: Sequence[Any], x: Tensor) -> Nf4LayerParameters | None:
    """Those of a layer whose weights are best taken out of 4 bits inside of the products, by rows as few as these; None
    for others. parts: the attention's norm, qkv, out, the other norm, fc1, fc2.
    """
    attention_norm, qkv, out, mlp_norm, fc1, fc2 = parts
    linears = qkv, out, fc1, fc2
    if set(map(type, linears)) != {Nf4StackedLinear}:
        return None
    matrices = [linear.matrix for linear in linears]
    tensors = (
        own(attention_norm, "weight"), own(attention_norm, "bias"), own(qkv, "bias"), own(out, "bias"),
        own(mlp_norm, "weight"), own(mlp_norm, "bias"), own(fc1, "bias"), own(fc2, "bias"),
    )  # fmt: skip
    if not all(multiplies_in_4_bits(x, matrix, *tensors) for matrix in matrices):
        return None
    return Nf4LayerParameters(*tensors, *matrices)


def layer_weights(linears: Sequence[Any], rows: Level) -> list[Tensor]:
    """Weights [E, N, K] of the layers; those in 4 bits are dequantised together, for the encoders that have rows."""
    packed = [linear for linear in linears if isinstance(linear, Nf4StackedLinear)]
    if not packed:
        return [own(linear, "weight") for linear in linears]
    full = iter(nf4_dequantize_grouped(_stacks(packed), rows.group_offsets, own(packed[0], "bias").dtype))
    return [next(full) if isinstance(linear, Nf4StackedLinear) else linear.weight for linear in linears]


def _stacks(linears: Sequence[Nf4StackedLinear]) -> Nf4Stacks:
    """Their matrices, checked anew only where a buffer is another tensor, or of other sizes, than the last time. Until
    then the first of the linears keeps them.
    """
    if torch.compiler.is_compiling():
        return Nf4Stacks.of([linear.matrix for linear in linears])
    buffers = [buffer for linear in linears for buffer in linear._buffers.values()]
    sizes = [None if buffer is None else buffer.shape for buffer in buffers]
    kept = linears[0].kept_stacks
    if kept is None or kept[1] != sizes or not all(map(is_, kept[0], buffers)):
        stacks = Nf4Stacks.of([linear.matrix for linear in linears])
        kept = linears[0].kept_stacks = buffers, sizes, stacks
    return kept[2]


def _quantize(weight: Tensor, double_quant: bool) -> Nf4Weight:
    if weight.device.type != "meta":
        return nf4_quantize(weight, double_quant=double_quant)
    encoders, *shape = weight.shape
    count = shape[0] * shape[1]
    blocks = -(-count // 64)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(encoders, *sizes, dtype=dtype, device="meta")

    nested = {}
    if double_quant:
        nested = {"nested_absmax": empty(-(-blocks // 256)), "nested_offset": empty(), "nested_code": empty(256)}
    absmax = empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    codes = empty((count + 1) // 2, dtype=torch.uint8)
    return Nf4Weight(codes, absmax, tuple(shape), weight.dtype, **nested)
