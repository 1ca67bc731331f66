"""Tiny AudioLLMs with random parameters, and inputs as their processors would make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2AudioProcessor, WhisperFeatureExtractor

import mowe
from tests.mowe.attach.audio_llms import AUDIO, MEL, PAD, TINY, WINDOW
from tests.mowe.encoders import hubert, randomized, whisper
from tests.mowe.tokenizer import byte_tokenizer


def tiny_pool() -> mowe.EncoderPool:
    """The same pool every time."""
    torch.manual_seed(1)
    return mowe.EncoderPool.from_encoders([whisper(1), hubert(2), whisper(3), hubert(4)], context="valid")


def tiny(model_type: str) -> PreTrainedModel:
    """The same model every time. Frozen: torch rounds differently what it keeps a gradient of."""
    torch.manual_seed(0)
    with without_timm():
        return randomized(TINY[model_type].make(), 7).requires_grad_(False)


def save_qwen2_audio(folder: str, dtype: torch.dtype = torch.float32) -> None:
    """A checkpoint of a tiny model and of a processor with the tokens of the real one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    model = tiny("qwen2_audio")
    model.resize_token_embeddings(320)
    model.config.audio_token_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    model.generation_config.max_length = None
    model.to(dtype).save_pretrained(folder)
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=MEL, chunk_length=2), tokenizer).save_pretrained(folder)


class _NoVision(nn.Module):
    """Stands in for a vision tower that needs a package of its own."""


@contextmanager
def without_timm() -> Iterator[None]:
    """Models made or loaded inside do without the vision tower that timm has."""
    from_config = transformers.AutoModel.from_config

    def patched(config: Any, **kwargs: Any) -> nn.Module:
        return _NoVision() if config.model_type == "gemma3n_vision" else from_config(config, **kwargs)

    with mock.patch.object(transformers.AutoModel, "from_config", patched):
        yield


def inputs(model_type: str, prompts: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Model inputs of a batch of prompts, each a list of waveforms between words, padded on the left."""
    waves = [wave for prompt in prompts for wave in prompt]
    features, tokens = TINY[model_type].features(waves) if waves else ({}, [])
    counts = iter(tokens)
    rows = []
    for number, prompt in enumerate(prompts):
        row = [3, 4 + number]
        for _ in prompt:
            row += [5] + [AUDIO] * next(counts) + [6]
        rows.append(torch.tensor([*row, *range(7, 9 + 2 * number)]))
    batch: dict[str, Any] = {
        "input_ids": nn.utils.rnn.pad_sequence(rows, True, PAD, "left"),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
        **features,
    }
    return batch | weak_inputs(heard(model_type, waves)) if waves else batch


def heard(model_type: str, waves: Sequence[Tensor]) -> list[Tensor]:
    """What a feature extractor is given."""
    cut = TINY[model_type].windows == "processor"
    return [part for wave in waves for part in wave.split(WINDOW)] if cut else list(waves)


def weak_inputs(waves: Sequence[Tensor]) -> dict[str, Tensor]:
    padded = nn.utils.rnn.pad_sequence(list(waves), True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[wave.numel()] for wave in waves])
    return {"mowe_waveforms": padded, "mowe_waveforms_mask": mask}
