"""The least time a machine could take: arithmetic at its measured matrix rate, or bytes at its measured bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import WhisperConfig

from benchmarks.clock import DeviceClock, host_seconds
from benchmarks.workloads import Workload
from mowe.audio import SAMPLING_RATE
from mowe.families import family_class
from mowe.modeling_mowe import MoweModel
from mowe.projector import projected_lengths

_SIZE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is timed
_BYTES = 1 << 28  # of the buffer that is copied: larger than any cache


@dataclass(frozen=True)
class Roofs:
    """flops: multiplications and additions a second in a matrix product. bandwidth: bytes a second, read and written,
    in a copy.
    """

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: str = "cpu", dtype: str = "float32") -> Roofs:
        """The best of a few runs on this machine, by the fastest routines torch has, and the clock that ops are timed
        by: to launch them is no part of a GPU's limits.
        """
        kind = torch.device(device).type
        size, clock = _SIZE[kind], DeviceClock() if kind == "cuda" else host_seconds
        a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
        source = torch.empty(_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        products = [_best(lambda: torch.mm(a, b), clock)]
        if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
            products.append(_best(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), clock))
        return cls(2 * size**3 / min(products), 2 * _BYTES / _best(lambda: target.copy_(source), clock))

    def floor(self, flops: float, moved: float = 0.0) -> float:
        """Seconds for that much arithmetic and that many bytes, whichever takes longer."""
        return max(flops / self.flops, moved / self.bandwidth)


def pair_flops(encoder: nn.Module, seconds: float, context: str) -> float:
    """Matrix arithmetic of one encoder on one clip: its stem, its linear layers and its attention."""
    config = encoder.config
    samples = round(seconds * SAMPLING_RATE)
    family = family_class(config.model_type)([config])
    *inner, frames = family.level_lengths(samples, context)
    width, layers, hidden = config.hidden_size, config.num_hidden_layers, _ffn(config)
    linear = 2 * frames * (4 * width * width + 2 * width * hidden)
    attention = 4 * frames * frames * width
    return layers * (linear + attention) + _stem(config, inner, frames)


def pool_flops(workload: Workload) -> float:
    """Matrix arithmetic of every chosen encoder on every clip's own frames (`full`: on its window)."""
    encoders = [_outline(make) for make in workload.pool]
    return sum(
        pair_flops(encoders[e], seconds, workload.context)
        for seconds, chosen in zip(workload.seconds, workload.indices, strict=True)
        for e in chosen
    )


def base_flops(workload: Workload) -> float:
    """Matrix arithmetic of the base encoder on every clip."""
    base = _outline(workload.make_base)
    return sum(pair_flops(base, seconds, workload.context) for seconds in workload.seconds)


def projector_flops(model: MoweModel, workload: Workload) -> float:
    """Matrix arithmetic of a mixture's projector on every clip."""
    projector = model.multi_modal_projector
    hidden, taps, base_width = projector.base_weight.shape
    frames = [model.audio_tower.level_lengths(round(s * SAMPLING_RATE), "valid")[-1] for s in workload.seconds]
    total, width = 0.0, base_width + sum(len(weight) * weight.shape[-1] for weight in projector.slot_weights)
    for stride in projector.strides:
        frames = projected_lengths(frames, [stride])
        total, width = total + 2 * sum(frames) * taps * width * hidden, hidden
    return total + 2 * sum(frames) * hidden * projector.linear.out_features


def _outline(make: Callable[[], nn.Module]) -> nn.Module:
    """An encoder without weights."""
    with torch.device("meta"):
        return make()


def _ffn(config) -> int:
    return config.encoder_ffn_dim if isinstance(config, WhisperConfig) else config.intermediate_size


def _stem(config, inner: list[int], frames: int) -> float:
    width = config.hidden_size
    if isinstance(config, WhisperConfig):
        return 2 * 3 * width * (inner[0] * config.num_mel_bins + frames * width)
    levels = [*inner, frames][-len(config.conv_dim) :]
    channels = (1, *config.conv_dim)
    convolutions = sum(
        2 * length * kernel * into * out
        for length, kernel, into, out in zip(levels, config.conv_kernel, channels, config.conv_dim, strict=False)
    )
    positional = 2 * frames * config.num_conv_pos_embeddings * width * width / config.num_conv_pos_embedding_groups
    return convolutions + positional + 2 * frames * config.conv_dim[-1] * width


def _best(run: Callable[[], object], clock: Callable[[Callable[[], object]], float]) -> float:
    run()
    return min(clock(run) for _ in range(5))
