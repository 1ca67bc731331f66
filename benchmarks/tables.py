"""Tables made from a results file: on the screen, and in the README between its two markers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.providers import PROVIDERS

BEGIN = "<!-- performance: begin (python -m benchmarks readme) -->"
END = "<!-- performance: end -->"
_HEADER = ("computed by", "seconds", "speed-up", "20 % to 80 %", "peak memory")


def rich_tables(report: dict[str, Any]) -> Iterator[Table]:
    """One table a workload."""
    for title, rows in _by_workload(report):
        table = Table(*_HEADER, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        yield table


def markdown(report: dict[str, Any]) -> str:
    """The same tables for a page, with the machine, the versions and the command."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"{report['device']}, {report['threads']} threads, float32, random weights; {versions}. "
        f"Measured by `{report['command']}`, every provider taking turns, outputs compared first. "
        "Speed-up: against the first line, median of the rounds."
    ]
    for title, rows in _by_workload(report):
        lines += ["", f"**{title}**", "", _line(_HEADER), _line(("---",) + ("---:",) * (len(_HEADER) - 1))]
        lines += map(_line, rows)
    return "\n".join(lines)


def fill(page: Path, text: str) -> None:
    """Put the text between the markers of a page. Raises ValueError where they are not there."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _by_workload(report: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    for name, results in groupby(report["results"], key=lambda result: result["workload"]):
        results = list(results)
        yield _title(name, results[0]), [_row(result) for result in results]


def _title(name: str, result: dict[str, Any]) -> str:
    shortest, longest = min(result["lengths"]), max(result["lengths"])
    seconds = f"{longest:g} s" if shortest == longest else f"{shortest:g} to {longest:g} s"
    encoders = f"{result['num_encoders']} encoder" + "s" * (result["num_encoders"] > 1)
    return f"{name}: {encoders}, {result['top_k']} a clip, {len(result['lengths'])} clips of {seconds}"


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    seconds, speedup, memory = result["seconds"], result["speedup"], result["memory"]
    context = f" ({result['context']})" if result["provider"] == "packed" else ""
    return (
        PROVIDERS[result["provider"]].meaning + context,
        f"{seconds['median']:.2f}",
        f"{speedup['median']:.2f}",
        f"{speedup['p20']:.2f} to {speedup['p80']:.2f}",
        "not measured" if memory is None else f"{memory['peak'] / 2**20:.0f} MiB",
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
