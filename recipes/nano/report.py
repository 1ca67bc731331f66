"""The report: tables and pictures from result files, and the notes written by hand beside this module."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from recipes.nano.data import SIZES, TASKS
from recipes.nano.encoders import SPECIALISTS
from recipes.nano.runs import BEST, LONGER, RUNS, SHIPPED

NOTES = Path(__file__).with_name("notes.md")
METRICS = {"asr": "wer", "voice": "accuracy", "emotion": "accuracy", "language": "accuracy", "sound": "exact_match"}
HEADINGS = {task: "ASR, WER" if task == "asr" else task for task in TASKS}

Results = dict[str, list[dict[str, Any]]]


def write_report(results: Path, out: Path) -> None:
    """Write `out` and the pictures in a folder of its name beside it."""
    found = read_results(results)
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "parts").glob("*.json"))]
    pictures = out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    draw_scores(found, pictures / "scores.png")
    draw_routing(found[BEST], pictures / "routing.png")
    sections = {
        "comparison": comparison({**found, "of these, the shipped model": shipped(found)}, "test"),
        "missing": missing(found),
        "recordings": comparison(found, "recordings", ("asr", "voice", "language")),
        "parts": parts_table(parts),
        "time": time_spent(found, parts),
        "minutes": f"{total_minutes(found, parts):.0f} minutes",
        "sizes": f"{sum(SIZES['train'].values()):,} clips for training, {sum(SIZES['test'].values())} for the test",
        "scores_picture": f"![Scores of every run]({pictures.name}/scores.png)",
        "routing_picture": f"![Who was chosen for each task]({pictures.name}/routing.png)",
    }
    text = NOTES.read_text(encoding="utf-8")
    for name, section in sections.items():
        text = text.replace(f"{{{name}}}", section)
    out.write_text(text, encoding="utf-8")


def shipped(found: Results) -> list[dict[str, Any]]:
    """The result of the run SHIPPED, if it was made."""
    name, seed = SHIPPED
    return [result for result in found.get(name, []) if result["seed"] == seed]


def missing(found: Results) -> str:
    """Which of the compared runs have no result."""
    names = [name for name in RUNS if name not in found and name != LONGER]
    return f"Not run yet: {'; '.join(names)}." if names else "All runs that were planned are in the table."


def read_results(folder: Path) -> Results:
    """Results by run, in the order of RUNS, of each the seeds in order."""
    found: Results = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["run"]].append(result)
    return {name: sorted(found[name], key=lambda result: result["seed"]) for name in RUNS if name in found}


def score(result: dict[str, Any], task: str, split: str = "test") -> float:
    return result["scores"][split]["tasks"][task]["scores"][METRICS[task]]["value"]


def worth(result: dict[str, Any]) -> float:
    """Mean over tasks; of the word error rate what it leaves of 1, at least 0."""
    return mean(max(0.0, 1 - score(result, t)) if t == "asr" else score(result, t) for t in TASKS)


def comparison(found: Results, split: str, tasks: Sequence[str] = TASKS) -> str:
    """A row a run; mean and standard deviation over seeds where there are several."""
    whole = len(tasks) == len(TASKS)
    headings = [HEADINGS[task] for task in tasks] + ["mean score"] * whole
    rows = []
    for name, results in found.items():
        results = [r for r in results if split in r["scores"]]
        if not results:
            continue
        size = "+".join(f"{results[0]['parameters'][part] / 1e6:.2f}" for part in ("base", "pool"))
        cells = [spread([score(r, task, split) for r in results]) for task in tasks]
        if whole:
            cells.append(spread([worth(r) for r in results]))
        rows.append([name, size, str(len(results)), *cells])
    return table(["run", "base+pool, M", "seeds", *headings], rows)


def spread(values: Sequence[float]) -> str:
    """In per cent."""
    text = f"{100 * mean(values):.1f}"
    return text if len(values) < 2 else f"{text} ± {100 * stdev(values):.1f}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parts_table(parts: Sequence[dict[str, Any]]) -> str:
    rows = []
    for part in parts:
        if "parameters" not in part:
            continue
        found = [f"WER {100 * part['validation_wer']:.1f} %"] if "validation_wer" in part else []
        found += [f"{task} {100 * right:.0f} %" for task, right in part.get("validation_accuracy", {}).items()]
        size, minutes = part["parameters"] / 1e6, part["cpu_seconds"] / 60
        rows.append([part["part"].replace("_", " "), f"{size:.2f}", ", ".join(found), f"{minutes:.1f}"])
    return table(["part", "parameters, M", "alone, on validation clips", "CPU minutes"], rows)


def time_spent(found: Results, parts: Sequence[dict[str, Any]]) -> str:
    whole = [part for part in parts if part["part"] == "all"]
    pretraining = sum(part.get("cpu_seconds", 0) for part in parts)
    runs = [result["cpu_seconds"] for result in compared(found)]
    text = (
        f"{pretraining / 60:.0f} minutes of one core for pre-training and {sum(runs) / 60:.0f} for the {len(runs)} "
        "compared runs"
    )
    for part in whole:
        device = part["device"].split(",")[0]
        text += f"; all of it, with the clips, {part['wall_seconds'] / 60:.0f} minutes on the clock"
        text += f" ({device}, {part['processes']} processes)"
    longer = sum(result["cpu_seconds"] for result in found.get(LONGER, []))
    if longer:
        text += f"; {longer / 60:.0f} minutes of one core more for those in twice the steps, which `ship` makes"
    return text


def compared(found: Results) -> list[dict[str, Any]]:
    """The results of what `all` makes."""
    return [result for name, results in found.items() if name != LONGER for result in results]


def total_minutes(found: Results, parts: Sequence[dict[str, Any]]) -> float:
    """Of one core, for everything but the clips."""
    return sum(entry.get("cpu_seconds", 0) for entry in (*parts, *compared(found))) / 60


def draw_scores(found: Results, path: Path) -> None:
    """For each task a bar a run, with the seeds as dots."""
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    width = 0.8 / len(found)
    for i, (name, results) in enumerate(found.items()):
        values = [[max(0.0, 1 - score(r, t)) if t == "asr" else score(r, t) for r in results] for t in TASKS]
        values.append([worth(r) for r in results])
        places = [x + (i - len(found) / 2 + 0.5) * width for x in range(len(values))]
        axes.bar(places, [100 * mean(v) for v in values], width * 0.9, label=name, color=f"C{i}", alpha=0.75)
        for place, of_seeds in zip(places, values, strict=True):
            axes.plot([place] * len(of_seeds), [100 * v for v in of_seeds], ".", color="black", markersize=3)
    axes.set_xticks(range(len(TASKS) + 1), ["ASR (100 - WER)", *TASKS[1:], "mean"])
    axes.set_ylabel("per cent, unseen voices and phrases")
    axes.set_ylim(0, 100)
    figure.legend(fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_routing(results: Sequence[dict[str, Any]], path: Path) -> None:
    """For each seed and slot, the share of each task's clips that chose each encoder."""
    slots = ("data-independent slot", "data-dependent slot")
    figure, grid = pyplot.subplots(
        len(slots), len(results), figsize=(3 * len(results) + 1, 5.4), squeeze=False, sharey=True, layout="constrained"
    )
    for column, result in enumerate(results):
        for slot, name in enumerate(slots):
            chosen = [result["routing"][task][slot] for task in TASKS]
            shares = [[of_task.get(str(e), 0.0) for e in range(len(SPECIALISTS))] for of_task in chosen]
            axes = grid[slot][column]
            axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    if share >= 0.005:
                        color = "white" if share > 0.6 else "black"
                        axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=color)
            axes.set_xticks(range(len(SPECIALISTS)), SPECIALISTS, rotation=30, fontsize=8)
            axes.set_yticks(range(len(TASKS)), TASKS, fontsize=8)
            axes.set_title(f"seed {result['seed']}: {name}", fontsize=9)
    figure.supxlabel("specialist that was chosen, per cent of the task's test clips", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
