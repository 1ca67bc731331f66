"""Pictures, and the one of routing: which clip was heard by which encoders, and how much each one counts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mowe.errors import ConfigError
from mowe.files import check_file, whole_file

INK, QUIET, LINE, GREEN, RED = "#1f2933", "#6b7785", "#e4e7eb", "#2a9d8f", "#e76f51"
"""The colours of all pictures."""

_FORMATS = (".png", ".svg", ".pdf", ".jpg", ".webp")
_KINDS = {"same for every clip": GREEN, "chosen by the sound": RED}  # data-independent, data-dependent
_COLORS = tuple(_KINDS.values())
_ROW, _COLUMN, _MARGIN = 0.42, 1.45, 0.35  # inches
_HEADER, _FOOTER = 1.4, 1.15  # inches above and below the rows
_BUBBLE = 680.0  # points squared, at weight 1
_LABEL = 48  # characters
_MAX_PIXELS = 30_000


@dataclass(frozen=True)
class Route:
    """One row of the picture. label: the clip. encoders, weights: of each slot, data-independent slots first."""

    label: str
    encoders: Sequence[int]
    weights: Sequence[float]


def routing_picture(
    path: str | os.PathLike[str],
    routes: Sequence[Route],
    encoders: Sequence[str],
    independent_slots: int,
    title: str = "Who listens to what",
    subtitle: str = "",
) -> None:
    """Draw a row a clip, a column an encoder, and a bubble for every choice, its area the weight.

    encoders: their names. path: its suffix picks the format; the file appears whole or not at all. Raises ConfigError
    for a suffix that names no format and for a file that cannot be written.
    """
    check_picture(path)
    save_picture(_draw(routes, encoders, independent_slots, title, subtitle), path)


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the path's suffix names; see `check_picture` and `whole_file`."""
    with whole_file(path, "the picture") as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a script that the font lacks is drawn as boxes
        figure.savefig(partial, format=Path(path).suffix[1:].lower(), facecolor="white")


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError for a path no picture can be written to, before anything is computed."""
    check_file(path, "the picture")
    if Path(path).suffix.lower() not in _FORMATS:
        raise ConfigError(f"{path}: expected a picture's name, ending in {', '.join(_FORMATS)}")


def _draw(
    routes: Sequence[Route], encoders: Sequence[str], independent_slots: int, title: str, subtitle: str
) -> Figure:
    rows, columns = len(routes), len(encoders)
    labels = [name if len(name) <= _LABEL else "…" + name[1 - _LABEL :] for name in (route.label for route in routes)]
    left = 2 * _MARGIN + 0.082 * max(map(len, labels), default=0)
    width, height = max(left + _COLUMN * columns + _MARGIN, 5.5), _HEADER + _ROW * rows + _FOOTER
    figure = Figure(figsize=(width, height), dpi=min(160, _MAX_PIXELS / max(width, height)))
    span = (width - left - _MARGIN) / width
    grid = figure.add_axes((left / width, _FOOTER / height, span, _ROW * rows / height))
    shares = figure.add_axes((left / width, 0.35 / height, span, 0.55 / height))

    at = _MARGIN / width
    figure.text(at, 1 - 0.45 / height, title, fontsize=17, fontweight="bold", color=INK, parse_math=False)
    figure.text(at, 1 - 0.72 / height, subtitle, fontsize=9.5, color=QUIET, parse_math=False)
    marks = [Line2D([], [], marker="o", linestyle="", markersize=9, color=color) for color in _COLORS]
    figure.legend(
        marks, _KINDS, loc="upper right", bbox_to_anchor=(1 - at, 1 - 0.2 / height), frameon=False, labelcolor=QUIET,
        fontsize=9, borderpad=0, borderaxespad=0, handletextpad=0.1,
    )  # fmt: skip

    for axes in (grid, shares):
        axes.set(xlim=(-0.5, columns - 0.5), facecolor="none")
        axes.tick_params(length=0, pad=8)
        axes.spines[:].set_visible(False)
    grid.set_ylim(rows - 0.5, -0.5)
    grid.xaxis.tick_top()
    grid.set_xticks(range(columns), encoders, fontsize=10.5, fontweight="bold", color=INK)
    grid.set_yticks(range(rows), labels, fontsize=10, color=INK)
    for tick in grid.get_yticklabels():
        tick.set_parse_math(False)
    grid.hlines([row + 0.5 for row in range(-1, rows)], -0.5, columns - 0.5, color=LINE, linewidth=0.8, zorder=0)
    for row, route in enumerate(routes):
        _draw_choices(grid, row, route, independent_slots)
    _draw_shares(shares, routes, columns, independent_slots)
    return figure


def _draw_choices(grid: Axes, row: int, route: Route, independent_slots: int) -> None:
    """The bubbles of one clip; slots that chose the same encoder stand side by side."""
    for slot, (encoder, weight) in enumerate(zip(route.encoders, route.weights, strict=True)):
        sharing = [other for other, chosen in enumerate(route.encoders) if chosen == encoder]
        x = encoder - 0.09 + 0.47 * (sharing.index(slot) - (len(sharing) - 1) / 2)
        area = _BUBBLE * weight
        grid.scatter(x, row, s=area, color=_COLORS[slot >= independent_slots], linewidth=0, zorder=2)
        beside = (area**0.5 / 2 + 3, 0)
        grid.annotate(
            f"{weight:.2f}", (x, row), beside, textcoords="offset points", va="center", fontsize=8, color=QUIET
        )


def _draw_shares(axes: Axes, routes: Sequence[Route], columns: int, independent_slots: int) -> None:
    """A bar an encoder: its share of the weight of all clips, by kind of slot."""
    shares = [[0.0] * columns for _ in _KINDS]
    for route in routes:
        for slot, (encoder, weight) in enumerate(zip(route.encoders, route.weights, strict=True)):
            shares[slot >= independent_slots][encoder] += weight
    total = sum(map(sum, shares)) or 1.0
    bottom = [0.0] * columns
    for kind, color in zip(shares, _COLORS, strict=True):
        heights = [weight / total for weight in kind]
        axes.bar(range(columns), heights, width=0.5, bottom=bottom, color=color)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for column, share in enumerate(bottom):
        axes.annotate(
            f"{share:.0%}", (column, share), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=QUIET
        )
    axes.set_ylim(0, max(bottom, default=0) * 1.3 or 1)
    axes.set_xticks([])
    axes.set_yticks([axes.get_ylim()[1] / 2], ["all clips"], fontsize=10, color=QUIET)
    axes.axhline(0, color=LINE, linewidth=0.8)
