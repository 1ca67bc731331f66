"""`python -m benchmarks`: measure, compare two results files, and make pages and pictures of what was measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import rivals
from benchmarks.compare import changes
from benchmarks.floors import Roofs
from benchmarks.host import seconds_a_layer
from benchmarks.measure import ROOT
from benchmarks.ops import NUM_OPS
from benchmarks.page import page as make_page
from benchmarks.page import readme
from benchmarks.pictures import draw
from benchmarks.results import load, on_gpus, save
from benchmarks.shares import kinds, parts
from benchmarks.suites import SUITES, compare_ops, missing, remember, select
from benchmarks.suites import compare as compare_providers
from benchmarks.tables import fill, rich_tables
from benchmarks.workloads import Workload
from mowe_kernels.tables import file_name

RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PAGE, README, PICTURES = (ROOT / "docs" / "benchmarks.md", ROOT / "README.md", ROOT / "docs" / "benchmarks")
TYPICAL, BESIDE_LARGE = "tiny8/speech/8", "tiny2/speech/4"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
FileArgument = Annotated[Path, typer.Argument(dir_okay=False, help="Results file, JSON.")]


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each provider; slow ones stop earlier.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    workload: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Only this one and the baselines; may be given several times.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Results file, JSON; a whole suite has one of its own.")
    ] = None,
) -> None:
    """Measure a suite on this machine."""
    whole = not (workload or provider)
    try:
        comparisons = select(suite, workload or (), provider or ())
        if not (whole or output):
            raise ValueError(f"a part of suite {suite} does not take the place of its results: give it an --output")
        torch.set_num_threads(threads)
        device, dtype = comparisons[0].device, comparisons[0].dtype
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"suite {suite} needs a CUDA GPU; there is none here")
        roofs = Roofs.measure(device, dtype)
        more = {"roofs": {"flops": roofs.flops, "bandwidth": roofs.bandwidth}, "missing": missing(comparisons)}
        results, failed = [], {}

        def fails(title: str, error: Exception) -> None:
            """On a GPU, whose time is dear: what was measured stays, whatever fails after it."""
            if device != "cuda":
                raise error
            failed[title] = _shortly(error)
            console.print(f"{title}: {failed[title]}", markup=False)

        def tried(title: str, step: Callable[[], Any], without: Any) -> Any:
            try:
                return step()
            except Exception as error:
                fails(title, error)
                return without

        if device == "cuda" and whole:
            more["seconds_a_layer"] = tried("host time of a layer", partial(seconds_a_layer, device, dtype), None)
        steps = {}
        for i, c in enumerate(comparisons, 1):
            title = f"{i}/{len(comparisons)} {c.workload} {c.mode}"
            alone = partial(lambda title, name, error: fails(f"{title}: {name}", error), title)
            steps[title] = partial(compare_providers, c, rounds, threads, roofs, left_out=alone)
        if whole and suite != "sweeps":
            more["missing"] |= rivals.missing(device)
            single = partial(
                compare_ops, Workload.named(comparisons[0].workload, device, dtype), rounds, threads, roofs
            )
            if device == "cuda":  # quick and telling: first, each on its own
                steps = {f"op {i + 1}/{NUM_OPS}": partial(single, only=i) for i in range(NUM_OPS)} | steps
            else:
                steps["single ops"] = single
        command = " ".join(["python -m benchmarks", *sys.argv[1:]])
        folder = file_name(torch.cuda.get_device_name()).removesuffix(".json") if device == "cuda" else RESULTS.name
        output = output or RESULTS.with_name(folder) / f"{suite}.json"
        keep = partial(save, output, command, threads, gpu=device == "cuda", **more)
        for title, step in steps.items():
            console.print(f"{title}: outputs compared ...")
            results += tried(title, partial(step, track=_progress(title)), [])
            if device == "cuda":
                keep(results, failed=failed)
        console.print("peak memory ...")
        results = tried("peak memory", partial(remember, comparisons, results, threads), results)
        keep(results, **({"failed": failed} if failed else {}))
    except ValueError as error:
        _stop(str(error))
    console.print(*rich_tables(load(output)), f"written to {output}", sep="\n")
    raise typer.Exit(bool(failed))


@app.command()
def profile(
    workload: Annotated[str, typer.Option(help="Of which pool, by kind of work.")] = TYPICAL,
    beside: Annotated[str, typer.Option(help="Of which mixture, by part.")] = BESIDE_LARGE,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Where the time goes on this machine's CPU: in the packed pool, and in a mixture beside its base encoder."""
    torch.set_num_threads(threads)
    try:
        pool, mixture = Workload.named(workload), Workload.named(beside)
        of_part, of_kind = parts(mixture), kinds(pool)
    except ValueError as error:
        _stop(str(error))
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    more = {"workload": workload, "shares": of_kind, "beside": beside, "parts": of_part}
    save(RESULTS / "profile.json", command, threads, [], **more)
    for kind, share in of_kind.items():
        console.print(f"{share:6.1%}  {kind}")
    for part, entry in of_part.items():
        console.print(f"{entry['seconds'] * 1e3:8.1f} ms {entry['flops'] / 1e9:8.1f} GFLOP  {part}")


@app.command()
def compare(old: FileArgument, new: FileArgument) -> None:
    """What became slower from one results file to another, beyond the noise of both; exit code 1 where anything did."""
    try:
        found = list(changes(load(old), load(new)))
    except ValueError as error:
        _stop(str(error))
    table = Table("workload or op", "provider", "speed-up before", "now", "")
    for change in found:
        before, now = (f"{s['median']:.2f} ({s['p20']:.2f} to {s['p80']:.2f})" for s in (change.old, change.new))
        table.add_row(change.subject, change.provider, before, now, change.verdict)
    console.print(table)
    raise typer.Exit(any(change.verdict == "slower" for change in found))


@app.command()
def page(
    results: Annotated[Path, typer.Option(file_okay=False, help="Folder of the results.")] = RESULTS,
) -> None:
    """Make docs/benchmarks.md, its pictures and the README's performance section from the committed results."""
    try:
        cpu, sweeps, profiled = (load(results / f"{name}.json") for name in ("cpu", "sweeps", "profile"))
        gpus = on_gpus(results.parent)
        for path in draw(cpu, sweeps, gpus, PICTURES):
            console.print(f"drawn: {path.relative_to(ROOT)}")
        PAGE.write_text(make_page(cpu, sweeps, profiled, gpus, PICTURES.name))
        fill(README, readme(cpu, profiled, gpus, PICTURES.relative_to(ROOT).as_posix()))
    except (OSError, ValueError) as error:
        _stop(str(error))


def _progress(title: str) -> Callable[[Iterable[int]], Iterable[int]]:
    return lambda rounds: track(rounds, title, console=console)


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _stop(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
