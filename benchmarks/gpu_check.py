"""`python -m benchmarks.gpu_check --out DIR`: everything a GPU is asked, in one command: its tests, then its suite.

Writes gpu.json, summary.md and tests.txt into DIR. Ends with exit code 1 where a test failed, 2 where there is no GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.measure import ROOT
from benchmarks.results import load
from benchmarks.tables import conditions, markdown

_MINUTES_OF_TESTS, _MINUTES_OF_SUITE = 4, 5
_ROUNDS = 5


def main(out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")]) -> None:
    """Run the GPU tests and the GPU suite, and write what came of them."""
    if not torch.cuda.is_available():
        typer.echo("error: no CUDA device: there is nothing to check here", err=True)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    results = (out / "gpu.json").resolve()
    tests = _run(["pytest", "-m", "gpu", "-q", "--durations=10"], out / "tests.txt", _MINUTES_OF_TESTS)
    suite = _run(
        ["benchmarks", "run", "--suite", "gpu", "--rounds", str(_ROUNDS), "--output", str(results)],
        out / "suite.txt",
        _MINUTES_OF_SUITE,
    )
    lines = [f"# {torch.cuda.get_device_name()}", "", f"Tests: {_last_line(out / 'tests.txt')}", ""]
    if suite == 0:
        report = load(results)
        lines += [conditions(report), "", markdown(report["results"])]
    else:
        lines += [f"The suite did not finish: {_last_line(out / 'suite.txt')}"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    Console().print(f"written to {out}")
    raise typer.Exit(tests != 0 or suite != 0)


def _run(module: list[str], log: Path, minutes: float) -> int:
    """Exit code of `python -m` with these arguments, its output in a file; 124 where it took too long."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *module], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=60 * minutes
            )
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {minutes} minutes\n")
            return 124
    return done.returncode


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().split("\n")
    return lines[-1].strip("= ")


if __name__ == "__main__":
    typer.run(main)
