"""`python -m recipes.nano`: the whole lab, or a part of it. What is finished is not done again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from recipes.nano.jobs import do

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)

Lab = Annotated[Path, typer.Option(metavar="DIR", help="where data, parts, runs and results go")]
Workers = Annotated[int, typer.Option(min=1, help="processes at once, each with one thread on the CPU")]
Only = Annotated[list[str] | None, typer.Option(metavar="NAME", help="this one alone, repeatable")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Results = Annotated[Path | None, typer.Option(metavar="DIR", help="result files; those of the lab by default")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="the report, .md; in the lab by default")]
Shipped = Annotated[Path, typer.Option(metavar="DIR", help="where the model, its scores and its card go")]
Smoke = Annotated[Path, typer.Option(metavar="DIR", help="where the clips, their manifests and the model go")]

LAB = Path("nano-lab")
CORES = len(os.sched_getaffinity(0))
_screen = Console(stderr=True)


@app.command()
def data(lab: Lab = LAB, workers: Workers = CORES) -> None:
    """Make the clips with espeak-ng and numpy, and list the real recordings where they are installed."""
    from recipes.nano import recordings
    from recipes.nano.data import build
    from recipes.nano.settings import SETTINGS

    build(lab / "data", SETTINGS.seed, workers, lambda clips, count: track(clips, "clips", count, console=_screen))
    if not recordings.build(lab / "data", SETTINGS.seed):
        _screen.print("note: asterisk-core-sounds-{en,es,fr,it,ru}-wav are not installed: no test on real recordings")


@app.command()
def pretrain(lab: Lab = LAB, only: Only = None, workers: Workers = CORES, device: Device = "auto") -> None:
    """Pre-train the base encoders, the pools and the language model."""
    from recipes.nano.parts import PARTS, make_part

    do("part", make_part, [(lab, name) for name in _chosen(PARTS, only)], workers, device)


@app.command()
def runs(lab: Lab = LAB, only: Only = None, workers: Workers = CORES, device: Device = "auto") -> None:
    """Train and evaluate the compared models."""
    from recipes.nano.runs import jobs, run

    chosen = _chosen([name for name, _ in jobs()], only)
    do("run", run, [(lab, name, seed) for name, seed in jobs() if name in chosen], workers, device)


@app.command()
def report(lab: Lab = LAB, results: Results = None, out: Out = None) -> None:
    """Write the report and its pictures from the result files."""
    from recipes.nano.report import write_report

    results = results or lab / "results"
    if not any(results.glob("*.json")):
        raise typer.BadParameter(f"--results {results}: no result files, expected the folder that the runs wrote")
    write_report(results, out or lab / "reproduction.md")


@app.command()
def ship(lab: Lab = LAB, out: Shipped = Path("mowe/assets/nano")) -> None:
    """Train the diverse pool in twice the steps, and write the model that the package ships."""
    from recipes.nano.ship import ship

    ship(lab, out)


@app.command()
def smoke(out: Smoke = Path("nano-smoke")) -> None:
    """Make what `mowe train recipes/nano/smoke.yaml` needs: a few sounds and an untrained model, without espeak-ng."""
    from recipes.nano.smoke import build

    build(out)


@app.command("all")
def everything(lab: Lab = LAB, workers: Workers = CORES, device: Device = "auto") -> None:
    """Data, pre-training, runs and report. In a new lab the time of it all is kept for the report."""
    is_new, started = not lab.exists(), time.perf_counter()
    data(lab, workers)
    pretrain(lab, None, workers, device)
    runs(lab, None, workers, device)
    if is_new:
        from recipes.nano.results import write_result

        took = {"wall_seconds": round(time.perf_counter() - started), "processes": workers}
        write_result(lab / "results" / "parts" / "all.json", {"part": "all", **took})
    report(lab)


def _chosen(names: Iterable[str], only: list[str] | None) -> list[str]:
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise typer.BadParameter(f"--only: no {', '.join(unknown)}; there are {', '.join(dict.fromkeys(names))}")
    return only or list(names)


if __name__ == "__main__":
    app()
