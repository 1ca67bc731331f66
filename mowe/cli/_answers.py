"""Prompts in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mowe.cli._inputs import Clip, LoadedModel


@torch.inference_mode()
def answers(loaded: LoadedModel, clips: Sequence[Clip], prompt: str, max_new_tokens: int) -> list[str]:
    """What the model says about each clip alone, the likeliest token at every step."""
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": clip.wave}, {"type": "text", "text": prompt}]}]
        for clip in clips
    ]
    inputs: Any = loaded.processor.apply_chat_template(conversations, tokenize=True)
    tokens = loaded.model.generate(**inputs.to(loaded.device), max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in loaded.processor.batch_decode(new, skip_special_tokens=True)]
