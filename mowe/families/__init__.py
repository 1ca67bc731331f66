"""Encoder families: which transformers encoders can be in a pool, and how each kind runs."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from mowe.errors import ConfigError
from mowe.families.base import ClipFeatures, Context, EncoderFamily, KeepsFixed, hold_fixed
from mowe.families.hubert import HubertFamily, Wav2Vec2Family
from mowe.families.whisper import WhisperFamily

FAMILIES: dict[str, type[EncoderFamily]] = {
    "whisper": WhisperFamily,
    "hubert": HubertFamily,
    "wav2vec2": Wav2Vec2Family,
}


def family_class(model_type: str) -> type[EncoderFamily]:
    """The family that runs encoders of a transformers model type. Raises ConfigError for one that is not supported."""
    if model_type not in FAMILIES:
        raise ConfigError(f"encoders of type {model_type!r} are not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def find_encoder(module: nn.Module) -> PreTrainedModel:
    """The one supported encoder inside a transformers model (or the model itself). Raises ConfigError without one."""
    classes = tuple(family.encoder_class for family in FAMILIES.values())
    found = [m for m in module.modules() if isinstance(m, classes)] if isinstance(module, nn.Module) else []
    if len(found) != 1:
        raise ConfigError(
            f"{type(module).__name__} holds {len(found)} encoders of a supported type, expected one; "
            f"supported: {', '.join(c.__name__ for c in classes)}"
        )
    return found[0]


__all__ = [
    "FAMILIES",
    "ClipFeatures",
    "Context",
    "EncoderFamily",
    "KeepsFixed",
    "family_class",
    "find_encoder",
    "hold_fixed",
]
