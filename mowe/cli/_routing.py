"""Who was chosen for every window of audio, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from mowe.audio import SAMPLING_RATE
from mowe.cli._inputs import Clip, LoadedModel, model_name
from mowe.cli._screen import printable

_NAME = 20  # characters of a file's name that stay together
_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(frozen=True)
class WindowRoute:
    """One window of a clip: where it starts and how long it is in seconds, the chosen encoders and their weights."""

    file: str
    start: float
    seconds: float
    encoders: list[int]
    weights: list[float]

    @property
    def label(self) -> str:
        return self.file if not self.start else f"{self.file} +{self.start:g} s"


@torch.inference_mode()
def route(loaded: LoadedModel, clips: Sequence[Clip]) -> list[WindowRoute]:
    """What the routers choose for every window of the clips, in order."""
    extractor = loaded.processor.feature_extractor
    inputs = extractor([clip.wave for clip in clips])
    mixture: Any = loaded.model.get_audio_features(
        inputs["input_features"].to(loaded.device), inputs["input_features_mask"].to(loaded.device)
    ).mixture
    choices = iter(zip(mixture.indices.tolist(), mixture.weights.tolist(), strict=True))
    routes = []
    for clip, windows in zip(clips, inputs["num_windows"], strict=True):
        for window in range(windows):
            start = window * extractor.window_samples / SAMPLING_RATE
            seconds = round(min(clip.seconds - start, extractor.window_samples / SAMPLING_RATE), 3)
            encoders, weights = next(choices)
            routes.append(WindowRoute(clip.file, start, seconds, encoders, [round(weight, 6) for weight in weights]))
    return routes


def routing_table(loaded: LoadedModel, routes: Sequence[WindowRoute], answers: Sequence[Text] | None = None) -> Table:
    """A row a window: the choice of each slot with its weight and, if given, the answer."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    longest = max(len(window.label) for window in routes)
    # Not by a min_width, which makes rich's tables wider than the screen by a column, that is then cut off.
    table.add_column("clip", overflow="fold", no_wrap=longest <= _NAME)
    table.add_column("sec", justify="right", no_wrap=True)
    for heading in slot_names(loaded.model.config):
        table.add_column(heading, no_wrap=True)
    if answers is not None:
        table.add_column("answer", overflow="fold")
    names = loaded.encoder_names
    for row, window in enumerate(routes):
        chosen = zip(window.encoders, window.weights, strict=True)
        cells = [_choice(names, encoder, weight) for encoder, weight in chosen]
        answer = [] if answers is None else [answers[row]]
        table.add_row(Text(printable(window.label)), f"{window.seconds:.2f}", *cells, *answer)
    return table


def draw(loaded: LoadedModel, routes: Sequence[WindowRoute], path: Path) -> None:
    """The picture of the routing."""
    from mowe.plots import Route, routing_picture

    routing_picture(
        path,
        [Route(printable(window.label), window.encoders, window.weights) for window in routes],
        loaded.encoder_names,
        loaded.model.config.num_independent_slots,
        subtitle=f"{model_name(loaded.folder)}; the size of a bubble is the weight of the encoder",
    )


def slot_names(config: Any) -> list[str]:
    """A heading for each slot."""
    kinds = (("data-independent", config.num_independent_slots), ("data-dependent", config.num_dependent_slots))
    return [kind if slots == 1 else f"{kind} {i + 1}" for kind, slots in kinds for i in range(slots)]


def _choice(names: Sequence[str], encoder: int, weight: float) -> Text:
    width = max(map(len, names))
    return Text(f"{names[encoder]:<{width}} {weight:.2f}", style=_COLORS[encoder % len(_COLORS)])
