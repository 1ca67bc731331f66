"""By which metric a task is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mowe.errors import ConfigError
from mowe.evaluation.metrics import NORMALISATIONS, as_words, load_jiwer

if TYPE_CHECKING:
    from mowe.data import Example

TRANSCRIPTION = ("wer", "cer", "exact_match")
CLASSIFICATION = ("accuracy", "macro_f1", "exact_match")
KINDS = {
    "wer": TRANSCRIPTION,
    "cer": TRANSCRIPTION,
    "accuracy": CLASSIFICATION,
    "macro_f1": CLASSIFICATION,
    "exact_match": ("exact_match",),
}
"""The metrics there are, and what is reported where one of them decides."""

ERROR_RATES = ("wer", "cer")
"""Metrics of which less is better."""

_MANY_WORDS = 2  # an answer of more words on average is a sentence


@dataclass(frozen=True)
class Rule:
    """metric: the one that decides, of KINDS. normalisation: of answers and references first, of NORMALISATIONS."""

    metric: str
    normalisation: str = "words"

    def __post_init__(self) -> None:
        for name, known in (("metric", KINDS), ("normalisation", NORMALISATIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def transcribes(self) -> bool:
        return self.metric in ERROR_RATES

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`wer`, or `wer/english` with the normalisation."""
        return cls(*text.split("/", 1))


TASKS = {
    "asr": Rule("wer"),
    "accent": Rule("accuracy"),
    "emotion": Rule("accuracy"),
    "gender": Rule("accuracy"),
    "language": Rule("accuracy"),
    "sound": Rule("exact_match"),
    "speaker": Rule("accuracy"),
    "voice": Rule("accuracy"),
}
"""Tasks whose metric follows from their name."""


def rules_for(examples: Sequence[Example], chosen: Mapping[str, Rule] | None = None) -> dict[str, Rule]:
    """The rule of each task of the examples: as chosen, else that of TASKS, else inferred.

    Raises ConfigError where there are no examples, for a choice of a task that does not occur, and for a task whose
    right answers come to nothing by its rule.
    """
    if not examples:
        raise ConfigError("there are no examples to evaluate")
    answers: dict[str, list[str]] = {}
    for example in examples:
        answers.setdefault(example.task, []).append(example.answer)
    chosen = chosen or {}
    for task in chosen:
        if task not in answers:
            raise ConfigError(f"no example has the task {task!r}; there are {', '.join(sorted(answers))}")
    rules = {task: chosen.get(task) or TASKS.get(task) or inferred(of_task) for task, of_task in answers.items()}
    for task, rule in rules.items():
        if not any(map(NORMALISATIONS[rule.normalisation], answers[task])):
            raise ConfigError(f"task {task!r}: normalised by {rule.normalisation!r} its answers hold nothing")
        if rule.transcribes:
            load_jiwer()
    return rules


def inferred(answers: Sequence[str]) -> Rule:
    """The rule for a task of which only the right answers are known.

    Answers that come back (each twice or more on average) are labels: accuracy. Of the others, sentences (more than
    two words on average) are judged by their word error rate, and the rest by exact match.
    """
    normalised = Counter(as_words(answer) for answer in answers)
    if len(answers) >= 2 * len(normalised):
        return Rule("accuracy")
    words = sum(len(answer.split()) * times for answer, times in normalised.items())
    return Rule("wer" if words > _MANY_WORDS * len(answers) else "exact_match")
