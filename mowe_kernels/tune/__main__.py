"""`python -m mowe_kernels.tune`: try every kernel on this machine's GPU, and write down what to use there.

Every kernel, forward and backward, must be as close to float64 as twice plain torch's error in the same type, its
results poisoned beforehand. The ops that are go into the table, and CUDA tensors get their kernels from then on; with
them the launch settings that were fastest, and the fastest attention. Ends with exit code 1 where a kernel was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mowe_kernels import tables, use_backend
from mowe_kernels.tables import DeviceTable
from mowe_kernels.tune.accuracy import errors, poisoned
from mowe_kernels.tune.cases import Case, Size, cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZE = Size()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mowe_kernels.tune", description=__doc__)
    parser.add_argument("--output", type=Path, help=f"folder for the table (default: {tables.user_folder()})")
    parser.add_argument("--minutes", type=float, default=5.0, help="when to stop looking for settings (default: 5)")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to try the kernels on")
    from mowe_kernels.tune.search import device_timer  # imports Triton

    table, wrong = measure(torch.device("cuda", torch.cuda.current_device()), device_timer, asked.minutes)
    print(f"written to {table.write(asked.output or tables.user_folder())}")
    return int(wrong)


def measure(
    device: torch.device,
    timer: Any,
    minutes: float,
    size: Size = SIZE,
    rows: int | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> tuple[DeviceTable, bool]:
    """The table of a device, and whether a kernel was wrong; progress is printed. rows: of the tensors to time on."""
    from mowe_kernels.tune import search

    deadline = time.monotonic() + 60 * minutes
    right, wrong = [], False
    for op, its_cases in cases(size, device).items():
        said = list(wrong_results(its_cases, dtypes))
        print(f"{op}: {'; '.join(said) or 'right'}", flush=True)
        wrong |= bool(said)
        if not said:
            right.append(op)
    settings, choices = {}, []
    for tuning in search.tunings(right, device, rows or search.ROWS):
        if time.monotonic() > deadline:
            print("time is up: the settings not tried yet stay as they are")
            break
        name = f"{tuning.name}, {tuning.key}"
        chosen, fastest, plain = search.best(tuning, timer)
        said = "stays as it is" if chosen is search.UNCHANGED else f"{fastest:.3f} ms with {chosen}"
        print(f"{name}: {plain:.3f} ms, {said}", flush=True)
        if chosen is not search.UNCHANGED:
            settings[name] = chosen
    if "varlen_attention" in right and time.monotonic() <= deadline:
        for choice in search.attention_choices(device, timer, rows or search.ROWS):
            print(choice, flush=True)
            choices.append(choice)
    name = torch.cuda.get_device_name(device)
    return DeviceTable(name, tuple(right), settings, tuple(choices), versions()), wrong


def wrong_results(its_cases: list[Case], dtypes: tuple[torch.dtype, ...]) -> Iterator[str]:
    """What is wrong with the kernels of an op."""
    for case in its_cases:
        try:
            with poisoned():
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
            yield f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def versions() -> dict[str, str]:
    import triton

    driver = str(torch._C._cuda_getDriverVersion()) if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda), "driver": driver}


if __name__ == "__main__":
    sys.exit(main())
