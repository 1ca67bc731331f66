"""Where a command speaks: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from mowe.errors import ConfigError

T = TypeVar("T")

_SHOWN_LINES = 5  # of those left out


class Screen:
    """as_json: results go out as one JSON object and nothing else, null for nan, and progress is off."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        # Names of tasks and files may hold what would be markup.
        self._out = Console(highlight=False, markup=False, emoji=False)
        self._err = Console(highlight=False, markup=False, emoji=False, stderr=True)
        self._quiet = as_json or not self._err.is_terminal

    def result(self, data: dict[str, Any], *renderables: RenderableType) -> None:
        """Print the data as JSON, or else its readable form. Raises ConfigError where stdout cannot be written to."""
        try:
            if self.as_json:
                print(json.dumps(_finite(data), indent=2, allow_nan=False), flush=True)
            else:
                for renderable in renderables:
                    self._out.print(renderable, soft_wrap=isinstance(renderable, Text))
        except BrokenPipeError:  # the reader has seen enough
            raise
        except OSError as error:
            raise ConfigError(f"stdout: the result cannot be written ({error.strerror})") from None

    def note(self, text: str) -> None:
        """One line the user should know, beside the result."""
        self._err.print(Text(f"note: {printable(text)}", style="yellow"), soft_wrap=True)

    def left_out(self, lines: Sequence[str]) -> None:
        """What was wrong with lines of manifests that were left out: the first few, and how many there are."""
        for told in lines[:_SHOWN_LINES]:
            self.note(f"left out: {told}")
        if lines:
            self.note(f"lines of manifests left out: {len(lines)}")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that something of unknown length is going on."""
        if self._quiet:
            yield
        else:
            with self._err.status(Text(text)):
                yield

    def track(self, items: Iterable[T], text: str) -> Iterator[T]:
        """Show a progress bar over the items, which have a length."""
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=self._err, transient=True, disable=self._quiet) as progress:
            yield from progress.track(items, description=text)

    def counter(self, text: str, total: int) -> Counter:
        """Show how far something is that tells of itself now and then."""
        return Counter(self, text, total)


class Counter:
    """A bar on a terminal, a line each time elsewhere, nothing where the result is JSON."""

    def __init__(self, screen: Screen, text: str, total: int):
        self._screen, self._text, self._total = screen, text, total
        name, told = (TextColumn(of, markup=False) for of in ("{task.description}", "{task.fields[told]}"))
        self._bar = Progress(name, BarColumn(), MofNCompleteColumn(), told, console=screen._err, disable=screen._quiet)
        self._task = self._bar.add_task(text, total=total, told="")
        self._bar.start()

    def update(self, done: int, told: str = "") -> None:
        """told: news; without any, only the count goes on."""
        self._bar.update(self._task, completed=done)
        if told:
            self._bar.update(self._task, told=told)
        if told and self._screen._quiet and not self._screen.as_json:
            self._screen._err.print(f"{self._text} {done}/{self._total}  {printable(told)}", soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


def model_heading(folder: Path | None) -> Text:
    """Which model gave a result; of the demo model also how right it is."""
    if folder is not None:
        return Text(printable(f"model {folder}"), style="bold")
    from mowe.nano import nano_scores

    scores = ", ".join(f"{task} {_percent(of)}" for task, of in nano_scores().items())
    return Text.assemble(("the demo model", "bold"), f", trained on made clips; on those of its test split: {scores}")


def _percent(score: dict[str, Any]) -> str:
    kind = "wrong words" if score["metric"] == "wer" else "right"
    return f"{100 * score['value']:.0f} % {kind}"


def _finite(data: Any) -> Any:
    """The data with None for the numbers that JSON does not know."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def printable(text: str) -> str:
    """The text on one line, with nothing in it that could steer a terminal."""
    return "".join(
        char if char.isprintable() else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}" for char in text
    )
