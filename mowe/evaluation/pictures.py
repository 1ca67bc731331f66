"""The picture of a report: every task's score with its interval, and what was taken for what."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mowe.evaluation.report import Report, TaskReport
from mowe.plots import GREEN, INK, LINE, QUIET, RED, save_picture

METRIC_NAMES = {
    "score": "score", "wer": "WER", "cer": "CER", "accuracy": "accuracy", "macro_f1": "macro-F1",
    "exact_match": "exact match",
}  # fmt: skip
"""What people read."""

_LABELS = 24  # of a confusion that can be read
_ACROSS = 2  # confusions side by side
_WIDTH, _ROW, _CELL = 9.0, 0.42, 0.34  # inches
_NAME = 18  # characters
_SHADES = LinearSegmentedColormap.from_list("", ["white", GREEN])


def report_picture(path: str | os.PathLike[str], report: Report, title: str = "Scores", subtitle: str = "") -> None:
    """Draw the scores of all tasks, and the confusion of each task of labels that has not too many.

    path: its suffix picks the format; the file appears whole or not at all. Raises ConfigError for a file that cannot
    be written.
    """
    confusions = [(name, task) for name, task in report.tasks.items() if 2 <= len(task.labels) <= _LABELS]
    lines = [confusions[i : i + _ACROSS] for i in range(0, len(confusions), _ACROSS)]
    heights = [1.5 + _ROW * (len(report.tasks) + 1)]
    heights += [1.9 + _CELL * max(len(task.labels) for _, task in line) for line in lines]
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=150, layout="constrained")
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    parts[0].suptitle(title, x=0.02, ha="left", fontsize=17, fontweight="bold", color=INK, parse_math=False)
    _draw_scores(parts[0].subplots(), report, subtitle)
    for part, line in zip(parts[1:], lines, strict=True):
        for axes, confusion in zip(part.subplots(1, _ACROSS), [*line, None][:_ACROSS], strict=True):
            if confusion is None:
                axes.set_axis_off()
            else:
                _draw_confusion(axes, *confusion)
    save_picture(figure, path)


def _draw_scores(axes: Axes, report: Report, subtitle: str) -> None:
    rows = [(f"{name}, {METRIC_NAMES[t.rule.metric]}", t.score, t.rule.transcribes) for name, t in report.tasks.items()]
    rows.append(("all tasks, score", report.overall["score"], False))
    for row, (_, score, fewer_is_better) in enumerate(rows):
        color = RED if fewer_is_better else GREEN
        last = row == len(rows) - 1
        axes.barh(row, min(score.value, 1), height=0.62, color=color, alpha=1 if last else 0.75, linewidth=0)
        axes.hlines(row, min(score.low, 1), min(score.high, 1), color=INK, linewidth=1.2)
        axes.text(1.02, row, f"{score.value:.1%}", va="center", fontsize=10, color=INK, fontweight="bold")
        axes.text(1.14, row, f"{score.low:.1%} to {score.high:.1%}", va="center", fontsize=8.5, color=QUIET)
    axes.set(xlim=(0, 1.32), ylim=(len(rows) - 0.5, -0.5))
    axes.set_title(subtitle, loc="left", fontsize=9.5, color=QUIET, parse_math=False)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=10, color=INK, parse_math=False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"], fontsize=8.5, color=QUIET)
    axes.vlines([0.25, 0.5, 0.75, 1], -0.5, len(rows) - 0.5, color=LINE, linewidth=0.8, zorder=0)
    _bare(axes)


def _draw_confusion(axes: Axes, name: str, task: TaskReport) -> None:
    """Rows: what was right. Columns: what was said, the last one for what is no label."""
    counts = np.array(task.confusion)
    shares = counts / counts.sum(1, keepdims=True)
    axes.imshow(shares, cmap=_SHADES, vmin=0, vmax=1, aspect="equal")
    axes.set_anchor("NW")
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=color)
    labels = [label if len(label) <= _NAME else label[: _NAME - 1] + "…" for label in task.labels]
    style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "parse_math": False}
    heading = f"{name}: right answer by row, answered by column"
    axes.set_title(heading, loc="left", fontsize=9.5, color=QUIET, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, **style)
    axes.set_xticks(range(len(labels) + 1), [*labels, "none"], rotation=45, ha="right", rotation_mode="anchor", **style)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
