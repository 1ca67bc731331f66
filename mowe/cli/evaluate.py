"""`mowe evaluate`: how right a model's answers are, task by task."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mowe.cli._inputs import load_model, model_name
from mowe.cli._screen import Screen, model_heading, printable
from mowe.data import Example, read_manifest
from mowe.errors import ConfigError, naming
from mowe.evaluation import Report, Rule, Score, evaluate
from mowe.evaluation.audiobench import write_predictions
from mowe.evaluation.pictures import METRIC_NAMES, report_picture
from mowe.evaluation.tasks import rules_for
from mowe.files import check_file, check_folder, make_folder, write_text

_REPORT, _PREDICTIONS = "report.json", "predictions.jsonl"

Asked = tuple[Path, Example]
"""An example and the manifest it is from."""


@dataclass(frozen=True)
class Outputs:
    """Where results go beside the screen, None: nowhere. predictions: a JSONL file. folder: report, predictions and
    picture. audiobench: a folder for AudioBench's files.
    """

    predictions: Path | None
    folder: Path | None
    audiobench: Path | None

    def check(self, manifests: Sequence[Path]) -> None:
        """Raise ConfigError for what cannot be written, before anything is computed."""
        reports = [] if self.folder is None else [self.folder / name for name in (_REPORT, _PREDICTIONS)]
        for file in filter(None, (self.predictions, *reports)):
            if any(file.exists() and path.exists() and file.samefile(path) for path in manifests):
                raise ConfigError(f"{file}: is one of the manifests, which would be overwritten; choose another place")
        if self.predictions is not None:
            check_file(self.predictions, "the predictions")
        if self.folder is not None:
            check_folder(self.folder, "--out")
        if self.audiobench is not None:
            check_folder(self.audiobench, "--audiobench")
            names = [path.stem for path in manifests]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ConfigError(f"--audiobench: more than one manifest is called {', '.join(twice)}")


def run(
    paths: Sequence[Path],
    folder: Path | None,
    tasks: str | None,
    metrics: Sequence[str],
    batch_frames: int,
    max_new_tokens: int,
    outputs: Outputs,
    skip_bad: bool,
    load_in_4bit: bool,
    screen: Screen,
) -> None:
    outputs.check(paths)
    chosen = _rules(metrics)
    with _warnings_as_notes(screen):
        manifests = [
            read_manifest(path, skip_bad=skip_bad, decode=True, track=_reading(path, screen)) for path in paths
        ]
    asked = [(manifest.path, example) for manifest in manifests for example in manifest]
    if tasks is not None:
        asked = _of_tasks(asked, [task.strip() for task in tasks.split(",")])
    examples = [example for _, example in asked]
    rules_for(examples, chosen)
    parts: Sequence[str] = ()
    if load_in_4bit:
        from mowe.quantization import DEFAULT_PARTS as parts
    loaded = load_model(folder, screen, parts)
    for manifest in manifests:
        manifest.check_prompts(loaded.processor.audio_token)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clips, told when the manifests were read
        report = evaluate(
            loaded.model,
            loaded.processor,
            examples,
            chosen,
            batch_frames=batch_frames,
            max_new_tokens=max_new_tokens,
            track=lambda batches: screen.track(batches, "answering"),
        )
    skipped = [f"{manifest.path}: {told}" for manifest in manifests for told in manifest.skipped]
    screen.left_out(skipped)
    if report.unfinished:
        screen.note(f"{report.unfinished} answers were cut at {max_new_tokens} tokens (--max-new-tokens)")
    data = {
        "device": loaded.device.type,
        "model": loaded.folder and str(loaded.folder),
        "trained": loaded.trained,
        "load_in_4bit": load_in_4bit,
        "manifests": [str(path) for path in paths],
        "skipped": len(skipped),
        **report.as_data(),
    }
    with screen.step("writing"):
        written = _write(outputs, data, report, asked, model_name(folder))
    screen.result(
        data,
        model_heading(folder),
        Text(),
        _table(report),
        Text("of WER and CER less is better; the score is the mean over tasks, an error rate taken from 100 %"),
        *(Text(printable(f"written: {path}")) for path in written),
    )


def _rules(texts: Sequence[str]) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for text in texts:
        task, rule = _rule(text)
        if task in rules:
            raise ConfigError(f"--metric {text}: {task} has a metric already, one decides")
        rules[task] = rule
    return rules


def _rule(text: str) -> tuple[str, Rule]:
    task, equals, rule = text.partition("=")
    with naming(f"--metric {text}"):
        if not (task and equals):
            raise ConfigError("expected TASK=METRIC or TASK=METRIC/NORMALISATION")
        return task, Rule.parse(rule)


def _reading(path: Path, screen: Screen) -> Any:
    return lambda clips: screen.track(clips, f"reading {printable(path.name)}")


def _of_tasks(asked: Sequence[Asked], tasks: Sequence[str]) -> list[Asked]:
    there = {example.task for _, example in asked}
    for task in tasks:
        if task not in there:
            raise ConfigError(f"--tasks: no example has the task {task!r}; there are {', '.join(sorted(there))}")
    return [(path, example) for path, example in asked if example.task in tasks]


@contextmanager
def _warnings_as_notes(screen: Screen) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        screen.note(str(warning.message))


def _write(outputs: Outputs, data: dict[str, Any], report: Report, asked: Sequence[Asked], model: str) -> list[Path]:
    """Write what was asked for; returns the files."""
    said = [(path, example, answer) for (path, example), answer in zip(asked, report.answers, strict=True)]
    lines = [
        {
            "manifest": str(path),
            "line": example.line,
            "audio": str(example.audio) if isinstance(example.audio, Path) else None,
            "task": example.task,
            "prompt": example.prompt,
            "answer": example.answer,
            "prediction": answer,
        }
        for path, example, answer in said
    ]
    predictions = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    written = []
    if outputs.folder is not None:
        out = make_folder(outputs.folder, "--out")
        written = [out / _REPORT, out / _PREDICTIONS, out / "report.png"]
        write_text(written[0], json.dumps(data, indent=2) + "\n", "the report")
        write_text(written[1], predictions, "the predictions")
        report_picture(written[2], report, subtitle=printable(f"{model}, {len(asked)} examples, 95 % intervals"))
    if outputs.predictions is not None:
        write_text(outputs.predictions, predictions, "the predictions")
        written.append(outputs.predictions)
    if outputs.audiobench is not None:
        out = make_folder(outputs.audiobench, "--audiobench")
        for manifest in dict.fromkeys(path for path, _ in asked):
            pairs = [(example, answer) for path, example, answer in said if path == manifest]
            written.append(write_predictions(out, manifest.stem, pairs))
    return written


def _table(report: Report) -> Table:
    """A row a task by the metric that decides, with the others beside it; the means over tasks below."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("clips", justify="right", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("also")
    for name, task in report.tasks.items():
        table.add_row(*_row(name, task.examples, task.rule.metric, task.scores))
    table.add_section()
    table.add_row(*_row("all tasks", len(report.answers), "score", report.overall))
    return table


def _row(name: str, clips: int, metric: str, scores: Mapping[str, Score]) -> list[Text]:
    score = scores[metric]
    others = (f"{METRIC_NAMES[other]} {value.value:.1%}" for other, value in scores.items() if other != metric)
    return [
        Text(printable(name)),
        Text(str(clips)),
        Text(METRIC_NAMES[metric]),
        Text(f"{score.value:.1%}", style="bold"),
        Text(f"{score.low:.1%} to {score.high:.1%}"),
        Text(", ".join(others), style="dim"),
    ]
