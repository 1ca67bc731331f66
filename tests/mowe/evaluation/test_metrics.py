"""Metrics against numbers worked out by hand, and intervals against what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mowe.evaluation import metrics

ALL = np.arange(100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello,  WORLD!", "hello world"),
        ("Don't 'quote' it; it\N{RIGHT SINGLE QUOTATION MARK}s five-fold.", "don't quote it it's five fold"),
        ("Straße \N{FULLWIDTH DIGIT THREE}", "strasse 3"),
        ("यह भारी मशीन है।", "यह भारी मशीन है"),  # combining marks stay
        ("你好、世界", "你好 世界"),
        ("?!", ""),
    ],
)
def test_as_words(text: str, words: str) -> None:
    assert metrics.as_words(text) == words
    assert metrics.as_words(words) == words


def test_other_normalisations() -> None:
    assert metrics.as_english("Um, I don't have twenty-five, Mr. Smith.") == "i do not have 25 mister smith"
    for apostrophe in ("\N{RIGHT SINGLE QUOTATION MARK}", "\N{MODIFIER LETTER APOSTROPHE}"):
        assert metrics.as_english(f"I don{apostrophe}t, he{apostrophe}ll") == "i do not he will"
    assert metrics.as_written("  Ab,\n c ") == "Ab, c"


def test_error_rates() -> None:
    references, answers = ["a b c", "d e", "f"], ["a x c y", "", "f"]
    words = metrics.error_rate(references, answers)
    assert words.parts.tolist() == [2, 2, 0] and words.wholes.tolist() == [3, 2, 1]
    assert words(ALL[:3]) == pytest.approx(4 / 6)  # over all words, not the mean of the clips' rates
    assert words(np.array([2, 2, 0])) == pytest.approx(2 / 5)
    characters = metrics.error_rate(["猫が好き"], ["猫は好"], characters=True)
    assert characters(ALL[:1]) == pytest.approx(2 / 4)
    assert metrics.error_rate(["a"], ["b c d"])(ALL[:1]) == 3.0


def test_macro_f1() -> None:
    # cat: 1 of 2 found, named once; dog: 2 of 2 found, named 3 times; rat: never found; one answer names none
    references = np.array([0, 0, 1, 1, 2])
    predictions = np.array([0, 1, 1, 1, -1])
    f1 = metrics.MacroF1(references, predictions)
    assert f1(ALL[:5]) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert f1(ALL[:2]) == pytest.approx(2 / 3)  # one class is there
    assert metrics.MacroF1(references, references)(ALL[:5]) == 1.0


def test_named_label() -> None:
    labels = ("angry", "british english", "english", "sad")
    for answer, expected in {
        "angry": 0,
        "the speaker is angry": 0,
        "it is british english": 1,
        "english": 2,
        "english perhaps british english": 1,
        "angrily": -1,
        "angry or sad": -1,
        "": -1,
    }.items():
        assert metrics.named_label(answer, labels) == expected, answer


def test_wilson() -> None:
    low, high = metrics.wilson(1.0, 20)
    assert high == pytest.approx(1.0) and low == pytest.approx(0.8389, abs=1e-4)
    low, high = metrics.wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_the_bootstrap_holds_the_truth_as_often_as_it_says() -> None:
    """A rate of 0.3 per word, seen in samples of 60 clips: its 95 % interval holds 0.3 about 19 times in 20."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        words = generator.integers(3, 9, size=60)
        rate = metrics.Rate(generator.binomial(words, 0.3), words)
        low, high = np.percentile(metrics.resampled(rate, 60, generator), (2.5, 97.5))
        assert low < rate(ALL[:60]) < high
        held += low < 0.3 < high
    assert 51 <= held <= 60


def test_the_bootstrap_is_seeded() -> None:
    rate = metrics.share([True] * 7 + [False] * 5)
    first, again, other = (metrics.resampled(rate, 12, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_judging_imports_no_torch() -> None:
    code = "import sys, mowe.evaluation; print(*{'torch', 'transformers', 'matplotlib', 'jiwer'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
