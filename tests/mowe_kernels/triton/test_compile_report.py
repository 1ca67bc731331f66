from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import pytest

from mowe_kernels import compile_report
from mowe_kernels.compile_report import Outcome
from mowe_kernels.triton import _compilation
from mowe_kernels.triton._compilation import Compilation
from tests.mowe_kernels.triton.no_gpu import printed_by

FITS = {"registers": 128, "spills": 0, "shared": 1024, "ptx": "wgmma.mma_async wgmma.mma_async"}


def section(report: str, op: str) -> str:
    return re.search(rf"^## {op}\n.*?(?=^## |\Z)", report, re.DOTALL | re.MULTILINE)[0].strip()


@pytest.mark.parametrize("op", compile_report.ops())
def test_every_op_names_what_it_compiles(op):
    assert callable(importlib.import_module(f"mowe_kernels.triton.{op}").compilations)


def test_the_committed_report_holds_every_op():
    """What it says of them is checked by `python -m mowe_kernels.compile_report --check`, which takes minutes."""
    assert re.findall(r"^## (.*)$", compile_report.PATH.read_text(), re.MULTILINE) == compile_report.ops()


@pytest.mark.parametrize(
    ("committed", "code", "said"),
    [
        (lambda report: report, 0, ""),
        (lambda report: report.replace("| 32 |", "| 33 |"), 1, "differs from what the kernels compile to"),
        (lambda report: report.replace("with triton ", "with triton 0."), 0, "made with another Triton"),
        (lambda report: "", 1, "differs from what the kernels compile to"),
    ],
)
def test_check_compares_with_the_committed_report(monkeypatch, tmp_path, capsys, committed, code, said):
    outcomes = [Outcome("route_topk", "kernel", 80, 4, 32, 0, 0, "", "")]
    monkeypatch.setattr(compile_report, "compile_all", lambda names: outcomes)
    monkeypatch.setattr(compile_report, "PATH", tmp_path / "report.md")
    compile_report.PATH.write_text(committed(compile_report.table(outcomes)))
    assert compile_report.main(["route_topk", "--check"]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": 300000}, "wants 300000 bytes of shared memory"),
        ({"ptx": "mma.sync"}, "without wgmma"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_found(monkeypatch, change, problem):
    compiled = FITS | change
    kernel = SimpleNamespace(
        asm={"cubin": b"", "ptx": compiled["ptx"]}, metadata=SimpleNamespace(shared=compiled["shared"])
    )
    monkeypatch.setattr(_compilation, "compile_for", lambda compilation, capability: kernel)
    monkeypatch.setattr(compile_report, "_resources", lambda cubin: (compiled["registers"], compiled["spills"]))
    compilation = Compilation("name", None, {}, {}, num_warps=4, num_stages=1, matmul=True)
    outcome = compile_report._outcome("op", compilation, 90)
    assert problem in outcome.problem and bool(problem) == bool(outcome.problem)
    assert (problem or "2 wgmma") in compile_report.table([outcome])


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    def fail(compilation, capability):
        raise RuntimeError("no such layout")

    monkeypatch.setattr(_compilation, "compile_for", fail)
    outcome = compile_report._outcome("op", Compilation("name", None, {}, {}, 4, 1, False), 80)
    assert outcome.problem == "does not compile: no such layout"


INT64 = """
from dataclasses import replace
from mowe_kernels.triton import grouped_linear, mixture_project
from mowe_kernels.triton._compilation import compile_for

for op, kernel, *offsets in (
    (grouped_linear, "grouped_gemm_kernel", "p_offsets"),
    (mixture_project, "mixture_project_bwd_rows_kernel", "p_first", "p_last"),
):
    found = next(c for c in op.compilations(90) if c.kernel.__name__ == kernel)
    compile_for(replace(found, signature=found.signature | dict.fromkeys(offsets, "*i64")), 90)
print("compiled")
"""


def test_offsets_may_be_int64():
    assert printed_by(INT64) == "compiled"


def test_an_unknown_op(capsys):
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(["grouped_lineer"])
    assert stopped.value.code == 2
    assert "no kernels of grouped_lineer" in capsys.readouterr().err


def test_renewing_one_table_keeps_the_others():
    made = {op: Outcome(op, "kernel", 80, 4, 32, 0, 0, "", "") for op in "abc"}
    report = compile_report.table(list(made.values()))
    fresh = compile_report.table([made["b"]._replace(registers=1)])
    renewed = compile_report.renewed(report, fresh)
    assert compile_report.renewed("", report) == report
    assert [section(renewed, op) == section(report, op) for op in "abc"] == [True, False, True]
    assert section(renewed, "b") == section(fresh, "b")
    assert compile_report.renewed(report.replace("with triton", "with an older triton"), fresh) == fresh
