"""Tables made from a results file: on the screen, on the page of benchmarks, in the README between its two markers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.catalogue import ALL
from benchmarks.rivals import MEANINGS

BEGIN = "<!-- performance: begin (python -m benchmarks page) -->"
END = "<!-- performance: end -->"
OPS = ("forward", "backward")
_HEADER = ("computed by", "time", "speed-up", "20 % to 80 %", "share of the floor", "peak memory")
_MODES = {
    "features": "features of the chosen encoders",
    "whole": "from waveforms to the language model's embeddings",
    "step": "a training step, all encoders trainable",
    "frozen step": "a training step from waveforms to embeddings, base encoder frozen, the mixture trainable",
}


def rich_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table a workload or op."""
    for name, rows in _by_subject(report["results"]):
        shown = Table(*_HEADER, title=name, title_justify="left")
        for row in rows:
            shown.add_row(*row)
        yield shown


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The same tables for a page."""
    tables = (f"**{name}**\n\n{table(_HEADER, rows)}" for name, rows in _by_subject(results))
    return "\n\n".join(tables)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page, numbers to the right."""
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def conditions(report: dict[str, Any]) -> str:
    """The machine, the versions, the command, and how to read the columns."""
    roofs = report["roofs"]
    return (
        f"{machine(report)}. Measured by `{report['command']}`: outputs compared first, then every provider in turns. "
        "Time: median. Speed-up: against the first line in the same round; none is given where 20 % and 80 % of the "
        "rounds lie on both sides of 1. Share of the floor: the time the matrix products alone would take at the rate "
        f"this machine reached in the same run ({roofs['flops'] / 1e9:.0f} GFLOP/s), or the bytes at its bandwidth "
        f"({roofs['bandwidth'] / 1e9:.0f} GB/s), by the time taken."
    )


def machine(report: dict[str, Any]) -> str:
    """The device and what ran on it."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    dtypes = ", ".join(dict.fromkeys(r["dtype"] for r in report["results"] if r["dtype"] != "nf4"))
    driver = f", driver {report['driver']}" if "driver" in report else ""
    return f"{report['device']}{driver}, {report['threads']} threads, {dtypes}, random weights; {versions}"


def fill(page: Path, text: str) -> None:
    """Put the text between the markers of a page. Raises ValueError where they are not there."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def meaning(result: dict[str, Any]) -> str:
    """What a reader is told the provider of a result is."""
    return MEANINGS[result["provider"]] if result["mode"] in OPS else ALL[result["provider"]].meaning


def speedup(result: dict[str, Any], form: str = "{:.2f}") -> str:
    """Against the baseline; "no difference" where the spread of the rounds is larger than the difference."""
    of = result["speedup"]
    differs = result["provider"] == result["baseline"] or not of["p20"] <= 1 <= of["p80"]
    return form.format(of["median"]) if differs else "no difference"


def duration(seconds: float) -> str:
    """With a unit that makes it readable."""
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def title(result: dict[str, Any]) -> str:
    """What was measured, in words."""
    subject, mode, about = (result[name] for name in ("subject", "mode", "about"))
    if about is None:
        return f"{subject}: {mode}"
    encoders = f"{about['encoders']} encoder" + "s" * (about["encoders"] > 1)
    return f"{subject}: {encoders}, {about['slots']} a clip, {clips(about)}; {_MODES[mode]}"


def clips(about: dict[str, Any]) -> str:
    """The batch of a workload in words."""
    count, shortest, longest = len(about["seconds"]), min(about["seconds"]), max(about["seconds"])
    seconds = f"{longest:g} s" if shortest == longest else f"{shortest:.1f} to {longest:.1f} s"
    return f"{count} clip{'s' * (count > 1)} of {seconds}"


def _by_subject(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    for _, group in groupby(results, key=lambda r: (r["subject"], r["mode"], r["baseline"])):
        of_subject = list(group)
        yield title(of_subject[0]), [_row(result) for result in of_subject]


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    seconds, of, floor, memory = (result[name] for name in ("seconds", "speedup", "floor", "memory"))
    return (
        meaning(result),
        duration(seconds["median"]),
        speedup(result),
        f"{of['p20']:.2f} to {of['p80']:.2f}",
        "" if floor is None else f"{floor / seconds['median']:.0%}",
        "" if memory is None else f"{memory['peak'] / 2**20:.0f} MiB",
    )
