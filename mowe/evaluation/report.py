"""From answers to a report: every metric of every task, and the mean over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mowe.errors import ConfigError
from mowe.evaluation import metrics
from mowe.evaluation.tasks import CLASSIFICATION, ERROR_RATES, KINDS, Rule, rules_for

if TYPE_CHECKING:
    from mowe.data import Example

_SHARES = ("accuracy", "exact_match")
_MIDDLE_95 = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Score:
    """A metric, and the 95 % interval in which it would come out on other examples of the same kind."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskReport:
    """What became of one task.

    scores: by metric. labels: of a task of labels, normalised. confusion: [labels][labels + 1], how often each label
    (row) was answered by each label; the last column is for answers that name none of them, or several.
    """

    rule: Rule
    examples: int
    scores: dict[str, Score]
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()

    @property
    def score(self) -> Score:
        """That of the metric that decides."""
        return self.scores[self.rule.metric]


@dataclass(frozen=True)
class Report:
    """tasks: by name. overall: of each metric the mean over the tasks that have it, and `score`, the mean over all
    tasks of the metric that decides (of an error rate what it leaves of 1, at least 0). answers: one an example, in
    their order. unfinished: answers that were cut short.
    """

    tasks: dict[str, TaskReport]
    overall: dict[str, Score]
    answers: tuple[str, ...]
    unfinished: int = 0

    def as_data(self) -> dict[str, Any]:
        """The report without the answers, for JSON."""
        tasks = {}
        for name, task in self.tasks.items():
            data = {"examples": task.examples, **asdict(task.rule), "scores": _as_data(task.scores)}
            if task.labels:
                data |= {"labels": list(task.labels), "confusion": [list(row) for row in task.confusion]}
            tasks[name] = data
        return {
            "tasks": tasks,
            "overall": {"examples": len(self.answers), "scores": _as_data(self.overall)},
            "unfinished": self.unfinished,
        }


def score(
    examples: Sequence[Example],
    answers: Sequence[str],
    rules: Mapping[str, Rule] | None = None,
    seed: int = 0,
    unfinished: int = 0,
) -> Report:
    """Judge the answers to examples.

    rules: of tasks whose metric shall not be the one of `mowe.evaluation.tasks`. seed: of the bootstrap behind the
    intervals; a result depends on it, the examples and the answers alone. unfinished: see Report.
    Raises ConfigError where there are no examples, not as many answers, or a rule for a task that does not occur.
    """
    if len(examples) != len(answers):
        raise ConfigError(f"expected an answer to each example, got {len(answers)} to {len(examples)}")
    reports, draws = {}, {}
    for number, (task, rule) in enumerate(sorted(rules_for(examples, rules).items())):
        pairs = [(e.answer, answer) for e, answer in zip(examples, answers, strict=True) if e.task == task]
        statistics, labels = _statistics(rule, pairs)
        # A generator of its own for each: tasks of the same size are drawn independently.
        draws[task] = {
            name: metrics.resampled(statistic, len(pairs), np.random.default_rng((seed, number)))
            for name, statistic in statistics.items()
        }
        scores = {name: _score(name, of, draws[task][name], len(pairs)) for name, of in statistics.items()}
        reports[task] = TaskReport(rule, len(pairs), scores, labels, _confusion(statistics, labels))
    return Report(reports, _overall(reports, draws), tuple(answers), unfinished)


def _statistics(rule: Rule, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, metrics.Statistic], tuple[str, ...]]:
    """The metrics that are reported for a task, and its labels. pairs: right answer and the one given."""
    normalise = metrics.NORMALISATIONS[rule.normalisation]
    wanted, said = ([normalise(text) for text in texts] for texts in zip(*pairs, strict=True))
    found: dict[str, metrics.Statistic] = {}
    labels: tuple[str, ...] = ()
    if KINDS[rule.metric] is CLASSIFICATION:
        labels = tuple(sorted(set(wanted)))
        classes = np.array([labels.index(text) for text in wanted])
        named = np.array([metrics.named_label(text, labels) for text in said])
        found |= {"accuracy": metrics.share(classes == named), "macro_f1": metrics.MacroF1(classes, named)}
    elif rule.transcribes:
        found |= {name: metrics.error_rate(wanted, said, characters=name == "cer") for name in ERROR_RATES}
    found["exact_match"] = metrics.share([a == b for a, b in zip(wanted, said, strict=True)])
    return found, labels


def _score(name: str, statistic: metrics.Statistic, draws: np.ndarray, examples: int) -> Score:
    value = statistic(np.arange(examples))
    interval = metrics.wilson(value, examples) if name in _SHARES else np.percentile(draws, _MIDDLE_95).tolist()
    return Score(value, *interval)


def _confusion(statistics: Mapping[str, Any], labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    if not labels:
        return ()
    classes = statistics["macro_f1"]
    counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    np.add.at(counts, (classes.references, classes.predictions), 1)  # -1, none, is the last column
    return tuple(map(tuple, counts.tolist()))


def _overall(reports: Mapping[str, TaskReport], draws: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Score]:
    """Means over tasks, with the bootstrap's intervals."""

    def mean(parts: list[tuple[float, np.ndarray]]) -> Score:
        interval = np.percentile(np.mean([drawn for _, drawn in parts], axis=0), _MIDDLE_95).tolist()
        return Score(float(np.mean([value for value, _ in parts])), *interval)

    def worth(task: str, report: TaskReport) -> tuple[float, np.ndarray]:
        value, drawn = report.score.value, draws[task][report.rule.metric]
        return (max(1 - value, 0.0), np.maximum(1 - drawn, 0)) if report.rule.transcribes else (value, drawn)

    names = dict.fromkeys(name for kind in KINDS.values() for name in kind)
    by_metric = {
        name: [(r.scores[name].value, draws[task][name]) for task, r in reports.items() if name in r.scores]
        for name in names
    }
    found = {"score": mean([worth(task, report) for task, report in reports.items()])}
    return found | {name: mean(parts) for name, parts in by_metric.items() if parts}


def _as_data(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    return {name: {k: round(v, 6) for k, v in asdict(score).items()} for name, score in scores.items()}
