"""Manifests: lists of clips, each with a task, a prompt and the answer that is right.

A JSONL file has an object a line: {"audio": path relative to the file's folder, "task": ..., "prompt": ...,
"answer": ...}; a folder written by `datasets.Dataset.save_to_disk` has the same as columns, the audio as paths or as an
Audio feature. Further keys are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mowe.audio import as_waveform, clip_samples, decode_audio
from mowe.errors import DataError, MoweError, naming

_TEXTS = ("task", "prompt", "answer")
_REQUIRED = ("audio", *_TEXTS)
_SHOWN = 5  # bad lines that an error spells out


@dataclass(frozen=True)
class StoredAudio:
    """A clip that a dataset holds itself. rows: the dataset. index: the row."""

    rows: Any
    index: int


@dataclass(frozen=True)
class Example:
    """One clip and what is asked about it.

    audio: the file, or where a dataset has the clip. line: in the manifest, from 1 (the row of a dataset). samples: at
    16 kHz. more: the further keys of the line.
    """

    audio: Path | StoredAudio
    task: str
    prompt: str
    answer: str
    line: int
    samples: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call the clip."""
        return self._source()[1]

    def waveform(self) -> Tensor:
        """[samples] float32 at 16 kHz. Raises AudioError for audio that cannot be read."""
        source, name = self._source()
        return as_waveform(decode_audio(source, name) if isinstance(source, bytes) else source, name=name)

    def count_samples(self) -> int:
        """`samples`, from the beginning and the end of the audio. Raises AudioError for what can be seen there."""
        return clip_samples(*self._source())

    def _source(self) -> tuple[str | bytes, str]:
        """A path, or the bytes of a file; and what to call it."""
        if isinstance(self.audio, Path):
            return str(self.audio), str(self.audio)
        stored = self.audio.rows[self.audio.index]["audio"]
        name = stored["path"] or f"row {self.line}"
        return (name if stored["bytes"] is None else stored["bytes"]), name


@dataclass(frozen=True)
class Manifest(Sequence[Example]):
    """The examples of a manifest, and what was wrong with the lines left out, as messages that begin with the line."""

    path: Path
    examples: tuple[Example, ...]
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def check_prompts(self, audio_token: str) -> None:
        """Raise DataError, naming the line, for a prompt that `check_prompt` refuses."""
        for example in self.examples:
            with naming(f"{self.path}: {_unit(self.path)} {example.line}"):
                check_prompt(example.prompt, audio_token)


def check_prompt(prompt: str, audio_token: str) -> None:
    """Raise DataError for a prompt with the token that stands for audio."""
    if audio_token in prompt:
        raise DataError(f"the audio is put before the prompt, leave {audio_token} out")


def read_manifest(
    path: str | os.PathLike[str],
    tasks: Collection[str] | None = None,
    skip_bad: bool = False,
    decode: bool = False,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Manifest:
    """Read a JSONL manifest or a folder of `datasets`, and look at the beginning and the end of every clip.

    tasks: the ones that may occur; any by default. skip_bad: leave out lines that cannot be used. decode: look at all
    of every clip, so that damage in the middle is found too. track: wraps the list of clips while they are looked at,
    for a progress bar.
    Raises DataError for a manifest that cannot be read, for bad lines (the first few and their number), and where no
    line is left.
    """
    path = Path(path)
    word, rows = _unit(path), _dataset_rows(path) if path.is_dir() else _json_lines(path)
    problems: dict[int, str] = {}
    found = []
    for line, row in rows:
        try:
            found.append(_as_example(row, line, path, tasks))
        except DataError as error:
            problems[line] = str(error)
    look = _decoded_samples if decode else Example.count_samples
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        jobs: list[tuple[Example, Future[int]]] = [(e, threads.submit(look, e)) for e in found]
        examples = []
        try:
            for example, job in track(jobs):
                try:
                    examples.append(replace(example, samples=job.result()))
                except MoweError as error:
                    problems[example.line] = str(error)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C waits for all clips there are
    told = [f"{word} {line}: {problems[line]}" for line in sorted(problems)]
    if told and not skip_bad:
        raise DataError(f"{path}: {len(told)} bad of {len(told) + len(examples)} {word}s: {_first_of(told)}")
    if not examples:
        raise DataError(f"{path}: no {word} that can be used" + (f": {_first_of(told)}" if told else ", it is empty"))
    return Manifest(path, tuple(examples), tuple(told))


def _unit(path: Path) -> str:
    """What an example is called in messages."""
    return "row" if path.is_dir() else "line"


def _decoded_samples(example: Example) -> int:
    return len(example.waveform())


def _first_of(problems: list[str]) -> str:
    rest = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and what stands there, an error for what is not JSON; empty lines are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8-sig"))  # Windows puts a mark before the first line
            except (ValueError, RecursionError) as error:
                yield number, DataError(f"not JSON in UTF-8 ({error})")


def _dataset_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: reading a folder needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files make pyarrow raise anything
        raise DataError(f"{path}: not a dataset that was saved to disk ({' '.join(str(error).split())})") from None
    if isinstance(rows, datasets.DatasetDict):
        raise DataError(
            f"{path}: holds the splits {', '.join(rows)}; name the folder of one, as {path / next(iter(rows))}"
        )
    missing = [name for name in _REQUIRED if name not in rows.column_names]
    if missing:
        raise DataError(f"{path}: no column {' and '.join(missing)}; there are {', '.join(rows.column_names)}")
    audio = rows.features["audio"]
    if not isinstance(audio, datasets.Audio):
        yield from enumerate(rows, start=1)
        return
    stored = rows.select_columns("audio").cast_column("audio", datasets.Audio(decode=False))
    for index, row in enumerate(rows.remove_columns("audio")):
        yield index + 1, {"audio": StoredAudio(stored, index), **row}


@contextmanager
def _whole_characters(name: str) -> Iterator[None]:
    """Make a DataError of an escape such as \\ud83d without its other half: JSON allows it, nothing can encode it."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half of a character, {error.object[error.start]!r}") from None


def _as_example(row: Any, line: int, manifest: Path, tasks: Collection[str] | None) -> Example:
    """Raises DataError, not naming the line, for a row that cannot be an example."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"expected an object, got {type(row).__name__}")
    missing = [name for name in _REQUIRED if name not in row]
    if missing:
        raise DataError(f"no {' and no '.join(missing)}; expected {', '.join(_REQUIRED)}")
    for name in _TEXTS:
        if not isinstance(row[name], str):
            raise DataError(f"{name} must be a text, got {row[name]!r}")
        with _whole_characters(name):
            row[name].encode()
    audio = row["audio"]
    if isinstance(audio, str) and audio:
        with _whole_characters("audio"):
            os.fsencode(audio)
        audio = (manifest if manifest.is_dir() else manifest.parent) / audio
    elif not isinstance(audio, StoredAudio):
        raise DataError(f"audio must be a path, got {audio!r}")
    if not row["answer"].strip():
        raise DataError("the answer is empty")
    if tasks is not None and row["task"] not in tasks:
        raise DataError(f"unknown task {row['task']!r}; known: {', '.join(sorted(tasks))}")
    more = {name: value for name, value in row.items() if name not in _REQUIRED}
    return Example(audio, row["task"], row["prompt"], row["answer"], line, more=more)
