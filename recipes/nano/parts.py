"""The pre-trained parts by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import HubertConfig, WhisperConfig, set_seed

from mowe.families.whisper import WhisperFamily
from recipes.nano.encoders import (
    SPECIALISTS,
    WAVE_SPECIALISTS,
    hubert,
    new_pool,
    save_encoder,
    train_base,
    train_specialists,
    whisper,
)
from recipes.nano.language_model import train_language_model
from recipes.nano.results import write_result
from recipes.nano.settings import SETTINGS, Settings


def make_part(lab: Path, name: str) -> None:
    """Make a part and write what became of it; nothing is done where it is there already."""
    result = lab / "results" / "parts" / f"{name}.json"
    if not result.exists():
        write_result(result, {"part": name, **PARTS[name](lab / "data", lab / "parts" / name, SETTINGS)})


def _base(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    return train_base(data, out, settings.base_width, settings.base_heads, settings)


def _large(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """A base with the parameters of base and pool together."""
    return train_base(data, out, settings.large_width, settings.large_heads, settings)


def _whisper(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """The uniform pool; its specialists for language and sound are also those of the diverse one."""
    return train_specialists(data, out, weak_whisper(settings), SPECIALISTS, settings.whisper_epochs, settings)


def _hubert(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """What the diverse pool has instead of Whisper encoders."""
    return train_specialists(data, out, hubert(settings), WAVE_SPECIALISTS, settings.hubert_epochs, settings)


def _untrained(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """The diverse pool as it was before any training."""
    set_seed(settings.seed)
    pool = new_pool(diverse(settings))
    for place, task in enumerate(SPECIALISTS):
        save_encoder(pool.to_transformers(place), out / task)
    return {}


@torch.no_grad()
def _silent(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """An encoder whose features are zero: with it as the pool, the base is all that is heard."""
    family = WhisperFamily([whisper(8, 1, 1)])
    family.layer_norm.weight.zero_()
    save_encoder(family.to_transformers(0), out)
    return {}


def weak_whisper(settings: Settings) -> WhisperConfig:
    return whisper(settings.weak_width, settings.weak_heads, settings.weak_layers)


def diverse(settings: Settings) -> list[WhisperConfig | HubertConfig]:
    """The encoders of a diverse pool."""
    return [hubert(settings) if task in WAVE_SPECIALISTS else weak_whisper(settings) for task in SPECIALISTS]


PARTS: dict[str, Callable[[Path, Path, Settings], dict[str, Any]]] = {
    "silent": _silent,
    "untrained": _untrained,
    "base": _base,
    "hubert": _hubert,
    "whisper": _whisper,
    "language_model": train_language_model,
    "large": _large,
}
