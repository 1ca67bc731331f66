"""SpecAugment on what the base encoder hears, and on nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mowe.audio import WINDOW_SAMPLES
from mowe.errors import ConfigError
from mowe.families import ClipFeatures
from mowe.features import HOP
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.training.config import SpecAugmentConfig

_SHARE = 5  # a stripe in time takes no more than this part of a clip


def add_spec_augment(model: MoweForConditionalGeneration, config: SpecAugmentConfig) -> None:
    """From now on, blank stripes of the base encoder's log-mel input whenever the model is in training mode.

    Raises ConfigError for a base encoder that takes waveforms.
    """
    kind = model.config.audio_config.model_type
    if kind != "whisper":
        raise ConfigError(f"spec_augment: is for a base encoder that takes log-mel frames, this one is {kind!r}")

    def blank(tower: Any, inputs: tuple[Any, ...]) -> Any:
        features, plan = inputs
        return (_Striped(features, config), plan) if model.training else None

    model.audio_tower.register_forward_pre_hook(blank)


class _Striped(ClipFeatures):
    """The features of a batch with stripes of zeros, which is about the mean of a log-mel row."""

    def __init__(self, features: ClipFeatures, config: SpecAugmentConfig):
        super().__init__(features.audio, features.context)
        self.heard, self.config = features, config

    def log_mel(self, num_mel_bins: int) -> tuple[Tensor, Tensor]:
        rows, starts = self.heard.log_mel(num_mel_bins)
        rows, first = rows.clone(), 0
        for samples in self.audio.lengths:
            clip = rows[first : first + samples // HOP]
            for width, start in _stripes(
                self.config.time_stripes, self.config.time_frames, len(clip), len(clip) // _SHARE
            ):
                clip[start : start + width] = 0
            for width, start in _stripes(self.config.mel_stripes, self.config.mel_bins, num_mel_bins, num_mel_bins):
                clip[:, start : start + width] = 0
            first += (WINDOW_SAMPLES if self.context == "window" else samples) // HOP
        return rows, starts


def _stripes(count: int, widest: int, length: int, most: int) -> list[tuple[int, int]]:
    """Width and start of each stripe."""
    stripes = []
    for _ in range(count):
        width = int(torch.randint(min(widest, most) + 1, ()))
        stripes.append((width, int(torch.randint(length - width + 1, ()))))
    return stripes
