"""Whisper encoders of any size."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers import initialization as init
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe.audio import WINDOW_SAMPLES
from mowe.errors import AudioError, ConfigError
from mowe.families.base import ClipFeatures, Context, EncoderFamily
from mowe.families.convert import Entry, affine, conv, qkv
from mowe.families.stacked import StackedConv, StackedLayer, StackedNorm, through
from mowe.features import HOP
from mowe_kernels import FamilyPlan, FrameClock, grouped_conv1d

# Where transformers cuts off what a layer gives in float16, which would overflow.
_HALF_LIMIT = torch.finfo(torch.float16).max - 1000


class WhisperFamily(EncoderFamily):
    """Whisper encoders: log-mel frames at 100 Hz, two convolutions, learned or sinusoidal positions, pre-norm layers.

    Levels: log-mel frames, then frames at 50 Hz. Frame t is centred on sample 320 t.
    """

    encoder_class = WhisperEncoder
    fixed = ("embed_positions",)
    num_levels = 2

    def __init__(self, configs: list[WhisperConfig], do_normalize: bool = False):
        super().__init__(configs, do_normalize)
        config, encoders = configs[0], len(configs)
        self.hidden_size = width = config.d_model
        self.num_mel_bins = config.num_mel_bins
        self.max_frames = config.max_source_positions
        self.conv1 = StackedConv(encoders, config.num_mel_bins, width, taps=3)
        self.conv2 = StackedConv(encoders, width, width, taps=3)
        self.embed_positions = nn.Parameter(torch.zeros(encoders, config.max_source_positions, width))
        self.layers = nn.ModuleList(
            StackedLayer(
                encoders, width, config.encoder_attention_heads, config.encoder_ffn_dim, pre_norm=True, key_bias=False
            )
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = StackedNorm(encoders, width)
        self.hold_fixed()

    @classmethod
    def signature(cls, config: WhisperConfig, do_normalize: bool) -> tuple[Any, ...]:
        if config.activation_function != "gelu":
            raise ConfigError(
                f"Whisper encoder: activation_function must be 'gelu', got {config.activation_function!r}"
            )
        if do_normalize:
            raise ConfigError("Whisper encoder: do_normalize is not supported, its log-mel features are normalised")
        names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
        return tuple(getattr(config, n) for n in (*names, "num_mel_bins", "max_source_positions"))

    @classmethod
    def frame_clock(cls, config: WhisperConfig) -> FrameClock:
        return FrameClock(hop=2 * HOP, offset=0)

    @classmethod
    def stages(cls, config: WhisperConfig) -> list[tuple[int, int, int]]:
        return [(HOP, HOP, 0), (3, 2, 2)]

    @classmethod
    def sample_range(cls, config: WhisperConfig) -> tuple[int, int]:
        fewest, most = super().sample_range(config)
        return fewest, min(2 * config.max_source_positions * HOP, most)

    def check_context(self, context: Context) -> None:
        if context == "window" and 2 * self.max_frames * HOP != WINDOW_SAMPLES:
            raise ConfigError(
                f"context 'window' is 30 s, a Whisper encoder of {self.max_frames} frames is not; expected 'valid'"
            )

    def level_lengths(self, samples: int, context: Context) -> list[int]:
        frames, most = samples // HOP, 2 * self.max_frames
        if frames > most:
            raise AudioError(
                f"a Whisper encoder takes at most {most * HOP} samples, got {samples}; cut longer audio first"
            )
        if context == "window":
            frames = most
        return [frames, (frames + 1) // 2]

    def inputs(self, features: ClipFeatures) -> tuple[Tensor, Tensor]:
        return features.log_mel(self.num_mel_bins)

    def encode(self, x: Tensor, starts: Tensor, plan: FamilyPlan) -> Tensor:
        frames, rows = plan.levels
        lengths = frames.lengths
        h = grouped_conv1d(
            x,
            self.conv1.weight,
            self.conv1.bias,
            starts=starts,
            lengths=lengths,
            encoder=plan.encoder,
            cu_seqlens=frames.cu_seqlens,
            num_rows=frames.num_rows,
            padding=1,
            activation="gelu",
        )
        h = grouped_conv1d(
            h,
            self.conv2.weight,
            self.conv2.bias,
            starts=frames.starts,
            lengths=lengths,
            encoder=plan.encoder,
            cu_seqlens=rows.cu_seqlens,
            num_rows=rows.num_rows,
            stride=2,
            padding=1,
            activation="gelu",
            positions=self.embed_positions,
        )
        if h.dtype != torch.float16:
            return self.layer_norm(through(self.layers, h, rows), rows)
        for layer in self.layers:
            h = layer(h, rows).clamp(-_HALF_LIMIT, _HALF_LIMIT)
        return self.layer_norm(h, rows)

    def reset_parameters(self) -> None:
        """Whisper's fixed sinusoidal positions."""
        frames, width = self.embed_positions.shape[1:]
        rates = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
        angles = torch.arange(frames)[:, None] * rates
        # Not the tensor's own copy_: this one leaves alone what came from a checkpoint.
        init.copy_(self.embed_positions, torch.cat((angles.sin(), angles.cos()), dim=1))

    def entries(self) -> list[Entry]:
        entries = [Entry("embed_positions", ("embed_positions.weight",)), *affine("layer_norm", "layer_norm")]
        for name in ("conv1", "conv2"):
            entries += [conv(f"{name}.weight", f"{name}.weight"), Entry(f"{name}.bias", (f"{name}.bias",))]
        for i in range(len(self.layers)):
            layer = f"layers.{i}"
            entries += [
                *affine(f"{layer}.attention_norm", f"{layer}.self_attn_layer_norm"),
                *qkv(f"{layer}.qkv", f"{layer}.self_attn", key_bias=False),
                *affine(f"{layer}.out", f"{layer}.self_attn.out_proj"),
                *affine(f"{layer}.mlp_norm", f"{layer}.final_layer_norm"),
                *affine(f"{layer}.fc1", f"{layer}.fc1"),
                *affine(f"{layer}.fc2", f"{layer}.fc2"),
            ]
        return entries
