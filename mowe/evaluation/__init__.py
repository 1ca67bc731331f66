"""How good a model's answers are: `evaluate` makes and judges them, `score` judges those that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mowe.evaluation.report import Report, Score, TaskReport, score
from mowe.evaluation.tasks import Rule, rules_for

if TYPE_CHECKING:
    from mowe.data import Example

__all__ = ["BATCH_FRAMES", "NEW_TOKENS", "Report", "Rule", "Score", "TaskReport", "evaluate", "score"]

BATCH_FRAMES = 12_000
"""Frames of 20 ms that are answered together: eight clips of 30 s, or sixty of 4 s."""

NEW_TOKENS = 128
"""The longest answer."""


def evaluate(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    rules: Mapping[str, Rule] | None = None,
    *,
    batch_frames: int = BATCH_FRAMES,
    max_new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Report:
    """Ask a model about examples, the likeliest token at every step, and judge its answers.

    model, processor: as from_pretrained gives them; the model's parts are in the mode they were in afterwards. rules,
    seed: see `score`. batch_frames: frames of 20 ms in a batch, padding included; answers do not depend on it.
    max_new_tokens: the longest answer. track: wraps the batches, for a progress bar.
    Raises AudioError for a clip that cannot be read, ConfigError as `score` does and for a processor of another kind of
    model, before anything is asked.
    """
    from mowe.evaluation.generation import answer_examples

    chosen = rules_for(examples, rules)
    answers, unfinished = answer_examples(model, processor, examples, chosen, batch_frames, max_new_tokens, track)
    return score(examples, answers, chosen, seed, unfinished)
