"""`python -m mowe_kernels.tune`: try every kernel on this machine's GPU, and write down what to use there.

Every kernel, forward and backward, must be as close to float64 as twice plain torch's error in the same type, its
results poisoned beforehand. The ops that are go into the table, and CUDA tensors get their kernels from then on; with
them the launch settings that were fastest, and the fastest attention. Ends with exit code 1 where a kernel was wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mowe_kernels import tables, use_backend
from mowe_kernels.tables import AttentionChoice, DeviceTable
from mowe_kernels.tune import driver
from mowe_kernels.tune.accuracy import errors, poisoned
from mowe_kernels.tune.cases import Case, Size, cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZE = Size()
TRYING = 0.6  # of the time, at most, for whether the kernels are right and for compiling the candidates


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mowe_kernels.tune", description=__doc__)
    parser.add_argument("--output", type=Path, help=f"folder for the table (default: {tables.user_folder()})")
    parser.add_argument("--minutes", type=float, default=5.0, help="when to stop looking for settings (default: 5)")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the op a process of `apart` tries
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to try the kernels on")
    from mowe_kernels.tune import search  # imports Triton

    device = torch.device("cuda", torch.cuda.current_device())
    if asked.only:
        with launched_by({}, device):
            said = list(wrong_results(cases(SIZE, device)[asked.only], DTYPES))
            print(json.dumps(said), flush=True)
            if not said:
                search.compile_candidates([asked.only], device)
        return 0
    folder, written = asked.output or tables.user_folder(), []
    _, wrong = measure(
        device,
        search.device_timer,
        asked.minutes,
        check=lambda ops: apart(ops, 60 * TRYING * asked.minutes),
        keep=lambda table: written.append(table.write(folder)),
    )
    print(f"written to {written[-1]}")
    return int(wrong)


def measure(
    device: torch.device,
    timer: Any,
    minutes: float,
    size: Size = SIZE,
    rows: int | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    check: Callable[[Sequence[str]], dict[str, list[str]]] | None = None,
    keep: Callable[[DeviceTable], Any] = lambda table: None,
) -> tuple[DeviceTable, bool]:
    """The table of a device, and whether a kernel was wrong; progress is printed. rows: of the tensors to time on.

    check: says what is wrong with the kernels of these ops; here, one after the other, without. keep: is given the
    table as often as something is added to it, so that what was found is not lost with what comes after.
    """
    from mowe_kernels.tune import search

    deadline = time.monotonic() + 60 * minutes
    tried = cases(size, device)
    found = check(list(tried)) if check else {op: list(wrong_results(each, dtypes)) for op, each in tried.items()}
    for op, said in found.items():
        print(f"{op}: {'; '.join(said) or 'right'}", flush=True)
    right = tuple(op for op, said in found.items() if not said)
    wrong = len(right) < len(found)
    settings: dict[str, Any] = {}
    choices: list[AttentionChoice] = []

    def kept() -> DeviceTable:
        name, capability = torch.cuda.get_device_name(device), tables.compute_capability(device.index or 0)
        table = DeviceTable(name, right, dict(settings), tuple(choices), versions(), capability)
        keep(table)
        return table

    table = kept()
    try:
        # Without those of a table that may be there: what stays as it is would be missing in the new one.
        with launched_by({}, device):
            for tuning in search.tunings(right, device, rows or search.ROWS):
                if time.monotonic() > deadline:
                    print("time is up: the settings not tried yet stay as they are")
                    break
                name = f"{tuning.name}, {tuning.key}"
                try:
                    chosen, fastest, plain = search.best(tuning, timer, deadline)
                except Exception as error:  # at this size even as it is: more shared memory than there is, say
                    print(f"{name} failed: {_shortly(error)}", flush=True)
                    wrong = True
                    continue
                said = "stays as it is" if chosen is search.UNCHANGED else f"{fastest:.3f} ms with {chosen}"
                print(f"{name}: {plain:.3f} ms, {said}", flush=True)
                if chosen is not search.UNCHANGED:
                    settings[name] = chosen
                    table = kept()
        if "varlen_attention" in right and time.monotonic() <= deadline:
            with launched_by(settings, device):
                for choice in search.attention_choices(device, timer, rows or search.ROWS):
                    print(choice, flush=True)
                    choices.append(choice)
                    table = kept()
    except Exception as error:  # after an access out of bounds nothing in this process reaches the device any more
        print(f"the search for settings broke off: {_shortly(error)}", flush=True)
        wrong = True
    return table, wrong


def launched_by(settings: Mapping[str, Any], device: torch.device) -> AbstractContextManager[None]:
    """Inside the `with` block, these measured settings hold, and not those of the device's table."""
    from mowe_kernels.triton._launch import assume, hardware

    return assume(hardware(device)._replace(tuned=settings))


def apart(ops: Sequence[str], seconds: float) -> dict[str, list[str]]:
    """What is wrong with the kernels of each op, tried side by side in processes of their own.

    A kernel that breaks its process, or never ends, takes no other with it. Who has not answered when the time is over
    is wrong.
    """
    deadline = time.monotonic() + seconds
    command = [sys.executable, "-m", "mowe_kernels.tune", "--only"]
    running = {op: subprocess.Popen([*command, op], stdout=subprocess.PIPE, text=True) for op in ops}
    found = {}
    for op, process in running.items():
        try:
            answer, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            answer, _ = process.communicate()
        said = next((line for line in answer.split("\n") if line.startswith("[")), None)
        found[op] = [f"no answer, exit code {process.returncode}"] if said is None else json.loads(said)
    return found


def wrong_results(its_cases: list[Case], dtypes: tuple[torch.dtype, ...]) -> Iterator[str]:
    """What is wrong with the kernels of an op."""
    from mowe_kernels.triton._launch import override

    for case in its_cases:
        try:
            with poisoned(), override(**case.settings):
                for dtype in dtypes if case.inputs else ():
                    for error in errors(case.op, case.inputs, case.rows, dtype, case.frozen):
                        if not error.passes:
                            yield f"{error.name} in {dtype}: error {error.error:.1e}, plain torch {error.by_torch:.1e}"
                if case.same is not None:
                    with use_backend("reference"):
                        expected = case.same()
                    with use_backend("triton"):
                        got = case.same()
                    if not all(map(torch.equal, got, expected)):
                        yield "integers that differ from plain torch's"
        except Exception as error:  # a kernel may fail in any way: it is then not in the table
            yield _shortly(error)


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def versions() -> dict[str, str]:
    import triton

    made_with = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return made_with | {"driver": driver()}


if __name__ == "__main__":
    sys.exit(main())
