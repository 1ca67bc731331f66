"""`python -m mowe_kernels.compile_report`: every Triton kernel compiled for every architecture, without a GPU.

Ends with exit code 1 where a kernel does not compile, spills registers, wants more shared memory than the
architecture has, or multiplies matrices without matrix instructions (`wgmma` on sm_90); with `--check` also where the
committed table says otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mowe_kernels.backend import MADE_OF

if TYPE_CHECKING:
    from mowe_kernels.triton._compilation import Compilation

CAPABILITIES = (80, 86, 89, 90, 100)
PATH = Path(__file__).parents[1] / "benchmarks" / "compile_report.md"
# As PTX spells them. Where the newest there is has no use for a type or a shape, an older one will do, but on sm_90,
# where only `wgmma` reaches the rate of the hardware.
MATRIX_INSTRUCTIONS = {80: ("mma.sync",), 90: ("wgmma.mma_async",), 100: ("tcgen05.mma", "mma.sync")}


class Outcome(NamedTuple):
    """What became of one compilation: registers a thread, spilled bytes a thread, shared memory in bytes."""

    op: str
    name: str
    capability: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    matrix: str
    problem: str


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mowe_kernels.compile_report", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops (default: all)")
    parser.add_argument("--write", action="store_true", help=f"renew their tables in benchmarks/{PATH.name}")
    parser.add_argument("--check", action="store_true", help=f"fail where benchmarks/{PATH.name} says otherwise")
    asked = parser.parse_args(arguments)
    known = ops()
    if unknown := sorted(set(asked.ops) - set(known)):
        parser.error(f"no kernels of {', '.join(unknown)}; there are {', '.join(known)}")
    outcomes = compile_all(asked.ops or known)
    text = table(outcomes)
    print(text, end="")
    if asked.write:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(renewed(PATH.read_text() if PATH.exists() else "", text))
    committed = PATH.read_text() if PATH.exists() else ""
    differs = False
    if asked.check and committed and _header(committed) != _header(text):
        print(f"{PATH.name} was made with another Triton: its numbers are not compared", file=sys.stderr)
    elif asked.check and (differs := renewed(committed, text) != committed):
        print(f"{PATH.name} differs from what the kernels compile to; renew it with --write", file=sys.stderr)
    problems = [outcome for outcome in outcomes if outcome.problem]
    for outcome in problems:
        print(f"{outcome.name} on sm_{outcome.capability}: {outcome.problem}", file=sys.stderr)
    return bool(problems or differs)


def ops() -> list[str]:
    """The modules of mowe_kernels.triton that hold an op and kernels for it."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "triton")]))
    return [name for name in names if not name.startswith("_") and name not in MADE_OF]


def compile_all(names: list[str]) -> list[Outcome]:
    """Every compilation of these ops for every architecture, in two processes."""
    jobs = [(op, capability) for op in names for capability in CAPABILITIES]
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "initializer": _without_interpreter}
    with ProcessPoolExecutor(2, **fresh) as pool:
        return [outcome for outcomes in pool.map(_compile, *zip(*jobs, strict=True)) for outcome in outcomes]


def table(outcomes: list[Outcome]) -> str:
    """The report in Markdown, a section an op, a row a compilation."""
    import triton

    lines = [
        "# What the kernels compile to",
        "",
        f"Made by `python -m mowe_kernels.compile_report --write` with triton {triton.__version__}.",
        "Registers and spilled bytes are of one thread, shared memory is of one program.",
    ]
    for op in dict.fromkeys(outcome.op for outcome in outcomes):
        lines += [
            "",
            f"## {op}",
            "",
            "| kernel | architecture | warps | registers | spilled bytes | shared KiB | matrix instructions |",
            "|---|---|---|---|---|---|---|",
        ]
        for o in outcomes:
            if o.op == op:
                cells = (o.name, f"sm_{o.capability}", o.num_warps, o.registers, o.spills, f"{o.shared / 1024:.1f}")
                lines.append(f"| {' | '.join(map(str, cells))} | {o.problem or o.matrix} |")
    return "\n".join(lines) + "\n"


def renewed(old: str, new: str) -> str:
    """A report with the sections of the new one, and those of the old one that it lacks, if one Triton made both."""
    header, *sections = new.split("\n## ")
    old_sections = old.split("\n## ")[1:]
    kept = old_sections if _header(old) == _header(new) else []
    by_op = {section.split("\n")[0]: section.strip("\n") for section in kept}
    by_op |= {section.split("\n")[0]: section.strip("\n") for section in sections}
    return "\n\n## ".join([header.strip("\n"), *(by_op[op] for op in sorted(by_op))]) + "\n"


def _header(report: str) -> str:
    return report.split("\n## ")[0].strip("\n")


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # what the interpreter runs is never compiled


def _compile(op: str, capability: int) -> list[Outcome]:
    module = importlib.import_module(f"mowe_kernels.triton.{op}")
    return [_outcome(op, compilation, capability) for compilation in module.compilations(capability)]


def _outcome(op: str, compilation: Compilation, capability: int) -> Outcome:
    from mowe_kernels.triton._compilation import compile_for
    from mowe_kernels.triton._launch import ARCHITECTURES

    try:
        kernel = compile_for(compilation, capability)
    except Exception as error:  # the compiler may raise anything; the report names the kernel and goes on
        problem = f"does not compile: {' '.join(str(error.__cause__ or error).split())[:200]}"
        return Outcome(op, compilation.name, capability, compilation.num_warps, 0, 0, 0, "", problem)
    registers, spills = _resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    wanted = MATRIX_INSTRUCTIONS[max(c for c in MATRIX_INSTRUCTIONS if c <= capability)]
    counts = {name: kernel.asm["ptx"].count(name) for name in wanted}
    matrix = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    problems = (
        (spills, f"spills {spills} bytes"),
        (shared > (limit := ARCHITECTURES[capability].shared), f"wants {shared} bytes of shared memory of {limit}"),
        (compilation.matmul and not matrix, f"multiplies matrices without {' or '.join(wanted)}"),
    )
    problem = "; ".join(message for wrong, message in problems if wrong)
    return Outcome(op, compilation.name, capability, compilation.num_warps, registers, spills, shared, matrix, problem)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; kernels without arrays of their own have a stack only for spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout.decode()).groups()
    return int(registers), int(stack)


@cache
def _cuobjdump() -> str:
    import triton

    return triton.knobs.nvidia.cuobjdump.path


if __name__ == "__main__":
    sys.exit(main())
