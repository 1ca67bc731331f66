"""Prompts in, answers out."""

from __future__ import annotations

from collections.abc import Sequence

from mowe.cli._inputs import Clip, LoadedModel
from mowe.evaluation import generation


def answers(loaded: LoadedModel, clips: Sequence[Clip], prompt: str, max_new_tokens: int) -> list[str]:
    """What the model says about each clip alone, the likeliest token at every step."""
    waves, prompts = [clip.wave for clip in clips], [prompt] * len(clips)
    return generation.answers(loaded.model, loaded.processor, waves, prompts, max_new_tokens)[0]
