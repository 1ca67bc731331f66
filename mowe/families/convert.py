"""Between one transformers encoder's parameters and its place in a family's stacked ones, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from mowe.errors import CheckpointError


def _single(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _as_list(tensor: Tensor) -> list[Tensor]:
    return [tensor]


@dataclass(frozen=True)
class Entry:
    """One stacked parameter and the parameters of a transformers encoder it is made of.

    ours: name in the family. theirs: names in the encoder's state dict. pack: their tensors -> ours without the
    encoder axis. unpack: the reverse.
    """

    ours: str
    theirs: tuple[str, ...]
    pack: Callable[[list[Tensor]], Tensor] = _single
    unpack: Callable[[Tensor], list[Tensor]] = _as_list


def conv(ours: str, theirs: str) -> Entry:
    """A convolution weight, [N, C, taps] there and [N, taps, C] here."""
    return Entry(ours, (theirs,), lambda t: t[0].mT, lambda t: [t.mT.contiguous()])


def weight_normed_conv(ours: str, theirs: str) -> Entry:
    """A convolution under weight norm over its taps: magnitude and direction there, their product here."""
    names = (f"{theirs}.parametrizations.weight.original0", f"{theirs}.parametrizations.weight.original1")

    def unpack(weight: Tensor) -> list[Tensor]:
        direction = weight.mT.contiguous()
        norm = torch.norm_except_dim(direction, 2, 2)
        return [norm, direction.where(norm > 0, 1.0)]  # a tap of zeros has no direction: any will do

    return Entry(ours, names, lambda t: torch._weight_norm(t[1], t[0], 2).mT, unpack)


def affine(ours: str, theirs: str) -> list[Entry]:
    """Weight and bias under the same names on both sides."""
    return [Entry(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in ("weight", "bias")]


def qkv(ours: str, theirs: str, *, key_bias: bool) -> list[Entry]:
    """Query, key and value projections there, one projection here. Without key_bias, the keys' part is zero."""
    weights = tuple(f"{theirs}.{p}_proj.weight" for p in "qkv")
    biases = tuple(f"{theirs}.{p}_proj.bias" for p in ("qkv" if key_bias else "qv"))

    def pack_bias(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts if key_bias else [parts[0], torch.zeros_like(parts[0]), parts[1]])

    def unpack_bias(bias: Tensor) -> list[Tensor]:
        parts = bias.chunk(3)
        return list(parts if key_bias else parts[::2])

    return [
        Entry(f"{ours}.weight", weights, torch.cat, lambda t: list(t.chunk(3))),
        Entry(f"{ours}.bias", biases, pack_bias, unpack_bias),
    ]


@torch.no_grad()
def load_encoder(family: nn.Module, index: int, state_dict: dict[str, Tensor], entries: Sequence[Entry]) -> None:
    """Copy a state dict into place `index` of a family. Raises CheckpointError for keys or shapes that differ."""
    expected = {name for entry in entries for name in entry.theirs}
    missing, surplus = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
    if missing or surplus:
        raise CheckpointError(f"missing keys {missing or 'none'}, surplus keys {surplus or 'none'}")
    stacked = dict(family.named_parameters())
    for entry in entries:
        value, target = entry.pack([state_dict[name] for name in entry.theirs]), stacked[entry.ours][index]
        if value.shape != target.shape:
            raise CheckpointError(
                f"{' + '.join(entry.theirs)} gives sizes {list(value.shape)}, "
                f"expected {list(target.shape)} for {entry.ours}"
            )
        target.copy_(value)


@torch.no_grad()
def encoder_state_dict(family: nn.Module, index: int, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """The state dict of encoder `index` under its transformers names."""
    return {
        name: part.clone()
        for entry in entries
        for name, part in zip(entry.theirs, entry.unpack(attrgetter(entry.ours)(family)[index]), strict=True)
    }
