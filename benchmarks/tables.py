"""Tables made from a results file: on the screen, on the page of benchmarks, in the README between its two markers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.ops import MEANINGS
from benchmarks.whole import ALL

BEGIN = "<!-- performance: begin (python -m benchmarks page) -->"
END = "<!-- performance: end -->"
_HEADER = ("computed by", "seconds", "speed-up", "20 % to 80 %", "share of the floor", "peak memory")
_MODES = {
    "features": "features of the chosen encoders",
    "whole": "from waveforms to the language model's embeddings",
    "step": "a training step, all encoders trainable",
    "op": "one op",
}


def rich_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table a workload or op."""
    for title, rows in _by_subject(report["results"]):
        table = Table(*_HEADER, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        yield table


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The same tables for a page."""
    lines: list[str] = []
    for title, rows in _by_subject(results):
        lines += [f"**{title}**", "", _line(_HEADER), _line(("---",) + ("---:",) * (len(_HEADER) - 1))]
        lines += [*map(_line, rows), ""]
    return "\n".join(lines).rstrip()


def conditions(report: dict[str, Any]) -> str:
    """The machine, the versions, the command, and how to read the columns."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"{report['device']}, {report['threads']} threads, float32, random weights; {versions}. Measured by "
        f"`{report['command']}`: outputs compared first, then every provider in turns. Seconds: median. Speed-up: "
        "against the first line in the same round; where 20 % and 80 % of the rounds lie on both sides of 1 there is "
        "no difference to speak of. Share of the floor: the time the encoders' matrix products alone would take at "
        f"the rate this machine reached in the same run ({report['roofs']['flops'] / 1e9:.0f} GFLOP/s), or the bytes "
        f"at its bandwidth ({report['roofs']['bandwidth'] / 1e9:.0f} GB/s), by the time taken."
    )


def fill(page: Path, text: str) -> None:
    """Put the text between the markers of a page. Raises ValueError where they are not there."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def meaning(result: dict[str, Any]) -> str:
    """What a reader is told the provider of a result is."""
    return MEANINGS[result["provider"]] if result["mode"] == "op" else ALL[result["provider"]].meaning


def _by_subject(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    for (subject, mode), group in groupby(results, key=lambda result: (result["subject"], result["mode"])):
        of_subject = list(group)
        yield (_title(subject, mode, of_subject[0]["about"]), [_row(result) for result in of_subject])


def _title(subject: str, mode: str, about: dict[str, Any] | None) -> str:
    if about is None:
        return subject
    shortest, longest = min(about["seconds"]), max(about["seconds"])
    seconds = f"{longest:g} s" if shortest == longest else f"{shortest:.1f} to {longest:.1f} s"
    clips = f"{len(about['seconds'])} clip" + "s" * (len(about["seconds"]) > 1)
    encoders = f"{about['encoders']} encoder" + "s" * (about["encoders"] > 1)
    return f"{subject}: {encoders}, {about['slots']} a clip, {clips} of {seconds}; {_MODES[mode]}"


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    seconds, speedup, floor, memory = (result[name] for name in ("seconds", "speedup", "floor", "memory"))
    unit = f"{seconds['median'] * 1e3:.2f} ms" if result["mode"] == "op" else f"{seconds['median']:.2f}"
    return (
        meaning(result),
        unit,
        f"{speedup['median']:.2f}",
        f"{speedup['p20']:.2f} to {speedup['p80']:.2f}",
        "" if floor is None else f"{floor / seconds['median']:.0%}",
        "" if memory is None else f"{memory['peak'] / 2**20:.0f} MiB",
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
