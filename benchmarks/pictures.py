"""Pictures of results, each readable without the text around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.page import OVERVIEW, gpu_pictures, overview
from benchmarks.tables import OPS, clips, meaning, speedup, title

Value, Text = Callable[[dict[str, Any]], float], Callable[[dict[str, Any]], str]
_OURS, _THEIRS, _INK, _QUIET = "#2a9d8f", "#b8c0c8", "#1f2933", "#6b7785"
_LIBRARY = {"packed", "packed_nf4", "mixture", "captured", "packed_step", "mixture_step"}
_MANY = 8  # a sweep from one to so many times as much is drawn on a logarithmic axis


def draw(cpu: dict[str, Any], sweeps: dict[str, Any], gpus: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """An overview, speed-ups, time along each sweep, shares of the floor by op, peak memory; PNG files in a folder.

    gpus: by name; of each, speed-ups and shares of the floor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mixtures = [r for r in cpu["results"] if r["mode"] not in OPS]
    where = f"{cpu['device']}, {cpu['threads']} threads, float32, random weights; this library in green"
    pictures = {
        "overview.png": _overview(overview(cpu, OVERVIEW), where),
        "speedup.png": _speedups(cpu, where),
        "memory.png": _bars(
            [r for r in mixtures if r["memory"]],
            lambda r: r["memory"]["peak"] / 2**20,
            lambda r: f"{r['memory']['peak'] / 2**20:.0f} MiB",
            "Peak memory of the process, all its libraries included",
            where,
        ),
        "floor.png": _floors(cpu, where),
        "sweeps.png": _lines(sweeps["results"], where),
    }
    for name, gpu in gpus.items():
        on_gpu = f"{gpu['device']}, bfloat16, random weights; this library in green"
        figures = {"speedup": _speedups, "floor": _floors}
        pictures |= {f"{name}-{shown}.png": figures[shown](gpu, on_gpu) for shown in gpu_pictures(gpu)}
    paths = []
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=110, facecolor="white", bbox_inches="tight")
        paths.append(folder / name)
    return paths


def _speedups(report: dict[str, Any], where: str) -> Figure:
    return _bars(
        [r for r in report["results"] if r["mode"] not in OPS],
        lambda r: r["speedup"]["median"],
        lambda r: speedup(r, "{:.1f}x"),
        "How many times as fast as the first way",
        where,
    )


def _floors(report: dict[str, Any], where: str) -> Figure:
    """Without ops that do next to nothing, and take their time to start."""
    ops = [r for r in report["results"] if r["mode"] in OPS]
    telling = {(r["subject"], r["mode"]) for r in ops if r["floor"] >= 0.01 * r["seconds"]["median"]}
    return _bars(
        [r for r in ops if (r["subject"], r["mode"]) in telling],
        lambda r: 100 * r["floor"] / r["seconds"]["median"],
        lambda r: f"{r['floor'] / r['seconds']['median']:.0%}",
        "Single ops: how much of the machine's measured limit is reached",
        where,
    )


def _overview(rows: Sequence[tuple[str, dict[str, Any], dict[str, Any]]], where: str) -> Figure:
    """Two bars a row: the usual way, and packed."""
    height = 0.85 * len(rows) + 0.7
    figure = Figure(figsize=(10, height))
    axes = figure.add_axes((0.36, 0.0, 0.63, 1 - 0.7 / height))
    largest = max(theirs["seconds"]["median"] for _, theirs, _ in rows)
    for y, (what, theirs, own) in enumerate(rows):
        axes.text(-0.02 * largest, y - 0.1, what, color=_INK, ha="right", va="center", weight="bold", fontsize=10)
        axes.text(-0.02 * largest, y + 0.2, clips(own["about"]), color=_QUIET, ha="right", va="center", fontsize=9)
        for shift, result, color in ((-0.19, theirs, _THEIRS), (0.19, own, _OURS)):
            seconds = result["seconds"]["median"]
            axes.barh(y + shift, seconds, 0.34, color=color)
            who = meaning(theirs).removesuffix(", features given").removesuffix(", from waveforms")
            if result is own:
                who = f"packed: {speedup(own, '{:.1f}x')}"
            label = f"{seconds:.1f} s  {who}"
            inside = seconds > 0.5 * largest
            axes.text(
                seconds + (-0.01 if inside else 0.01) * largest, y + shift, label, ha="right" if inside else "left",
                va="center", color=_INK, fontsize=8.5, weight="bold" if result is own else "normal",
            )  # fmt: skip
    axes.set(xlim=(0, 1.02 * largest), ylim=(len(rows) - 0.5, -0.5))
    axes.axis("off")
    _title(figure, "Seconds for one batch: the usual way, and packed", f"eight Whisper-tiny, two a clip; {where}")
    return figure


def _title(figure: Figure, heading: str, where: str) -> None:
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.3 / height, heading, ha="left", va="bottom", color=_INK, fontsize=13, weight="bold")
    figure.text(0.01, 1 - 0.35 / height, where, ha="left", va="top", color=_QUIET, fontsize=9)


def _bars(results: Sequence[dict[str, Any]], value: Value, text: Text, heading: str, where: str) -> Figure:
    """A group of bars a subject, a bar a provider."""
    groups = [(subject, list(rows)) for (subject, _), rows in groupby(results, key=lambda r: (title(r), r["baseline"]))]
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
            label = f"{text(row)}  {meaning(row)}"
            axes.text(value(row) + 0.01 * largest, y, label, color=_INK if ours else _QUIET, va="center", fontsize=9)
            y += 1
        y += 0.6
    axes.set(xlim=(0, 1.9 * largest), ylim=(y, -0.8))
    axes.axis("off")
    _title(figure, heading, where)
    return figure


def _lines(results: Sequence[dict[str, Any]], where: str) -> Figure:
    """Seconds against what each sweep varies, a panel a sweep."""
    sweeps = [(axis, list(rows)) for axis, rows in groupby(results, key=lambda r: r["sweep"]["axis"])]
    height = 3.2 * -(-len(sweeps) // 2) + 0.8
    figure = Figure(figsize=(10, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.7 / height))
    for place, (axis, rows) in enumerate(sweeps, start=1):
        _panel(figure.add_subplot(-(-len(sweeps) // 2), 2, place), axis, rows)
    _title(
        figure,
        "Seconds for one batch, by what is varied",
        f"Whisper-tiny: 8 in the pool, 2 a clip, 4 clips around 8 s where not varied; {where}",
    )
    return figure


def _panel(axes: Axes, axis: str, rows: Sequence[dict[str, Any]]) -> None:
    for provider, row in {row["provider"]: row for row in rows}.items():
        points = sorted((r["sweep"]["value"], r["seconds"]["median"]) for r in rows if r["provider"] == provider)
        color = _OURS if provider in _LIBRARY else _QUIET
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=meaning(row))
    values = sorted({r["sweep"]["value"] for r in rows})
    if values[0] and values[-1] >= _MANY * values[0]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)
    slowest = [r["seconds"]["median"] for r in rows]
    if max(slowest) >= 3 * _MANY * min(slowest):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, None)
    axes.set_xlabel(axis)
    axes.set_ylabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
