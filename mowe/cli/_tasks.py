"""What 4 bits do to a model's answers, where the right ones are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mowe.cli._inputs import LoadedModel
from mowe.cli._screen import Screen, printable
from mowe.data import Manifest, read_manifest
from mowe.evaluation import Report, Score, evaluate
from mowe.evaluation.pictures import METRIC_NAMES

MOST_LOSS = 0.02
"""Of the score over all tasks; past it a result is warned of. Our choice."""


@dataclass(frozen=True)
class Change:
    """How right a model is before and after."""

    before: Report
    after: Report

    def warnings(self) -> list[str]:
        """What is past the threshold."""
        old, new = (report.overall["score"].value for report in (self.before, self.after))
        if old - new <= MOST_LOSS:
            return []
        return [f"the score over all tasks fell from {old:.1%} to {new:.1%}; keep more parts in full precision"]

    def as_data(self) -> dict[str, Any]:
        """The same for scripts."""
        return {"before": self.before.as_data(), "in_4bit": self.after.as_data()}

    def report(self) -> Table:
        """A row a task, by the metric that decides."""
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
        table.add_column("task", overflow="fold")
        for name in ("clips", "metric", "before", "in 4 bits"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, clips, metric, old, new in self._rows():
            table.add_row(Text(printable(name)), str(clips), metric, f"{old.value:.1%}", f"{new.value:.1%}")
        return table

    def _rows(self) -> Iterator[tuple[str, int, str, Score, Score]]:
        for name, task in self.before.tasks.items():
            yield name, task.examples, METRIC_NAMES[task.rule.metric], task.score, self.after.tasks[name].score
        overall = self.before.overall["score"], self.after.overall["score"]
        yield "all tasks", len(self.before.answers), "score", *overall


def read(paths: Sequence[Path], screen: Screen) -> list[Manifest]:
    """Raises MoweError for lines that cannot be used."""
    return [
        read_manifest(path, decode=True, track=lambda clips: screen.track(clips, "reading manifests")) for path in paths
    ]


def answered(loaded: LoadedModel, manifests: Sequence[Manifest], max_new_tokens: int, screen: Screen) -> Report:
    """How right the model is. Raises DataError for prompts that it cannot be given."""
    for manifest in manifests:
        manifest.check_prompts(loaded.processor.audio_token)
    return evaluate(
        loaded.model,
        loaded.processor,
        [example for manifest in manifests for example in manifest],
        max_new_tokens=max_new_tokens,
        track=lambda batches: screen.track(batches, "answering"),
    )
