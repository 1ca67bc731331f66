"""`mowe routes`: who listens to what, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from mowe.cli._inputs import load_model, read_clips
from mowe.cli._routing import draw, route, routing_table
from mowe.cli._screen import Screen, model_heading, printable

_BATCH = 8  # clips routed together


def run(files: Sequence[Path], folder: Path | None, picture: Path | None, screen: Screen) -> None:
    if picture is not None:
        from mowe.plots import check_picture

        check_picture(picture)
    clips = read_clips(files, screen)
    loaded = load_model(folder, screen)
    routes = []
    for first in screen.track(range(0, len(clips), _BATCH), "routing"):
        routes += route(loaded, clips[first : first + _BATCH])
    drawn = []
    if picture is not None:
        draw(loaded, routes, picture)
        drawn = [Text(), Text(printable(f"picture: {picture}"))]
    screen.result(
        {
            "device": loaded.device.type,
            "model": loaded.folder and str(loaded.folder),
            "trained": loaded.trained,
            "encoders": loaded.encoder_names,
            "clips": [asdict(window) for window in routes],
        },
        model_heading(folder),
        Text(),
        routing_table(loaded, routes),
        *drawn,
    )
