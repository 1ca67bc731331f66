"""What commands are given: audio files and model folders."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from mowe.audio import SAMPLING_RATE, as_waveform, load_audio
from mowe.cli._screen import Screen
from mowe.configuration_mowe import MoweConfig
from mowe.errors import CheckpointError, ConfigError, MoweError
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.processing_mowe import MoweProcessor

_KINDS = {"whisper": "Whisper", "hubert": "HuBERT", "wav2vec2": "wav2vec 2.0"}


@dataclass(frozen=True)
class Clip:
    """file: as given. wave: [samples] float32 at 16 kHz, ready to be encoded. seconds: of the file, without padding."""

    file: str
    wave: Tensor
    seconds: float


def read_clips(paths: Sequence[Path], screen: Screen) -> list[Clip]:
    """Read audio files, telling what had to be done to them. Raises AudioError, naming the file."""
    clips = []
    for path in screen.track(paths, "reading"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            with _quiet_decoders():
                samples = load_audio(path)
            wave = as_waveform(samples, name=str(path))
        clips.append(Clip(str(path), wave, round(len(samples) / SAMPLING_RATE, 3)))
        for warning in caught:
            screen.note(str(warning.message))
    return clips


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. folder: where it came from, None for the demo model."""

    model: MoweForConditionalGeneration
    processor: MoweProcessor
    folder: Path | None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def trained(self) -> bool | None:
        """Whether the weights are trained; a folder does not tell."""
        return True if self.folder is None else None

    @property
    def encoder_names(self) -> list[str]:
        """What people read for each encoder of the pool: its kind and its number."""
        pool: Any = self.model.config.pool_config
        kinds = [encoder.model_type for encoder in pool.encoder_configs()]
        return [f"{_KINDS.get(kind, kind)} {i}" for i, kind in enumerate(kinds)]


def load_model(
    folder: Path | None, screen: Screen, parts_in_4bit: Sequence[str] = (), double_quant: bool = True
) -> LoadedModel:
    """The model of a folder, or the demo model, on the GPU where there is one. Raises MoweError, naming the folder.

    parts_in_4bit: what of it is put in 4 bits while it is read; refused where the folder's model is quantised.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with screen.step(f"loading {model_name(folder)}"):
        if folder is None:
            from mowe.nano import nano_model

            model, processor = nano_model()
            if parts_in_4bit:
                from mowe.quantization import quantize

                quantize(model, parts=parts_in_4bit, double_quant=double_quant)
        else:
            settings: dict[str, Any] = {"local_files_only": True}
            if parts_in_4bit:
                settings["quantization_config"] = _in_4_bits(folder, parts_in_4bit, double_quant)
            read_config(folder)
            with loading(folder):
                model = MoweForConditionalGeneration.from_pretrained(folder, **settings)
                processor = MoweProcessor.from_pretrained(folder, local_files_only=True)
        return LoadedModel(model.to(default_device()).eval(), processor, folder)


def skeleton(folder: Path | None) -> MoweForConditionalGeneration:
    """The modules of a model without their weights, in the type it is stored in; the demo model in float32."""
    if folder is None:
        from mowe.nano import nano_folder

        with nano_folder() as folder:
            return skeleton(folder).float()
    config = read_config(folder)
    with loading(folder), torch.device("meta"):
        model = MoweForConditionalGeneration(config)
    model.tie_weights()
    return model.to(config.dtype or torch.float32)


def _in_4_bits(folder: Path, parts: Sequence[str], double_quant: bool) -> Any:
    from mowe.quantization import MoweQuantizationConfig

    if getattr(read_config(folder), "quantization_config", None) is not None:
        raise ConfigError(f"{folder}: the model is already quantised")
    return MoweQuantizationConfig(parts, double_quant)


def read_config(folder: Path) -> MoweConfig:
    """The configuration in a model folder. Raises MoweError, naming the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json in it, expected the folder of a saved model")
    with loading(file):
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        if kind != MoweConfig.model_type:
            from mowe.attach.adapter import CONFIG_FILE

            attached = "; models with an attached mixture are for Python alone" * (folder / CONFIG_FILE).is_file()
            raise CheckpointError(f"{file}: model_type must be {MoweConfig.model_type!r}, got {kind!r}{attached}")
        return MoweConfig.from_dict(settings)


def model_name(folder: Path | None) -> str:
    return "the demo model" if folder is None else str(folder)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Keep what decoders written in C tell stderr from the user: what matters of it comes back as an error."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Errors inside become MoweErrors that name the path; damaged files make transformers raise anything."""
    try:
        yield
    except MoweError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from None
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded: {told}") from None
