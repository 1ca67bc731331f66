"""What is measured: a pool of encoders with random weights, clips of fixed lengths and a fixed routing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe.audio import SAMPLING_RATE
from mowe.families import Context


def whisper_tiny() -> nn.Module:
    """Whisper-tiny's encoder: 4 layers of width 384."""
    return WhisperEncoder(
        WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80)
    )


def hubert_base() -> nn.Module:
    """HuBERT-base: 7 convolutions and 12 layers of width 768."""
    return HubertModel(HubertConfig())


def geometric(shortest: float, longest: float, count: int) -> tuple[float, ...]:
    """Lengths in seconds, each longer than the one before by the same factor."""
    return tuple(shortest * (longest / shortest) ** (i / (count - 1)) for i in range(count))


@dataclass(frozen=True)
class Workload:
    """A batch of clips and the encoders each of them is routed to.

    encoder: makes one member of the pool. seconds: length of each clip. context: what the packed pool computes.
    """

    name: str
    encoder: Callable[[], nn.Module]
    num_encoders: int
    top_k: int
    seconds: tuple[float, ...]
    context: Context

    @cached_property
    def indices(self) -> list[list[int]]:
        """[B, k]: distinct encoders for each clip, drawn once."""
        draw = random.Random(0)
        return [draw.sample(range(self.num_encoders), self.top_k) for _ in self.seconds]

    def encoders(self) -> list[nn.Module]:
        """The members of the pool, float32, in evaluation mode."""
        torch.manual_seed(0)
        return [self.encoder().eval() for _ in range(self.num_encoders)]

    def waveforms(self) -> list[Tensor]:
        """1-D float32 noise at 16 kHz; no step of any provider looks at what the clips hold."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(round(s * SAMPLING_RATE), generator=generator) * 0.1 for s in self.seconds]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny4-spread", whisper_tiny, 4, 2, geometric(2, 20, 8), "valid"),
        Workload("tiny4-full", whisper_tiny, 4, 2, (30.0,) * 8, "window"),
        Workload("hubert-8s", hubert_base, 1, 1, (8.0,) * 4, "valid"),
    )
}
