"""Encoders from transformers checkpoints, with nothing missing and nothing unread."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mowe.errors import CheckpointError
from mowe.families import family_class, find_encoder


def load_pretrained_encoder(source: str | PathLike[str]) -> tuple[PreTrainedModel, Any]:
    """The encoder of a checkpoint folder or hub id, in float32, and its feature extractor (None where it has none).

    Any transformers model that holds a supported encoder will do; the rest of it is dropped.
    Raises CheckpointError for a folder that cannot be read, a corrupt file, or missing or surplus encoder parameters.
    """
    source = str(source)
    try:
        config = AutoConfig.from_pretrained(source)
        family_class(config.model_type)
        model, info = _model_class(config).from_pretrained(
            source, config=config, output_loading_info=True, dtype="float32", use_safetensors=True
        )
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{source}: cannot load an encoder: {_first_line(error)}") from None
    encoder = find_encoder(model)
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    for kind in ("missing_keys", "unexpected_keys"):
        keys = sorted(key for key in info[kind] if key.startswith(prefix))
        if keys:
            raise CheckpointError(f"{source}: {kind.replace('_', ' ')} of the encoder: {keys}")
    return encoder.eval(), _feature_extractor(source)


def _model_class(config: transformers.PreTrainedConfig) -> type:
    architecture = (config.architectures or [""])[0]
    if architecture == "WhisperEncoder":  # not exported by transformers
        return WhisperEncoder
    return getattr(transformers, architecture, AutoModel)


def _feature_extractor(source: str) -> Any:
    try:
        return AutoFeatureExtractor.from_pretrained(source)
    except (OSError, ValueError):
        if Path(source, "preprocessor_config.json").exists():
            raise CheckpointError(f"{source}: preprocessor_config.json cannot be read") from None
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
