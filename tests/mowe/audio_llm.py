"""A tiny AudioLLM with random parameters, its processor, and the language models it can have."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import mowe
from tests.mowe.encoders import clip, hubert, randomized, whisper
from tests.mowe.tokenizer import byte_tokenizer

VOCAB = 264  # 256 bytes, 3 special tokens, the placeholder, and room
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}

PROMPTS = ["a <|audio|> b", "<|audio|> and <|audio|>?", "no audio"]
CLIPS = [[clip(16_000, 1)], [clip(40_000, 2), clip(9_000, 3)], []]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def language_model(model_type: str = "llama", seed: int = 9, **settings: Any) -> PreTrainedModel:
    """A causal language model of any type, over the tokens of `byte_tokenizer`."""
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCAB, **_SIZES, **_SPECIAL, **settings})
    return randomized(AutoModelForCausalLM.from_config(config), seed)


def tiny_pool(context: str = "window") -> mowe.EncoderPool:
    return mowe.EncoderPool.from_encoders([whisper(1), hubert(2), whisper(3), hubert(4)], context=context)


def tiny_model(
    lm: PreTrainedModel | None = None, pool: mowe.EncoderPool | None = None, base: Any = None, **settings: Any
) -> mowe.MoweForConditionalGeneration:
    settings = {"audio_token_id": 259, "context": "valid", **settings}
    torch.manual_seed(5)
    model = mowe.MoweForConditionalGeneration.from_parts(
        base or whisper(0), pool or tiny_pool(settings["context"]), lm or language_model(), **settings
    )
    if model.config.num_dependent_slots:
        torch.nn.init.normal_(model.model.mixture.router.dependent.weight)
    return model


def processor_of(model: mowe.MoweForConditionalGeneration, **tokenizer: Any) -> mowe.MoweProcessor:
    return mowe.MoweProcessor(mowe.MoweFeatureExtractor.from_config(model.config), byte_tokenizer(**tokenizer))


def answers(model: mowe.MoweForConditionalGeneration, inputs: Any, **settings: Any) -> list[list[int]]:
    """The new tokens of every prompt, the most likely ones unless the settings say otherwise."""
    return model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :].tolist()
