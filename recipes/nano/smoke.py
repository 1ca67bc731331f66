"""What `mowe train recipes/nano/smoke.yaml` needs, made in seconds without espeak-ng: sounds, and a model of parts that
know nothing yet."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import soundfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mowe import MoweFeatureExtractor, MoweForConditionalGeneration, MoweProcessor
from mowe.families.whisper import WhisperFamily
from recipes.nano.data import PROMPTS
from recipes.nano.encoders import new_pool, whisper
from recipes.nano.language_model import AUDIO, new_tokenizer
from recipes.nano.parts import diverse
from recipes.nano.settings import SETTINGS
from recipes.nano.sounds import EVENTS, RATE, level

SOUNDS = ("a siren", "a bell", "knocks", "a bird")
SIZES = {"train": 160, "validation": 24, "test": 24}


def build(out: Path) -> None:
    """Write `out`/{train,validation,test}.jsonl with their clips, and `out`/model."""
    for split, size in SIZES.items():
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for index in range(size):
            random = Random(f"{split} {index}")
            draw, sound = np.random.default_rng(random.getrandbits(64)), SOUNDS[index % len(SOUNDS)]
            file = f"{split}/{index:03}.flac"
            soundfile.write(out / file, level(EVENTS[sound](draw, int(random.uniform(0.6, 1.2) * RATE)), 0.5), RATE)
            rows.append({"audio": file, "task": "sound", "prompt": PROMPTS["sound"][0], "answer": sound})
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _model(out / "model")


def _model(folder: Path) -> None:
    torch.manual_seed(SETTINGS.seed)
    tokenizer = new_tokenizer([PROMPTS["sound"][0] + "\n", *SOUNDS], SETTINGS.vocabulary)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.05,
            **ids,
        )
    )
    base = WhisperFamily([whisper(64, 2, 2)])
    base.reset_parameters()
    model = MoweForConditionalGeneration.from_parts(
        base.to_transformers(0),
        new_pool(diverse(SETTINGS)),
        language_model,
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
        context="valid",
        router_noise=0.5,
    )
    model.save_pretrained(folder)
    MoweProcessor(MoweFeatureExtractor.from_config(model.config), tokenizer).save_pretrained(folder)
