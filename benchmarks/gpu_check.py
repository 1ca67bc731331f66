"""`python -m benchmarks.gpu_check --out DIR`: everything a GPU is asked, in one command: its table, tests and suite.

Writes gpu.json, summary.md, the device's table and a log of each step into DIR, within nine minutes. Ends with exit
code 1 where a kernel or a test failed, 2 where there is no GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.measure import ROOT
from benchmarks.results import load
from benchmarks.tables import conditions, markdown
from mowe_kernels import tables

_MINUTES, _MINUTES_OF_TABLE, _MINUTES_OF_TESTS = 8.8, 2.5, 3.3  # the suite has what is left
_ROUNDS = 5


def main(out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")]) -> None:
    """Try the kernels, run the GPU tests and the GPU suite, and write what came of them."""
    if not torch.cuda.is_available():
        typer.echo("error: no CUDA device: there is nothing to check here", err=True)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    started, results = time.monotonic(), (out / "gpu.json").resolve()
    # The suite then runs with the kernels that were found right, and as they were found fastest.
    search = ["--minutes", str(_MINUTES_OF_TABLE - 0.5)]
    table = _run(["mowe_kernels.tune", *search], out / "table.txt", _MINUTES_OF_TABLE)
    made = tables.user_folder() / tables.file_name(torch.cuda.get_device_name())
    if made.is_file():
        shutil.copy(made, out)
    tests = _run(["pytest", "-m", "gpu", "-q", "--durations=10"], out / "tests.txt", _MINUTES_OF_TESTS)
    suite = _run(
        ["benchmarks", "run", "--suite", "gpu", "--rounds", str(_ROUNDS), "--output", str(results)],
        out / "suite.txt",
        _MINUTES - (time.monotonic() - started) / 60,
    )
    lines = [f"# {torch.cuda.get_device_name()}", ""]
    lines += [f"Kernels: {_last_line(out / 'table.txt')}", "", f"Tests: {_last_line(out / 'tests.txt')}", ""]
    if suite == 0:
        report = load(results)
        lines += [conditions(report), "", markdown(report["results"])]
    else:
        lines += [f"The suite did not finish: {_last_line(out / 'suite.txt')}"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    Console().print(f"written to {out}")
    raise typer.Exit(any((table, tests, suite)))


def _run(module: list[str], log: Path, minutes: float) -> int:
    """Exit code of `python -m` with these arguments, its output in a file; 124 where it took too long."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *module], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=60 * minutes
            )
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {minutes:.1f} minutes\n")
            return 124
    return done.returncode


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().split("\n")
    return lines[-1].strip("= ")


if __name__ == "__main__":
    typer.run(main)
