"""`python -m benchmarks`: measure, and put what was measured into the README."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.measure import ROOT, OutputsDifferError
from benchmarks.results import load, save
from benchmarks.suites import CPU, compare
from benchmarks.tables import fill, markdown, rich_tables

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "mixture.json"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def cpu(
    rounds: Annotated[int, typer.Option(min=2, help="How often each provider runs.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    workload: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    output: Annotated[Path, typer.Option(dir_okay=False, help="Results file, JSON.")] = RESULTS,
) -> None:
    """Packed against transformers on this machine's CPU."""
    names = [comparison.workload.name for comparison in CPU]
    if unknown := sorted(set(workload or ()) - set(names)):
        _stop(f"unknown workload {', '.join(unknown)}; expected one of {', '.join(names)}")
    results = []
    try:
        for comparison in CPU:
            name = comparison.workload.name
            if workload and name not in workload:
                continue
            results += compare(
                comparison, rounds, threads, track=lambda it, name=name: track(it, name, console=console)
            )
    except OutputsDifferError as error:
        _stop(str(error))
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    save(output, command, threads, results)
    console.print(*rich_tables(load(output)), f"written to {output}", sep="\n")


@app.command()
def readme(
    results: Annotated[Path, typer.Option(dir_okay=False, help="Results file, JSON.")] = RESULTS,
    page: Annotated[Path, typer.Option(dir_okay=False, help="Page with the two markers.")] = ROOT / "README.md",
) -> None:
    """Fill the performance section of the README from a results file."""
    try:
        fill(page, markdown(load(results)))
    except (OSError, ValueError) as error:
        _stop(str(error))


def _stop(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
