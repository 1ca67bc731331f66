"""Answers to the examples of a manifest, many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mowe.audio import split_windows
from mowe.data import Example
from mowe.errors import ConfigError
from mowe.evaluation.tasks import Rule
from mowe.processing_mowe import MoweProcessor

FRAME_SAMPLES = 320
"""20 ms, a frame of the encoders: what a batch is measured in."""


@dataclass(frozen=True)
class Piece:
    """What is answered at once: window `window` of an example, or all of it (None). samples: how long it is."""

    example: int
    window: int | None
    samples: int


def answer_examples(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    rules: Mapping[str, Rule],
    batch_frames: int,
    max_new_tokens: int,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> tuple[list[str], int]:
    """The model's answer to each example, and how many were still going on after `max_new_tokens`.

    A transcription of audio longer than the processor's window is made window by window and joined with spaces, as in
    the paper; other tasks hear their clip as a whole. Raises ConfigError for a processor of another kind of model.
    """
    if not isinstance(processor, MoweProcessor):
        raise ConfigError(
            f"expected a MoweProcessor and its model, got {type(processor).__name__}; mowe.evaluation.score judges the "
            "answers of other models"
        )
    window = processor.feature_extractor.window_samples
    pieces = []
    for index, example in enumerate(examples):
        samples = example.samples or len(example.waveform())
        if rules[example.task].transcribes and samples > window:
            starts = enumerate(range(0, samples, window))
            pieces += [Piece(index, number, min(window, samples - start)) for number, start in starts]
        else:
            pieces.append(Piece(index, None, samples))
    texts: dict[Piece, str] = {}
    cut = 0
    with evaluating(model):
        for batch in track(batches(pieces, batch_frames)):
            waves = {index: examples[index].waveform() for index in {piece.example for piece in batch}}
            heard = [
                waves[p.example] if p.window is None else split_windows(waves[p.example], window)[p.window]
                for p in batch
            ]
            prompts = [examples[piece.example].prompt for piece in batch]
            said, unfinished = answers(model, processor, heard, prompts, max_new_tokens)
            texts.update(zip(batch, said, strict=True))
            cut += unfinished
    parts: list[list[str]] = [[] for _ in examples]
    for piece in pieces:
        parts[piece.example].append(texts[piece])
    return [" ".join(filter(None, said)) for said in parts], cut


def answers(
    model: Any, processor: Any, waves: Sequence[Tensor], prompts: Sequence[str], max_new_tokens: int
) -> tuple[list[str], int]:
    """The likeliest token at every step, for each waveform [samples] at 16 kHz and its prompt.

    Returns the answers and how many of them `max_new_tokens` cut short.
    """
    conversations = [
        [{"role": "user", "content": [{"type": "audio", "audio": wave}, {"type": "text", "text": prompt}]}]
        for wave, prompt in zip(waves, prompts, strict=True)
    ]
    inputs: Any = processor.apply_chat_template(conversations, tokenize=True)
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(_end_tokens(model, processor), device=new.device)
    full = new.shape[1] >= max_new_tokens
    unfinished = int((~torch.isin(new, ends).any(1)).sum()) if full else 0
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)], unfinished


def batches(pieces: Sequence[Piece], batch_frames: int) -> list[list[Piece]]:
    """Pieces in batches, the longest first, padded to at most `batch_frames` frames each; a longer piece comes alone.

    Raises ConfigError for a limit under one frame.
    """
    if batch_frames < 1:
        raise ConfigError(f"batch_frames must be 1 or more, got {batch_frames}")
    found: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.samples):
        if found and (len(found[-1]) + 1) * found[-1][0].samples <= batch_frames * FRAME_SAMPLES:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and every part in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _end_tokens(model: Any, processor: Any) -> list[int]:
    """What an answer may end with."""
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    return [token for token in (*ends, processor.tokenizer.eos_token_id) if token is not None]
