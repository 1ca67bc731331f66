"""Pictures of results, each readable without the text around it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import meaning

_OURS, _THEIRS, _INK, _QUIET = "#2a9d8f", "#b8c0c8", "#1f2933", "#6b7785"
_LIBRARY = {"packed", "mixture", "packed_step"}


def draw(cpu: dict[str, Any], sweeps: dict[str, Any], folder: Path) -> list[Path]:
    """Speed-ups, time along each sweep, shares of the floor by op, peak memory; PNG files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mixtures = [r for r in cpu["results"] if r["mode"] == "features"]
    ops = [r for r in cpu["results"] if r["mode"] == "op"]
    where = f"{cpu['device']}, {cpu['threads']} threads, float32"
    pictures = {
        "speedup.png": _bars(
            mixtures, lambda r: r["speedup"]["median"], "{:.1f}x", "How many times as fast as the first way", where
        ),
        "memory.png": _bars(
            [r for r in mixtures if r["memory"]],
            lambda r: r["memory"]["peak"] / 2**20,
            "{:.0f} MiB",
            "Peak memory of the process",
            where,
        ),
        "floor.png": _bars(
            ops,
            lambda r: 100 * r["floor"] / r["seconds"]["median"],
            "{:.0f} %",
            "Single ops: how much of the machine's measured limit is reached",
            where,
        ),
        "sweeps.png": _lines(sweeps["results"], where),
    }
    paths = []
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110, facecolor="white", bbox_inches="tight")
        paths.append(folder / name)
    return paths


def _bars(results: Sequence[dict[str, Any]], value, form: str, title: str, where: str) -> Figure:
    """A group of bars a subject, a bar a provider."""
    groups = [(subject, list(rows)) for subject, rows in groupby(results, key=lambda r: r["subject"])]
    height = 0.32 * len(results) + 0.55 * len(groups) + 0.9
    figure = Figure(figsize=(10, height))
    axes = figure.add_axes((0.01, 0, 0.99, 1 - 0.7 / height))
    y, largest = 0.0, max(value(r) for r in results)
    for subject, rows in groups:
        axes.text(0, y, subject, color=_INK, weight="bold", va="center", fontsize=10)
        y += 0.9
        for row in rows:
            ours = row["provider"] in _LIBRARY
            axes.barh(y, value(row), 0.72, color=_OURS if ours else _THEIRS)
            label = f"{form.format(value(row))}  {meaning(row)}"
            axes.text(value(row) + 0.01 * largest, y, label, color=_INK if ours else _QUIET, va="center", fontsize=9)
            y += 1
        y += 0.6
    axes.set(xlim=(0, 1.9 * largest), ylim=(y, -0.8))
    axes.axis("off")
    figure.suptitle(title, x=0.01, y=1 - 0.3 / height, ha="left", va="bottom", color=_INK, fontsize=13, weight="bold")
    figure.text(0.01, 1 - 0.35 / height, where, ha="left", va="top", color=_QUIET, fontsize=9)
    return figure


def _lines(results: Sequence[dict[str, Any]], where: str) -> Figure:
    """Seconds against what each sweep varies, a panel a sweep."""
    sweeps = [(axis, list(rows)) for axis, rows in groupby(results, key=lambda r: r["sweep"]["axis"])]
    figure = Figure(figsize=(10, 3.4 * -(-len(sweeps) // 2)), layout="constrained")
    for place, (axis, rows) in enumerate(sweeps, start=1):
        _panel(figure.add_subplot(-(-len(sweeps) // 2), 2, place), axis, rows)
    figure.suptitle(f"Seconds for one batch ({where})", x=0.01, ha="left", color=_INK, fontsize=13, weight="bold")
    return figure


def _panel(axes: Axes, axis: str, rows: Sequence[dict[str, Any]]) -> None:
    for provider, row in {row["provider"]: row for row in rows}.items():
        points = sorted((r["sweep"]["value"], r["seconds"]["median"]) for r in rows if r["provider"] == provider)
        color = _OURS if provider in _LIBRARY else _QUIET
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=meaning(row))
    axes.set(xlabel=axis, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
