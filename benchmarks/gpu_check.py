"""`python -m benchmarks.gpu_check --out DIR`: everything a GPU is asked, in one command: its table, tests and suite.

Writes gpu.json, summary.md, the device's table and a log of each step into DIR, within nine minutes; what is there
stays if the command is stopped. Ends with the summary on the screen, and with exit code 1 where a kernel or a test
failed, 2 where there is no GPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Annotated

import torch
import typer

from benchmarks.measure import ROOT
from benchmarks.results import load
from benchmarks.suites import SUITES
from benchmarks.tables import conditions, markdown
from mowe_kernels import tables

_MINUTES, _MINUTES_OF_TABLE, _MINUTES_OF_TESTS = 8.8, 2.5, 2.5  # the suite has what is left
_ROUNDS = 5
_THREADS = min(8, os.cpu_count() or 1)  # of the suite, for what providers ask of the host
_AT_ONCE = max(6, (os.cpu_count() or 1) // 2)  # tests, most of whose time goes to compiling
_COMPILED = (
    "packed",
    "packed_nf4",
    "packed_step",
    "mixture",
    "mixture_step",
    "padded_loop_compiled",
    "packed_by_torch",
)
_SLOWEST = ("out_of_bounds", "torch_compile")  # of the tests: first, so that nobody waits for them in the end
_WIDTH, _LINES = 200, 40  # of what the summary quotes from a log


def main(out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")]) -> None:
    """Try the kernels, run the GPU tests and the GPU suite, and write what came of them."""
    if not torch.cuda.is_available():
        typer.echo("error: no CUDA device: there is nothing to check here", err=True)
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "table.txt", "tests.txt", "suite.txt"):
        (out / name).unlink(missing_ok=True)  # of an earlier check, which the summary would take for this one's
    started, results = time.monotonic(), (out / "gpu.json").resolve()
    # The suite then runs with the kernels that were found right, and as they were found fastest.
    search = ["--minutes", str(_MINUTES_OF_TABLE - 0.5)]
    codes = [_run(["mowe_kernels.tune", *search], out / "table.txt", _MINUTES_OF_TABLE)]
    made = tables.user_folder() / tables.file_name(torch.cuda.get_device_name())
    if made.is_file():
        shutil.copy(made, out)
    _summarize(out)
    codes.append(_test(out / "tests.txt", _MINUTES_OF_TESTS))
    _summarize(out)
    suite = ["benchmarks", "run", "--suite", "gpu", "--rounds", str(_ROUNDS), "--threads", str(_THREADS)]
    left = _MINUTES - (time.monotonic() - started) / 60
    codes.append(_run([*suite, "--output", str(results)], out / "suite.txt", left))
    typer.echo(f"{_summarize(out)}written to {out}")
    raise typer.Exit(any(codes))


def _run(module: list[str], log: Path, minutes: float, by: tuple[str, ...] = ()) -> int:
    """Exit code of `python -m` with these arguments, its output in a file; 124 where it took too long. by: what starts
    it, if not this process itself.

    What it started ends with it: the memory checker, say, would go on beside what is timed next.
    """
    command = [*by, sys.executable, "-m", *module]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {minutes:.1f} minutes\n")
            return 124
        finally:
            with suppress(ProcessLookupError):  # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _test(log: Path, minutes: float) -> int:
    """The GPU tests, each function in a process of its own: after an access out of bounds nothing in that process
    reaches the device any more. Beside them, what the suite will want compiled.
    """
    deadline, lock = time.monotonic() + 60 * minutes, Lock()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as pool, _compiling(deadline):
        listed = Path(folder, "listed")
        _run(["pytest", "tests/gpu", "-m", "gpu", "--collect-only", "-q"], listed, minutes)
        lines = listed.read_text().split("\n")
        # Each type has kernels of its own to be compiled, hence a process of its own too.
        names = sorted(
            dict.fromkeys(re.sub(r"\[(?!torch\.).*", "", line) for line in lines if "::" in line),
            key=lambda name: not any(part in name for part in _SLOWEST),
        )
        if not names:
            log.write_text(listed.read_text())
            return 1

        def run(number: int, name: str) -> int:
            own = Path(folder, str(number))
            code = _run(["pytest", "-m", "gpu", "-q", "-rfs", "--tb=short", name], own, _minutes_until(deadline))
            with lock, log.open("a") as file:
                file.write(f"{own.read_text()}{'' if code == 0 else f'FAILED with exit code {code}: '}{name}\n")
            return code

        log.write_text("")
        codes = list(pool.map(run, range(len(names)), names))
        with log.open("a") as file:
            file.write(f"{codes.count(0)} of {len(codes)} passed\n")
        return int(any(codes))


@contextmanager
def _compiling(deadline: float) -> Iterator[None]:
    """Beside the `with` block, but behind what runs there, run once what the suite will want compiled, which times one
    after the other: compilers keep on disk what they made.
    """
    wanted = dict.fromkeys(
        (c.workload, c.device, c.dtype, name) for c in SUITES["gpu"] for name in c.providers if name in _COMPILED
    )

    def run(given: tuple[str, ...]) -> None:
        later = ("nice", "-n", "10", "env", "TORCHINDUCTOR_COMPILE_THREADS=2")
        _run(["benchmarks.memory", json.dumps([given]), "1"], Path(os.devnull), _minutes_until(deadline), later)

    with ThreadPoolExecutor(_AT_ONCE // 2) as pool:
        for given in wanted:
            pool.submit(run, given)
        yield


def _minutes_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic()) / 60


def _summarize(out: Path) -> str:
    """Write summary.md of the steps that have begun, and give its text: what was measured, then what went wrong."""
    lines, results = [f"# {torch.cuda.get_device_name()}", ""], out / "gpu.json"
    if results.is_file():
        report = load(results)
        lines += [conditions(report), "", markdown(report["results"]), ""]
        lines += [f"- not measured: {name}: {said}" for name, said in report.get("failed", {}).items()] + [""]
    for title, name, telling in (
        ("Kernels", "table.txt", r"^\w+: (?!right)| failed: |broke off"),
        ("Tests", "tests.txt", r"^FAILED|^ERROR|^SKIPPED|^stopped"),
        ("Suite", "suite.txt", r"left out|Error|^stopped"),
    ):
        if (out / name).is_file():
            lines += [f"{title}: {_last_line(out / name)}", "", *_quoted(out / name, telling), ""]
    text = "\n".join(lines)
    (out / "summary.md").write_text(text)
    return text


def _quoted(log: Path, telling: str) -> Iterator[str]:
    """The lines of a log that say what went wrong, none too long, not too many."""
    found = [line for line in log.read_text().split("\n") if re.search(telling, line)]
    yield from (f"- {line[:_WIDTH]}" for line in found[:_LINES])
    if len(found) > _LINES:
        yield f"- and {len(found) - _LINES} more lines in {log.name}"


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().split("\n")
    return lines[-1].strip("= ")[:_WIDTH]


if __name__ == "__main__":
    typer.run(main)
