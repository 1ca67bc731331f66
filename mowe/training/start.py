"""What a run starts from: the model it loads, and what is checked before it writes anything."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

from mowe.checkpoint import load_language_model, reading
from mowe.data import Manifest
from mowe.errors import CheckpointError, ConfigError, DataError, naming
from mowe.files import check_folder, make_folder, write_text
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.processing_mowe import MoweFeatureExtractor, MoweProcessor
from mowe.quantization import MoweQuantizationConfig, quantize
from mowe.training.config import PartsConfig, TrainConfig
from mowe.training.data import conversation
from mowe.training.parts import parts_in_4_bits

_FREE_TO_CHANGE = (
    "log_every", "save_every", "evaluate_every", "keep", "tensorboard", "output", "data.workers", "trainer.ddp_timeout",
)  # fmt: skip
"""What a resumed run may have otherwise than the run before."""
CONFIG_NAME = "config.json"
_AUDIO_TOKEN = "<|audio|>"


def load(config: TrainConfig, in_4_bits: bool = False) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """The model that a run begins with, in float32, the same at every call, and its processor.

    in_4_bits: the language model is put in 4 bits, if it is not already.
    """
    set_seed(config.seed)
    if isinstance(config.model, str):
        if not Path(config.model).is_dir():
            raise CheckpointError(f"model: {config.model}: no such folder, expected that of a saved model")
        quantization = MoweQuantizationConfig(["language_model"]) if in_4_bits else None
        model = MoweForConditionalGeneration.from_pretrained(
            config.model, dtype="float32", quantization_config=quantization
        )
        processor = MoweProcessor.from_pretrained(config.model)
    else:
        model, processor = _from_parts(config.model)
    if in_4_bits and "language_model" not in parts_in_4_bits(model):
        before = getattr(model.config, "quantization_config", None)
        quantize(model, parts=["language_model"], double_quant=before.double_quant if before else True)
    return model, processor


def _from_parts(parts: PartsConfig) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    source = parts.tokenizer or parts.language_model
    with naming(source), reading("the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": [_AUDIO_TOKEN]}, replace_extra_special_tokens=False)
    model = MoweForConditionalGeneration.from_parts(
        parts.audio_tower,
        parts.pool,
        load_language_model(parts.language_model).float(),  # its type is that of the whole model
        audio_token_id=tokenizer.convert_tokens_to_ids(_AUDIO_TOKEN),
        **parts.settings,
    )
    return model, MoweProcessor(MoweFeatureExtractor.from_config(model.config), tokenizer, audio_token=_AUDIO_TOKEN)


def check_output(config: TrainConfig, resume: bool) -> None:
    """Raise ConfigError where there can be no run, where it would mix with another one or has none to go on with."""
    output = Path(config.output)
    check_folder(output, "output")
    if not resume:
        if output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"output: {output} is not empty; go on with --resume or choose another folder")
        return
    stored = output / CONFIG_NAME
    if not stored.exists():
        raise ConfigError(f"output: {output} has no run to go on with; begin one without --resume")
    with naming(f"{stored}"), reading("the configuration of the run"):
        before = _flat(dict(json.loads(stored.read_text(encoding="utf-8"))))
    now = _flat(asdict(config))
    defaults = {f.name: f.default for f in fields(config)}  # of fields that are newer than that run
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name, defaults.get(name)), now.get(name)
        if was != is_now and name not in _FREE_TO_CHANGE:
            raise ConfigError(f"{name}: {output} was begun with {was!r}, it cannot go on with {is_now!r}")


def check_template(processor: MoweProcessor) -> None:
    """Raise CheckpointError for a chat template that fails, or that leaves the audio out."""
    with naming("model"), reading("the chat template"):
        prompt = processor.apply_chat_template(conversation(torch.zeros(1), "?"))
        if prompt.count(processor.audio_token) != 1:
            raise CheckpointError(f"its chat template does not write {processor.audio_token} once, it says {prompt!r}")


def check_answers(manifest: Manifest, audio_token: str) -> None:
    """Raise DataError for an answer with the token that stands for audio."""
    for example in manifest:
        if audio_token in example.answer:
            raise DataError(f"{manifest.path}: the answer about {example.name} has {audio_token}, leave it out")


def check_random_states(checkpoint: str, processes: int) -> None:
    """Raise CheckpointError where they are not those of as many processes: a run would go on with other chance, and
    with steps of another size.
    """
    expected = ["rng_state.pth"] if processes == 1 else [f"rng_state_{index}.pth" for index in range(processes)]
    found = sorted(path.name for path in Path(checkpoint).glob("rng_state*.pth"))
    if found != sorted(expected):
        raise CheckpointError(
            f"{checkpoint}: expected {' '.join(expected)}, the random state of each process, "
            f"got {' '.join(found) or 'none'}; a run goes on with as many processes as it was begun with"
        )


def write_config(config: TrainConfig) -> None:
    output = make_folder(config.output, "output")
    write_text(output / CONFIG_NAME, json.dumps(_flat(asdict(config)), indent=2) + "\n", "the configuration")


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    """{"data.batch_frames": 8000, ...}, without fields that hold no further ones."""
    if not isinstance(data, dict | list) or data == []:
        return {name: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    at = f"{name}." if name else ""
    return {key: value for k, item in items for key, value in _flat(item, f"{at}{k}").items()}
