"""docs/benchmarks.md and the README's performance section, made from the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.suites import overhead
from benchmarks.tables import conditions, markdown

_PICTURES = (
    ("speedup.png", "Speed-up by workload and provider"),
    ("sweeps.png", "Time against encoders in the pool, encoders a clip, clips in the batch, seconds in a clip"),
    ("floor.png", "Share of the floor by op"),
    ("memory.png", "Peak memory by workload and provider"),
)
# What the README shows; the page has everything.
_README = ("tiny8/speech/8", "tiny8/short/8", "tiny8/full/8")


def page(cpu: dict[str, Any], sweeps: dict[str, Any], profiled: dict[str, Any], pictures: str) -> str:
    """The whole page. pictures: folder of the pictures, as the page links to it."""
    of = {mode: [r for r in cpu["results"] if r["mode"] == mode] for mode in ("features", "whole", "step", "op")}
    lines = ["# Benchmarks", "", "Made by `python -m benchmarks page` from the committed results.", ""]
    lines += ["## On a CPU", "", conditions(cpu), ""]
    lines += [f"{_workload_names()}", ""]
    lines += _picture(pictures, 0)
    for mode, title in (
        ("features", "Features of the chosen encoders"),
        ("whole", "From waveforms to the language model"),
        ("step", "Training"),
        ("op", "Single ops"),
    ):
        lines += [f"### {title}", "", markdown(of[mode]), ""]
        if mode == "whole" and (added := overhead(cpu)) is not None:
            lines += [f"Two Whisper-tiny slots add {added:.1%} to the time of a Whisper-large base encoder here.", ""]
        if mode == "op":
            lines += _picture(pictures, 2)
    lines += ["### Memory", "", *_picture(pictures, 3)]
    lines += ["### Scaling", "", f"Measured by `{sweeps['command']}`.", "", *_picture(pictures, 1)]
    lines += ["### Where the time goes", ""]
    lines += [f"The packed pool on {profiled['workload']}, by `{profiled['command']}`:", ""]
    lines += ["| kind of work | share |", "| --- | ---: |"]
    lines += [f"| {kind} | {share:.1%} |" for kind, share in profiled["shares"].items()]
    lines += ["", *(f"Not run here: {name}, {reason}." for name, reason in cpu["missing"].items()), ""]
    lines += ["## On a CUDA GPU", "", "| workload | result |", "| --- | --- |"]
    lines += [f"| {name} | not measured yet |" for name in dict.fromkeys(r["subject"] for r in of["features"])]
    return "\n".join(lines) + "\n"


def readme(cpu: dict[str, Any], pictures: str) -> str:
    """The README's section."""
    results = [r for r in cpu["results"] if r["mode"] == "features" and r["subject"] in _README]
    whole = [r for r in cpu["results"] if r["mode"] == "whole"]
    return "\n".join(
        (
            conditions(cpu),
            "",
            markdown(results + whole),
            "",
            *_picture(pictures, 1),
            "All workloads, training, single ops, memory and scaling: [docs/benchmarks.md](docs/benchmarks.md).",
        )
    )


def _workload_names() -> str:
    return (
        "A workload is pool / lengths / clips: `tiny8` is 8 encoders of Whisper-tiny's size, `base16` 16 of "
        "Whisper-base's, `paper` 2 Whisper-tiny and 2 HuBERT-base. Lengths: `full` 30 s each, `speech` log-normal "
        "around 8 s, `short` 1 to 5 s, `spread` 2 to 20 s. Providers that pad compute 30 s windows of every clip, the "
        "packed pool the clips' own frames, but where every clip is 30 s."
    )


def _picture(folder: str, index: int) -> list[str]:
    name, text = _PICTURES[index]
    return [f"![{text}]({Path(folder, name).as_posix()})", ""]
