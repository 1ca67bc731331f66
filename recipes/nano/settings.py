"""Sizes and lengths of everything in the lab, in one place; the results carry a copy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """width, layers, heads: of the encoders and the language model. *_epochs: passes over a part's training clips.
    *_batch: clips in a step. seed: of the clips and of pre-training; the compared runs have their own.
    """

    seed: int = 0
    base_width: int = 96
    base_heads: int = 3
    large_width: int = 120
    large_heads: int = 4
    base_layers: int = 4
    base_epochs: int = 9
    base_batch: int = 16
    weak_width: int = 40
    weak_heads: int = 2
    weak_layers: int = 2
    whisper_epochs: int = 9
    hubert_epochs: int = 14
    weak_batch: int = 32
    encoder_rate: float = 3e-3
    vocabulary: int = 640
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_steps: int = 600
    text_batch: int = 64
    text_rate: float = 3e-3


SETTINGS = Settings()
