"""Answers of a batch are those of each example alone, whatever lies beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mowe.audio import load_audio
from mowe.data import Example
from mowe.errors import AudioError, ConfigError
from mowe.evaluation import Rule, evaluate
from mowe.evaluation.generation import FRAME_SAMPLES, Piece, answers, batches
from tests.mowe.babbler import babbler

SECONDS = {"a": 0.5, "b": 2.2, "c": 1.1, "d": 0.7, "e": 31.3}
RULES = {"asr": Rule("wer"), "mood": Rule("accuracy")}


@pytest.fixture(scope="module")
def model() -> Any:
    return babbler()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Clips of noise in various colours; the last is longer than a window, and asked about in two ways."""
    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    found = []
    for number, (name, seconds) in enumerate(SECONDS.items()):
        samples = round(seconds * 16_000)
        noise = np.convolve(generator.standard_normal(samples), np.ones(2 * number + 1), "same")
        soundfile.write(folder / f"{name}.wav", 0.1 * noise / np.abs(noise).max(), 16_000)
        prompt = "Was hörst du? " * (number % 3 + 1)
        found.append(Example(folder / f"{name}.wav", "mood", prompt, "sad", number + 1, samples))
    last = found[-1]
    return [*found, Example(last.audio, "asr", last.prompt, "one two", 6)]  # its samples are not known


def alone(model: Any, wave: torch.Tensor, prompt: str) -> str:
    return answers(*model, [wave], [prompt], 6)[0][0]


@pytest.mark.parametrize("batch_frames", [1, 300, 12_000])
def test_answers_do_not_depend_on_the_batch(model: Any, asked: list[Example], batch_frames: int) -> None:
    seen: list[list[Piece]] = []

    def track(found: Any) -> Iterator[Any]:
        seen.extend(found)
        return iter(found)

    report = evaluate(*model, asked, RULES, batch_frames=batch_frames, max_new_tokens=6, track=track)
    assert len(seen) == {1: 7, 300: 4, 12_000: 1}[batch_frames]
    *moods, transcription = asked
    expected = [alone(model, load_audio(example.audio), example.prompt) for example in moods]
    assert len(set(expected)) > 2
    assert list(report.answers[:-1]) == expected
    wave = load_audio(transcription.audio)
    pieces = [alone(model, part, transcription.prompt) for part in (wave[:480_000], wave[480_000:])]
    assert report.answers[-1] == " ".join(pieces)  # a transcription is made window by window
    assert report.answers[-1] != expected[-1]


def test_unfinished_answers_are_counted(model: Any, asked: list[Example]) -> None:
    nano, processor = model
    assert evaluate(nano, processor, asked[:3], max_new_tokens=2).unfinished == 3
    ends = nano.generation_config.eos_token_id
    try:
        first = processor.tokenizer(alone(model, asked[0].waveform(), asked[0].prompt)[:1]).input_ids
        nano.generation_config.eos_token_id = [ends, *first]
        assert evaluate(nano, processor, asked[:1], max_new_tokens=2).unfinished == 0
    finally:
        nano.generation_config.eos_token_id = ends


def test_modes_and_gradients_are_left_as_they_were(model: Any, asked: list[Example]) -> None:
    nano, processor = model
    nano.train()
    nano.language_model.eval()
    modes = [module.training for module in nano.modules()]
    assert True in modes and False in modes
    evaluate(nano, processor, asked[:1], max_new_tokens=1)
    assert [module.training for module in nano.modules()] == modes
    inputs = processor(text="<|audio|>?", audio=[asked[0].waveform()], answers=["sad"])
    nano(**inputs).loss.backward()  # nothing that was cached meanwhile is in the way
    nano.zero_grad()
    nano.eval()


def test_batches() -> None:
    def piece(example: int, frames: int) -> Piece:
        return Piece(example, None, frames * FRAME_SAMPLES)

    pieces = [piece(number, frames) for number, frames in enumerate((10, 50, 9, 500, 50, 10))]
    grouped = [[piece.example for piece in batch] for batch in batches(pieces, 100)]
    assert grouped == [[3], [1, 4], [0, 5, 2]]
    with pytest.raises(ConfigError, match="batch_frames"):
        batches(pieces, 0)


def test_a_clip_that_is_gone_is_named(model: Any, asked: list[Example], tmp_path: Path) -> None:
    gone = Example(tmp_path / "gone.wav", "mood", "What?", "sad", 1, 16_000)
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        evaluate(*model, [*asked[:1], gone], max_new_tokens=1)


def test_a_processor_of_another_model_is_told_first(asked: list[Example], model: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a MoweProcessor and its model, got Tokenizer.*evaluation.score"):
        evaluate(model[0], type("Tokenizer", (), {})(), asked, RULES)
