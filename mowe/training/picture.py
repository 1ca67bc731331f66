"""The picture of routing over training: a panel a task, and the share of each encoder in it as the steps go by."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mowe.plots import GREEN, INK, LINE, QUIET, RED, save_picture

_COLORS = (GREEN, RED, "#e9c46a", "#264653", "#8ab17d", "#f4a261", "#577590", "#b5838d")
_ACROSS, _WIDTH, _HEIGHT = 3, 3.1, 1.9  # panels side by side; inches of one
_POINTS = 60  # along the steps; entries between two of them are summed


def training_picture(
    path: str | os.PathLike[str], entries: Sequence[Mapping[str, Any]], encoders: Sequence[str], title: str
) -> None:
    """Draw what routing.jsonl tells: which encoders the clips of each task were sent to.

    entries: its lines. encoders: their names. path: its suffix picks the format; the file appears whole or not at all.
    Raises ConfigError for a file that cannot be written.
    """
    panels = _panels(entries, len(encoders))
    rows = -(-len(panels) // _ACROSS)
    figure = Figure(figsize=(_ACROSS * _WIDTH, rows * _HEIGHT + 1.1), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=15, fontweight="bold", color=INK, parse_math=False)
    grid = figure.subplots(rows, _ACROSS, squeeze=False).flat
    steps = _steps(entries)
    for axes, panel in zip(grid, [*panels.items(), *[None] * (len(grid) - len(panels))], strict=True):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw(axes, panel[0], steps, panel[1])
    marks = [Patch(color=_color(i)) for i in range(len(encoders))]
    figure.legend(
        marks, encoders, loc="outside lower left", ncols=6, frameon=False, fontsize=9, labelcolor=QUIET,
        handlelength=0.9,
    )  # fmt: skip
    save_picture(figure, path)


def _panels(entries: Sequence[Mapping[str, Any]], encoders: int) -> dict[str, np.ndarray]:
    """[entries, encoders] counts of every task's data-dependent slots, and of the slots that all tasks share."""
    tasks = dict.fromkeys(task for entry in entries for task in entry["windows"])
    found = {task: [entry["windows"].get(task, {}).get("dependent") for entry in entries] for task in tasks}
    shared = [entry["windows"][next(iter(entry["windows"]))] for entry in entries if entry["windows"]]
    if any("independent" in of_task for of_task in shared):
        found["every task, same for every clip"] = [
            np.sum(
                [of_task["independent"] for of_task in entry["windows"].values() if "independent" in of_task], axis=0
            )
            for entry in entries
        ]
    none = np.zeros(encoders)
    counts = {name: np.array([none if row is None else row for row in rows]) for name, rows in found.items()}
    return {name: rows for name, rows in counts.items() if rows.any()}


def _steps(entries: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The step of each entry, counted through all stages."""
    before, last, steps = 0, 0, []
    for entry in entries:
        if entry["step"] <= last:
            before += last
        last = entry["step"]
        steps.append(before + last)
    return np.array(steps)


def _draw(axes: Axes, name: str, steps: np.ndarray, counts: np.ndarray) -> None:
    groups = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS))
    sums = np.array([counts[group].sum(0) for group in groups])
    heard = sums.sum(1) > 0
    shares = sums[heard] / sums[heard].sum(1, keepdims=True)
    at = np.array([steps[group].mean() for group in groups])[heard]
    if len(at) == 1:
        at, shares = np.array([at[0] - 0.5, at[0] + 0.5]), shares.repeat(2, axis=0)
    axes.stackplot(at, shares.T, colors=[_color(i) for i in range(counts.shape[1])], linewidth=0)
    axes.set(xlim=(steps[0] - 0.5, steps[-1] + 0.5), ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK, parse_math=False)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=8, color=QUIET)
    axes.tick_params(length=0, labelsize=8, labelcolor=QUIET)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.spines[:].set_visible(False)


def _color(encoder: int) -> str:
    return _COLORS[encoder % len(_COLORS)]
