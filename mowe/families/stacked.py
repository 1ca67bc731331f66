"""Layers of several encoders at once: parameters stacked [E, ...], rows packed by encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_layers import GradientCheckpointingLayer

from mowe.errors import ConfigError
from mowe.families.nf4 import layer_weights, own, parameters_in_4_bits
from mowe_kernels import (
    LayerParameters,
    Level,
    Nf4LayerParameters,
    encoder_layer,
    encoder_layer_nf4,
    encoder_layers,
    grouped_layer_norm,
    grouped_linear,
)

_PARTS = "attention_norm", "qkv", "out", "mlp_norm", "fc1", "fc2"  # of a layer, in the order of LayerParameters
_OWN = "weight", "bias"


class StackedLinear(nn.Module):
    """E linear layers. weight: [E, N, K], bias: [E, N]."""

    def __init__(self, encoders: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(encoders, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(encoders, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, rows: Level) -> Tensor:
        """[R, K] -> [R, N], every row through its encoder's layer."""
        return grouped_linear(x, self.weight, self.bias, rows.group_offsets)


class StackedConv(nn.Module):
    """E convolutions. weight: [E, N, taps, C / groups] (nn.Conv1d's with its last two axes swapped), bias: [E, N]."""

    def __init__(
        self, encoders: int, channels: int, out_channels: int, taps: int, *, groups: int = 1, bias: bool = True
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(encoders, out_channels, taps, channels // groups))
        self.bias = nn.Parameter(torch.empty(encoders, out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in = self.weight.shape[2] * self.weight.shape[3]
        nn.init.normal_(self.weight, std=fan_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StackedNorm(nn.Module):
    """E affine maps after a normalisation. weight, bias: [E, D]."""

    def __init__(self, encoders: int, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(encoders, width))
        self.bias = nn.Parameter(torch.empty(encoders, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, rows: Level, *, activation: str = "") -> Tensor:
        """LayerNorm over the last dimension of [R, D]."""
        return grouped_layer_norm(x, self.weight, self.bias, rows.group_offsets, eps=self.eps, activation=activation)


class StackedLayer(GradientCheckpointingLayer):
    """E bidirectional transformer layers.

    pre_norm: normalise before each half (Whisper, stable layer norm) or after it (HuBERT-base). key_bias: False where
    the keys have no bias (Whisper); that part of `qkv.bias` stays zero and receives no gradient.

    The parts are read, not called: hooks on them do not run.
    """

    def __init__(
        self, encoders: int, width: int, heads: int, hidden: int, *, pre_norm: bool, key_bias: bool, eps: float = 1e-5
    ):
        super().__init__()
        if width % heads:
            raise ConfigError(f"an encoder of width {width} cannot have {heads} attention heads")
        self.heads, self.pre_norm, self.key_bias, self.eps = heads, pre_norm, key_bias, eps
        self.attention_norm = StackedNorm(encoders, width, eps)
        self.qkv = StackedLinear(encoders, width, 3 * width)
        self.out = StackedLinear(encoders, width, width)
        self.mlp_norm = StackedNorm(encoders, width, eps)
        self.fc1 = StackedLinear(encoders, width, hidden)
        self.fc2 = StackedLinear(encoders, hidden, width)

    def forward(self, x: Tensor, rows: Level) -> Tensor:
        """[R, D] -> [R, D], each sequence attending to itself alone."""
        offsets, how = self.asked(rows)
        parts = [self._modules[name] for name in _PARTS]
        parameters = _at_hand(parts, x)
        if isinstance(parameters, Nf4LayerParameters):
            del how["key_bias"]
            return encoder_layer_nf4(x, parameters, *offsets, **how)
        return encoder_layer(x, parameters or _gathered(parts, rows), *offsets, **how)

    def asked(self, rows: Level) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
        """What `encoder_layer` is given beside the rows and the parameters."""
        how = {"heads": self.heads, "pre_norm": self.pre_norm, "eps": self.eps, "key_bias": self.key_bias}
        return (rows.group_offsets, rows.cu_seqlens, rows.max_seqlen), how | {"equal_lengths": rows.equal_lengths}


def through(layers: Sequence[StackedLayer], x: Tensor, rows: Level) -> Tensor:
    """[R, D] -> [R, D], one layer after the other; asked for together where nobody looks in between."""
    parameters = [] if torch.is_grad_enabled() or torch.compiler.is_compiling() else _of_all(layers, x)
    if parameters:
        offsets, how = layers[0].asked(rows)
        return encoder_layers(x, parameters, *offsets, **how)
    for layer in layers:
        x = layer(x, rows)
    return x


def _of_all(layers: Sequence[StackedLayer], x: Tensor) -> list[Any]:
    """The parameters of layers that differ in nothing else; none where one must be called or has none at hand."""
    found, kinds = [], set()
    for layer in layers:
        parameters = None if _watched(layer) else _at_hand([layer._modules[name] for name in _PARTS], x)
        if parameters is None:
            return []
        found.append(parameters)
        kinds.add((layer.heads, layer.pre_norm, layer.eps, layer.key_bias))
    return found if len(kinds) == 1 else []


def _watched(layer: nn.Module) -> bool:
    """Whether somebody wants to know of the layer's calls, or has put something else in its place."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    replaced = type(layer) is not StackedLayer or "forward" in layer.__dict__ or layer._compiled_call_impl is not None
    return replaced or any(hooks) or bool(_has_any_global_hook())


def _at_hand(parts: Sequence[Any], x: Tensor) -> LayerParameters | Nf4LayerParameters | None:
    """A layer's parameters as rows like x want them; None where some have to be looked for or dequantised."""
    try:  # nn.Module's own lookup takes as long as a launch
        return LayerParameters(*[held[name] for held in [part._parameters for part in parts] for name in _OWN])
    except KeyError:  # a weight in 4 bits; wrappers, replicas and parametrizations
        return parameters_in_4_bits(parts, x)


def _gathered(parts: Sequence[Any], rows: Level) -> LayerParameters:
    attention_norm, qkv, out, mlp_norm, fc1, fc2 = parts
    weights = layer_weights((qkv, out, fc1, fc2), rows)
    return LayerParameters(
        own(attention_norm, "weight"), own(attention_norm, "bias"), weights[0], own(qkv, "bias"),
        weights[1], own(out, "bias"), own(mlp_norm, "weight"), own(mlp_norm, "bias"),
        weights[2], own(fc1, "bias"), weights[3], own(fc2, "bias"),
    )  # fmt: skip
