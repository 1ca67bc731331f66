"""HuBERT and wav2vec 2.0 encoders: both stems (group norm, layer norm), both layer kinds (post-norm, stable)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel, Wav2Vec2Model

from mowe.errors import AudioError, ConfigError
from mowe.families.base import ClipFeatures, Context, EncoderFamily
from mowe.families.convert import Entry, affine, conv, qkv, weight_normed_conv
from mowe.families.stacked import StackedConv, StackedLayer, StackedLinear, StackedNorm, through
from mowe_kernels import FamilyPlan, FrameClock, Level, grouped_conv1d, sequence_norm

_SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim", "conv_kernel",
    "conv_stride", "conv_bias", "feat_extract_norm", "do_stable_layer_norm", "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups", "layer_norm_eps",
)  # fmt: skip
_GELU_ONLY = ("hidden_act", "feat_extract_activation")
_ABSENT = ("conv_pos_batch_norm", "adapter_attn_dim", "add_adapter")


class HubertFamily(EncoderFamily):
    """Wave encoders: a stack of strided convolutions, a projection, a convolution as position embedding, layers.

    do_normalize: whether the encoders take waves of zero mean and unit variance.
    Levels: samples, then the frames after each convolution. A frame is centred on the middle of its receptive field.
    """

    encoder_class = HubertModel
    fixed = ("masked_spec_embed",)

    def __init__(self, configs: list[HubertConfig], do_normalize: bool = False):
        super().__init__(configs, do_normalize)
        config, encoders = configs[0], len(configs)
        self.hidden_size = width = config.hidden_size
        self.kernels, self.strides = tuple(config.conv_kernel), tuple(config.conv_stride)
        self.num_levels = len(self.kernels) + 1

        channels = (1, *config.conv_dim)
        self.convs = nn.ModuleList(
            StackedConv(encoders, c_in, c_out, taps, bias=config.conv_bias)
            for c_in, c_out, taps in zip(channels, channels[1:], self.kernels, strict=False)
        )
        self.group_norm = config.feat_extract_norm == "group"
        self.conv_norms = nn.ModuleList(
            StackedNorm(encoders, c) for c in (channels[1:2] if self.group_norm else channels[1:])
        )
        has_norm = getattr(config, "feat_proj_layer_norm", True)
        self.projection_norm = StackedNorm(encoders, channels[-1], config.layer_norm_eps) if has_norm else None
        self.projection = StackedLinear(encoders, channels[-1], width)
        self.position_groups = config.num_conv_pos_embedding_groups
        self.position_conv = StackedConv(
            encoders, width, width, config.num_conv_pos_embeddings, groups=self.position_groups
        )
        self.stable = config.do_stable_layer_norm
        self.norm = StackedNorm(encoders, width, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            StackedLayer(
                encoders,
                width,
                config.num_attention_heads,
                config.intermediate_size,
                pre_norm=self.stable,
                key_bias=True,
                eps=config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        )
        # Masks frames in self-supervised training; kept so that the encoder can be given back whole.
        masks = config.mask_time_prob > 0 or config.mask_feature_prob > 0
        self.masked_spec_embed = nn.Parameter(torch.zeros(encoders, width)) if masks else None
        self.hold_fixed()

    @classmethod
    def signature(cls, config: HubertConfig, do_normalize: bool) -> tuple[Any, ...]:
        kind = f"{config.model_type} encoder"
        for name in _GELU_ONLY:
            if getattr(config, name) != "gelu":
                raise ConfigError(f"{kind}: {name} must be 'gelu', got {getattr(config, name)!r}")
        for name in _ABSENT:
            if getattr(config, name, None):
                raise ConfigError(f"{kind}: {name} is not supported, got {getattr(config, name)!r}")
        masks = config.mask_time_prob > 0 or config.mask_feature_prob > 0
        values = (getattr(config, name) for name in _SHARED)
        shared = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        return *shared, getattr(config, "feat_proj_layer_norm", True), masks, do_normalize

    @classmethod
    def frame_clock(cls, config: HubertConfig) -> FrameClock:
        hop, field = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        return FrameClock(hop, field // 2)

    @classmethod
    def stages(cls, config: HubertConfig) -> list[tuple[int, int, int]]:
        return [(kernel, stride, 0) for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)]

    def level_lengths(self, samples: int, context: Context) -> list[int]:
        lengths = [samples]
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            lengths.append((lengths[-1] - kernel) // stride + 1)
        if lengths[-1] < 1:
            raise AudioError(f"a clip of {samples} samples is shorter than the receptive field of its wave encoder")
        return lengths

    def inputs(self, features: ClipFeatures) -> tuple[Tensor, Tensor]:
        return features.wave(self.do_normalize)

    def encode(self, x: Tensor, starts: Tensor, plan: FamilyPlan) -> Tensor:
        rows = plan.rows
        h = self._stem(x, starts, plan)
        if self.projection_norm is not None:
            h = self.projection_norm(h, rows)
        h = self.projection(h, rows)
        h = grouped_conv1d(
            h,
            self.position_conv.weight,
            self.position_conv.bias,
            starts=rows.starts,
            lengths=rows.lengths,
            encoder=plan.encoder,
            cu_seqlens=rows.cu_seqlens,
            num_rows=rows.num_rows,
            padding=self.position_conv.weight.shape[2] // 2,
            groups=self.position_groups,
            activation="gelu",
            residual=h,
        )
        if not self.stable:
            h = self.norm(h, rows)
        h = through(self.layers, h, rows)
        return self.norm(h, rows) if self.stable else h

    def _stem(self, h: Tensor, starts: Tensor, plan: FamilyPlan) -> Tensor:
        """Samples [S, 1] -> packed frames [R, C] after the last convolution."""
        for i, (conv1d, source, target) in enumerate(zip(self.convs, plan.levels, plan.levels[1:], strict=False)):
            norm = self.conv_norms[i] if i < len(self.conv_norms) else None
            h = grouped_conv1d(
                h,
                conv1d.weight,
                conv1d.bias,
                starts=starts,
                lengths=source.lengths,
                encoder=plan.encoder,
                cu_seqlens=target.cu_seqlens,
                num_rows=target.num_rows,
                stride=self.strides[i],
                activation="gelu" if norm is None else "",
            )
            if norm is not None:
                h = self._conv_norm(h, norm, target, plan.encoder)
            starts = target.starts
        return h

    def _conv_norm(self, h: Tensor, norm: StackedNorm, rows: Level, encoder: Tensor) -> Tensor:
        if not self.group_norm:
            return norm(h, rows, activation="gelu")
        return sequence_norm(
            h, norm.weight, norm.bias, encoder=encoder, cu_seqlens=rows.cu_seqlens, eps=norm.eps, activation="gelu"
        )

    def reset_parameters(self) -> None:
        if self.masked_spec_embed is not None:
            nn.init.zeros_(self.masked_spec_embed)

    def entries(self) -> list[Entry]:
        entries = []
        for i, conv1d in enumerate(self.convs):
            theirs = f"feature_extractor.conv_layers.{i}"
            entries.append(conv(f"convs.{i}.weight", f"{theirs}.conv.weight"))
            if conv1d.bias is not None:
                entries.append(Entry(f"convs.{i}.bias", (f"{theirs}.conv.bias",)))
            if i < len(self.conv_norms):
                entries += affine(f"conv_norms.{i}", f"{theirs}.layer_norm")
        if self.projection_norm is not None:
            entries += affine("projection_norm", "feature_projection.layer_norm")
        entries += [
            *affine("projection", "feature_projection.projection"),
            weight_normed_conv("position_conv.weight", "encoder.pos_conv_embed.conv"),
            Entry("position_conv.bias", ("encoder.pos_conv_embed.conv.bias",)),
            *affine("norm", "encoder.layer_norm"),
        ]
        for i in range(len(self.layers)):
            ours, theirs = f"layers.{i}", f"encoder.layers.{i}"
            entries += [
                *qkv(f"{ours}.qkv", f"{theirs}.attention", key_bias=True),
                *affine(f"{ours}.out", f"{theirs}.attention.out_proj"),
                *affine(f"{ours}.attention_norm", f"{theirs}.layer_norm"),
                *affine(f"{ours}.fc1", f"{theirs}.feed_forward.intermediate_dense"),
                *affine(f"{ours}.fc2", f"{theirs}.feed_forward.output_dense"),
                *affine(f"{ours}.mlp_norm", f"{theirs}.final_layer_norm"),
            ]
        if self.masked_spec_embed is not None:
            entries.append(Entry("masked_spec_embed", ("masked_spec_embed",)))
        return entries


class Wav2Vec2Family(HubertFamily):
    """wav2vec 2.0 encoders: HuBERT's architecture under another name."""

    encoder_class = Wav2Vec2Model
