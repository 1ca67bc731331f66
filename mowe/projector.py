"""From base and weak features to the language model's embeddings, at fewer frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mowe.configuration_mowe import MoweConfig
from mowe.families.stacked import StackedConv
from mowe.pool import PoolOutput
from mowe_kernels import FrameClock, grouped_conv1d, mixture_project
from mowe_kernels.plan import device_lengths


@dataclass(frozen=True)
class BaseFeatures:
    """Packed features of the base encoder.

    rows: [R, D]. starts: int32 [B], first frame of each clip. lengths: frames of each clip that belong to its audio,
    host integers. clock: when those frames happen.
    """

    rows: Tensor
    starts: Tensor
    lengths: tuple[int, ...]
    clock: FrameClock


def projected_lengths(lengths: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Tokens of clips with so many base frames: ceil(T / stride) at every stage, so that no frame is dropped."""
    for stride in strides:
        lengths = [-(-length // stride) for length in lengths]
    return list(lengths)


class MoweProjector(nn.Module):
    """Convolutions over time that start on [base ; weak slots], then a linear map to the language model's width.

    "conv": log2(stride) convolutions of 3 taps and stride 2, GELU after each (our reading of the run name's
    `seqcnn8`). "stack": `projector_stride` frames side by side through one linear layer and GELU.
    The first layer reads the base rows and the packed weak rows where they lie: each slot has columns of its own for
    each family, scaled by the slot's weight.
    """

    def __init__(self, config: MoweConfig, base_width: int, widths: Sequence[int], out_features: int):
        super().__init__()
        hidden = cast(int, config.projector_hidden_size)
        slots = config.num_independent_slots + config.num_dependent_slots
        if config.projector_type == "conv":
            self.strides = [2] * (config.projector_stride.bit_length() - 1)
            self.taps, self.padding = 3, 1
        else:
            self.strides = [config.projector_stride]
            self.taps, self.padding = config.projector_stride, 0
        self.base_weight = nn.Parameter(torch.empty(hidden, self.taps, base_width))
        self.slot_weights = nn.ParameterList(
            nn.Parameter(torch.empty(slots, hidden, self.taps, width)) for width in widths
        )
        self.bias = nn.Parameter(torch.empty(hidden))
        convs = nn.ModuleList(StackedConv(1, hidden, hidden, self.taps) for _ in self.strides[1:])
        self.convs = cast(Sequence[StackedConv], convs)
        self.linear = nn.Linear(hidden, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.base_weight, *self.slot_weights):
            nn.init.normal_(weight, std=(weight.shape[-1] * self.taps) ** -0.5)
        nn.init.zeros_(self.bias)

    def levels(self, lengths: Sequence[int]) -> list[list[int]]:
        """Frames of each clip before the first stage and after each, the last being its tokens."""
        levels = [list(lengths)]
        for stride in self.strides:
            levels.append(projected_lengths(levels[-1], [stride]))
        return levels

    def forward(
        self, base: BaseFeatures, weak: PoolOutput, weights: Tensor, clocks: Sequence[FrameClock]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Packed tokens [R, out_features], their int32 offsets [B+1] and the host lengths.

        base: of B clips, in any dtype. weak: features of k slots for the same clips. weights: float32 [B, k]. clocks:
        when the frames of each family happen.
        """
        device, dtype = base.rows.device, self.base_weight.dtype
        lengths = self.levels(base.lengths)
        on_device = device_lengths(lengths, device)
        offsets = torch.nn.functional.pad(on_device.cumsum(1, dtype=torch.int32), (1, 0))
        h = mixture_project(
            base.rows.to(dtype),
            [rows.to(dtype) for rows in weak.rows],
            weights,
            base_starts=base.starts,
            base_lengths=on_device[0],
            row_offsets=[weak.plan.row_offsets(f) for f in range(len(weak.rows))],
            position=weak.plan.position,
            base_weight=self.base_weight,
            row_weights=list(self.slot_weights),
            bias=self.bias,
            base_clock=base.clock,
            row_clocks=clocks,
            cu_seqlens=offsets[1],
            num_rows=sum(lengths[1]),
            stride=self.strides[0],
            padding=self.padding,
            activation="gelu",
        )
        encoder = torch.zeros(len(base.lengths), dtype=torch.int32, device=device)
        for i, conv in enumerate(self.convs, start=1):
            h = grouped_conv1d(
                h,
                conv.weight,
                conv.bias,
                starts=offsets[i, :-1],
                lengths=on_device[i],
                encoder=encoder,
                cu_seqlens=offsets[i + 1],
                num_rows=sum(lengths[i + 1]),
                stride=self.strides[i],
                padding=self.padding,
                activation="gelu",
            )
        return self.linear(h), offsets[-1], tuple(lengths[-1])
