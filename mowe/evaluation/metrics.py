"""How right answers are: error rates, accuracy, macro-F1 and exact match, each with an interval. Texts in, no torch."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from mowe.errors import ConfigError

RESAMPLES = 1000
_WILSON = 1.959964  # standard deviations to either side of the middle that hold 95 % of a normal distribution


def as_words(text: str) -> str:
    """Lower case, without punctuation: letters, combining marks and digits of any script, and apostrophes in words.

    (Whisper's basic normaliser takes combining marks for symbols, and so tears words of Hindi or Tamil apart.)
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = folded.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = "".join(char if char == "'" or unicodedata.category(char)[0] in "LMN" else " " for char in folded)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", kept).split())


def as_english(text: str) -> str:
    """Whisper's English form: contractions and titles spelled out, numbers as digits, no fillers. Spelling stays.

    Typographic apostrophes (U+2019, U+02BC) are plain ones, which Whisper's normaliser leaves to its caller.
    """
    plain = re.sub("[\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}]", "'", text)
    return " ".join(_whisper_english()(plain).split())


def as_written(text: str) -> str:
    """The text itself, white space aside."""
    return " ".join(text.split())


NORMALISATIONS: dict[str, Callable[[str], str]] = {"words": as_words, "english": as_english, "none": as_written}


class Statistic(Protocol):
    """A metric over some of the examples."""

    def __call__(self, rows: np.ndarray) -> float:
        """rows: int [n], examples, some of them more than once."""


@dataclass(frozen=True)
class Rate:
    """A sum over a sum: errors over units of reference, or hits over examples. Both [examples]."""

    parts: np.ndarray
    wholes: np.ndarray

    def __call__(self, rows: np.ndarray) -> float:
        return float(self.parts[rows].sum() / max(self.wholes[rows].sum(), 1))


@dataclass(frozen=True)
class MacroF1:
    """The mean over classes of the harmonic mean of precision and recall.

    references, predictions: int [examples], classes; -1 predicts none. The classes averaged over are those among the
    references: a wrong answer counts against the class it missed and the one it names, and adds none of its own.
    """

    references: np.ndarray
    predictions: np.ndarray

    def __call__(self, rows: np.ndarray) -> float:
        references, predictions = self.references[rows], self.predictions[rows]
        count = int(max(self.references.max(), self.predictions.max())) + 1
        right = np.bincount(references[references == predictions], minlength=count)
        wanted = np.bincount(references, minlength=count)
        named = np.bincount(predictions[predictions >= 0], minlength=count)
        present = wanted > 0
        return float(np.mean(2 * right[present] / (wanted + named)[present]))


def error_rate(references: Sequence[str], answers: Sequence[str], characters: bool = False) -> Rate:
    """Word or character error rate: substitutions, deletions and insertions over the reference's units, by jiwer."""
    jiwer = load_jiwer()
    process = jiwer.process_characters if characters else jiwer.process_words
    counted = [process([reference], [answer]) for reference, answer in zip(references, answers, strict=True)]
    errors = [found.substitutions + found.deletions + found.insertions for found in counted]
    return Rate(np.array(errors), np.array([found.hits + found.substitutions + found.deletions for found in counted]))


def share(right: Sequence[bool]) -> Rate:
    """The share of examples that are right."""
    return Rate(np.array(right, dtype=np.int64), np.ones(len(right), dtype=np.int64))


def named_label(answer: str, labels: Sequence[str]) -> int:
    """The index of the one label that an answer names, -1 where it names none or several.

    answer, labels: normalised alike. The answer is the label, or has it in it as whole words; a label within a longer
    one that is there too ("english" in "british english") does not count.
    """
    if answer in labels:
        return labels.index(answer)
    text = f" {answer} "
    there = [label for label in labels if f" {label} " in text]
    longest = [label for label in there if not any(label != other and f" {label} " in f" {other} " for other in there)]
    return labels.index(longest[0]) if len(longest) == 1 else -1


def resampled(statistic: Statistic, examples: int, generator: np.random.Generator) -> np.ndarray:
    """[RESAMPLES] values of a statistic on as many examples drawn with replacement: the bootstrap."""
    return np.array([statistic(generator.integers(examples, size=examples)) for _ in range(RESAMPLES)])


def wilson(value: float, examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which does not shrink to nothing where all examples are right, or none."""
    spread = _WILSON**2 / examples
    middle = value + spread / 2
    width = (value * (1 - value) * spread + spread**2 / 4) ** 0.5
    low, high = (middle - width) / (1 + spread), (middle + width) / (1 + spread)
    return min(max(low, 0.0), value), max(min(high, 1.0), value)  # rounding aside, they hold the value already


def load_jiwer() -> Any:
    """The package jiwer. Raises ConfigError where it is missing."""
    try:
        import jiwer
    except ImportError:
        raise ConfigError("error rates need the package jiwer: pip install jiwer") from None
    return jiwer


@cache
def _whisper_english() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})  # with the spellings of a checkpoint it would make British English American
