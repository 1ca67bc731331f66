"""Batches by frames: a budget that holds, weights that are kept, the same order everywhere."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

from mowe.audio import WINDOW_SAMPLES
from mowe.errors import ConfigError
from mowe.processing_mowe import MoweFeatureExtractor
from mowe.training.data import FrameBatches, base_frames
from tests.mowe.audio_llm import tiny_model
from tests.mowe.encoders import whisper

FRAMES = [random.Random(i).randint(20, 400) for i in range(300)]


def test_every_example_is_in_a_pass_and_every_batch_within_the_budget() -> None:
    batches = FrameBatches(FRAMES, 1_000, seed=3)
    for number in range(2):
        a_pass = batches.one_pass(number)
        assert sorted(index for batch in a_pass for index in batch) == list(range(300))
        assert all(sum(FRAMES[index] for index in batch) <= 1_000 for batch in a_pass)
    assert batches.one_pass(0) != batches.one_pass(1) != FrameBatches(FRAMES, 1_000, seed=4).one_pass(1)
    assert batches.one_pass(1) == FrameBatches(FRAMES, 1_000, seed=3).one_pass(1)


def test_batches_are_full_and_of_like_clips() -> None:
    batches = [[FRAMES[index] for index in batch] for batch in FrameBatches(FRAMES, 1_000)]
    assert sum(map(sum, batches)) > 0.8 * 1_000 * len(batches)
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert padded < 1.15 * sum(FRAMES)


def test_at_most_so_many_clips() -> None:
    sizes = Counter(map(len, FrameBatches([10] * 35, 1_000, batch_clips=8)))
    assert sizes == {8: 4, 3: 1}


def test_weights_say_how_often() -> None:
    weights = [0.0, 1.0, 2.0, 0.5] * 250
    passes = FrameBatches([10] * 1_000, 200, weights=weights)
    for number in range(2):
        seen = Counter(index for batch in passes.one_pass(number) for index in batch)
        assert [seen[index] for index in range(3)] == [0, 1, 2]
        assert max(seen[index] for index in range(3, 1_000, 4)) == 1
        assert 90 < sum(seen[index] for index in range(3, 1_000, 4)) < 160


def test_weights_near_zero_still_give_batches() -> None:
    assert list(FrameBatches([10] * 3, 200, weights=[0.0, 1e-9, 0.0], num_batches=4)) == [[1]] * 4


def test_as_many_batches_as_asked_for_over_several_passes() -> None:
    one = FrameBatches(FRAMES, 1_000, seed=1)
    many = FrameBatches(FRAMES, 1_000, seed=1, num_batches=200)
    assert len(many) == len(list(many)) == 200
    assert list(many)[: len(one)] == list(one) and list(many)[len(one)] == one.one_pass(1)[0]
    assert one.batches_in(1.5) == len(one.one_pass(0)) + 0.5 * len(one.one_pass(1))


def test_processes_share_the_batches_and_a_restart_skips_them() -> None:
    """As accelerate does it for the Trainer."""
    batches = FrameBatches(FRAMES, 1_000, num_batches=60)
    shards = [list(BatchSamplerShard(batches, 2, rank, even_batches=False)) for rank in range(2)]
    assert [batch for pair in zip(*shards, strict=True) for batch in pair] == list(batches)
    assert list(SkipBatchSampler(batches, 7)) == list(islice(batches, 7, None))


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_frames is 300 but clip \d+ has \d+ frames"):
        FrameBatches(FRAMES, 300)
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        FrameBatches([10], 300, weights=[0.0])


@pytest.mark.parametrize("context", ["valid", "window"])
@pytest.mark.parametrize("samples", [1_000, 16_000, WINDOW_SAMPLES, WINDOW_SAMPLES + 100])
def test_frames_are_those_of_the_base_encoder(context: str, samples: int) -> None:
    model = tiny_model(context=context)
    windows = [min(samples, WINDOW_SAMPLES)] + [100] * (samples > WINDOW_SAMPLES)
    expected = {"valid": sum(max(length // 160 + 1, 3) // 2 for length in windows), "window": 1_500 * len(windows)}
    assert base_frames(model, MoweFeatureExtractor.from_config(model.config), samples) == expected[context]


def test_frames_are_those_of_the_windows_that_the_encoders_take() -> None:
    model = tiny_model(base=whisper(0, max_source_positions=750))
    assert base_frames(model, MoweFeatureExtractor.from_config(model.config), 320_000) == 750 + 250
