"""From manifests to batches: mixing, buckets of like lengths, a budget of frames, and model inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mowe.data import Example
from mowe.errors import ConfigError
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.processing_mowe import MoweFeatureExtractor, MoweProcessor

_POOLED_BATCHES = 50
"""Batches whose clips are sorted by length together: enough for batches of like clips, few enough to stay random."""


def base_frames(model: MoweForConditionalGeneration, extractor: MoweFeatureExtractor, samples: int) -> int:
    """Packed frames of the base encoder for a clip of so many samples, cut into the extractor's windows."""
    whole, rest = divmod(samples, extractor.window_samples)
    lengths = [extractor.window_samples] * whole + [max(rest, extractor.min_window_samples)] * (rest > 0)
    return sum(model.audio_tower.level_lengths(length, model.config.context)[-1] for length in lengths)


class FrameBatches(Sampler[list[int]]):
    """Batches of examples with up to `batch_frames` frames, the same in every process and after every restart.

    Pass after pass over the examples: each is in a pass as often as its weight says (1.5: once, and again for a random
    half), in a new order, clips of like length together.
    """

    def __init__(
        self,
        frames: Sequence[int],
        batch_frames: int,
        *,
        batch_clips: int | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        num_batches: int | None = None,
        multiple_of: int = 1,
        name_of: Callable[[int], str] = "clip {}".format,
    ):
        """frames: of each example. num_batches: how many there are; those of one pass by default, cut up until their
        number is a multiple of `multiple_of`. name_of: says in an error which example is meant.
        """
        longest = max(range(len(frames)), key=frames.__getitem__)
        if frames[longest] > batch_frames:
            raise ConfigError(
                f"data.batch_frames is {batch_frames} but {name_of(longest)} has {frames[longest]} frames"
            )
        self.frames = frames
        self.batch_frames = batch_frames
        self.batch_clips = batch_clips
        self.weights = weights if weights is not None else [1.0] * len(frames)
        if not sum(self.weights) > 0:
            raise ConfigError("data.task_weights leave nothing to train on")
        self.seed = seed
        self.multiple_of = multiple_of
        of_one_pass = len(self.one_pass(0))
        self.num_batches = of_one_pass if num_batches is None else num_batches
        self.passes = self.num_batches / of_one_pass

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        left, number = self.num_batches, 0
        while left:
            batches = self.one_pass(number)[:left]
            yield from batches
            left -= len(batches)
            number += 1

    def batches_in(self, passes: float) -> float:
        """How many batches so many passes have."""
        whole, part = int(passes), passes % 1
        lengths = [len(self.one_pass(number)) for number in range(whole + (part > 0))]
        return sum(lengths[:whole]) + (part * lengths[-1] if part else 0)

    def one_pass(self, number: int) -> list[list[int]]:
        """The batches of a pass over the examples."""
        rng = random.Random(f"{self.seed} {number}")
        drawn = [
            index for index, weight in enumerate(self.weights) for _ in range(int(weight) + (rng.random() < weight % 1))
        ]
        drawn = drawn or rng.choices(range(len(self.frames)), self.weights)  # of weights near zero
        rng.shuffle(drawn)
        total = sum(self.frames[index] for index in drawn)
        pools = max(1, total // (self.batch_frames * _POOLED_BATCHES))
        batches = []
        for pool in range(pools):
            batches += self._cut(sorted(drawn[pool::pools], key=self.frames.__getitem__))
        rng.shuffle(batches)
        return self._even(batches)

    def _even(self, batches: list[list[int]]) -> list[list[int]]:
        """Every process has as many; where batches of one clip are still too few, some come again at the end."""
        while len(batches) % self.multiple_of:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            clips = batches[largest]
            half = len(clips) // 2
            batches = [*batches, clips[half:]]
            if half:
                batches[largest] = clips[:half]
        return batches

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for index in indices:
            if not batches or room < self.frames[index] or len(batches[-1]) == self.batch_clips:
                batches.append([])
                room = self.batch_frames
            batches[-1].append(index)
            room -= self.frames[index]
        return batches


def conversation(wave: Tensor, prompt: str) -> list[dict[str, Any]]:
    """What a chat template makes a prompt of: a clip and what is asked about it."""
    return [{"role": "user", "content": [{"type": "audio", "audio": wave}, {"type": "text", "text": prompt}]}]


@dataclass(frozen=True)
class Collator:
    """Examples to model inputs, audio decoded here: in the workers of a DataLoader.

    tasks: their names, whose places become `task_ids`, int64 [windows], one for each window of audio.
    """

    processor: MoweProcessor
    tasks: Sequence[str]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        waves = [example.waveform() for example in examples]
        conversations = [conversation(wave, example.prompt) for wave, example in zip(waves, examples, strict=True)]
        answers = [example.answer for example in examples]
        inputs: Any = self.processor.apply_chat_template(
            conversations, tokenize=True, answers=answers, padding_side="right"
        )
        window = self.processor.feature_extractor.window_samples
        places = [self.tasks.index(example.task) for example in examples]
        counts = torch.tensor([-(-len(wave) // window) for wave in waves])
        return {**inputs, "task_ids": torch.tensor(places).repeat_interleave(counts)}
