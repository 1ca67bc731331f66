"""The lab's clips: the same again from the same seed, and nothing of the test in training."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest

from recipes.nano import sounds
from recipes.nano.language_model import scene
from recipes.nano.speech import MEN, WHISPERS, WOMEN
from recipes.nano.texts import SENTENCES, SPLITS, TEST, TRAIN, command, sentence

CLIPS = json.loads((Path(__file__).parents[2] / "mowe" / "assets" / "clips" / "clips.json").read_text(encoding="utf-8"))


def test_no_phrase_is_in_two_splits() -> None:
    phrases = {split: {command(Random(f"{split} {i}"), split) for i in range(3000)} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not phrases[one] & phrases[other]
    words = {split: {word for phrase in found for word in phrase.split()} for split, found in phrases.items()}
    assert words[TEST] <= words[TRAIN]  # new phrases of known words


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_of_the_test_are_made_of_unheard_parts(language: str) -> None:
    heard = {split: {sentence(language, Random(f"{split} {i}"), split) for i in range(400)} for split in SPLITS}
    assert not heard[TRAIN] & heard["validation"]
    for options in SENTENCES[language]:
        for part in options[len(options) * 3 // 4 :]:
            assert not any(part in text for text in heard[TRAIN]), part


def test_bundled_clips_are_never_trained_on() -> None:
    said = {"".join(c for c in clip["text"].lower() if c.isalpha() or c == " ") for clip in CLIPS if clip["text"]}
    assert not said & {command(Random(i), TRAIN) for i in range(20_000)}
    bundled = {"m1", "m3", "m7", "f1", "f3", "f4", "f5"}
    for voices in (MEN, WOMEN, WHISPERS):
        assert not bundled & {*voices[TRAIN], *voices["validation"]}
        assert not {*voices[TEST]} & {*voices[TRAIN]}


@pytest.mark.parametrize("name", [*sounds.EVENTS, *sounds.BACKGROUNDS])
def test_a_sound_is_finite_loud_and_the_same_again(name: str) -> None:
    make = {**sounds.EVENTS, **sounds.BACKGROUNDS}[name]
    waves = [make(np.random.default_rng(seed), 20_000) for seed in (1, 1, 2)]
    assert waves[0].shape == (20_000,) and np.isfinite(waves[0]).all()
    assert np.abs(waves[0]).max() == pytest.approx(1)
    np.testing.assert_array_equal(waves[0], waves[1])
    assert not np.array_equal(waves[0], waves[2])


def test_noise_is_mixed_at_its_level() -> None:
    draw = np.random.default_rng(0)
    wave, noise = draw.standard_normal((2, 50_000))
    added = sounds.mix(wave, 7 * noise, 20) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(20, abs=0.01)


def test_scenes_answer_from_what_they_tell() -> None:
    for i in range(200):
        told, task, answer = scene(Random(i))
        text = "".join(told)
        if task == "asr":
            assert answer.replace(" ", "") in text
        elif task != "sound":
            assert answer.split()[-1] in text
