"""Pages and pictures made from results, and the committed ones."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import PAGE, PICTURES, README, RESULTS
from benchmarks.page import page, readme
from benchmarks.pictures import draw
from benchmarks.results import load
from benchmarks.tables import BEGIN, END, fill, rich_tables
from tests.benchmarks.reports import report, result

CPU = report(
    result("per_clip", 1.0),
    result("packed", 5.0),
    result("naive", 1.0, mode="whole"),
    result("mixture", 4.0, mode="whole"),
    result("padded_loop_step", 1.0, mode="step"),
    result("packed_step", 3.0, mode="step"),
    result("loop", 1.0, mode="op", subject="grouped_linear"),
    result("packed", 1.5, mode="op", subject="grouped_linear"),
)
SWEEPS = report(
    *(
        result(provider, speedup, sweep={"axis": "encoders in the pool", "value": value})
        for value in (2, 4)
        for provider, speedup in (("padded_loop", 1.0), ("packed", 4.0))
    )
)

PROFILED = report(workload="tiny8/speech/8", shares={"matrix products": 0.75, "attention": 0.25})


def test_page_says_what_was_measured_and_what_was_not():
    text = page(CPU, SWEEPS, PROFILED, "benchmarks")
    assert "| one packed pass, from waveforms | 0.20 | 5.00 | 4.75 to 5.25 | 25% | 1024 MiB |" in text
    assert "Not run here: padded_loop_compiled, torch.compile needs a C++ compiler." in text
    assert "| matrix products | 75.0% |" in text
    assert "| tiny8/speech/8 | not measured yet |" in text


def test_screen_shows_a_table_for_each_subject():
    assert len(list(rich_tables(CPU))) == 4


def test_pictures(tmp_path):
    paths = draw(CPU, SWEEPS, tmp_path)
    assert {path.name for path in paths} == {"speedup.png", "memory.png", "floor.png", "sweeps.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_only_what_is_between_the_markers_changes(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(path, "new")
    assert path.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="expected the lines"):
        fill(path, "new")


def test_committed_pages_are_those_of_the_committed_results():
    cpu, sweeps, profiled = (load(RESULTS / f"{name}.json") for name in ("cpu", "sweeps", "profile"))
    assert PAGE.read_text() == page(cpu, sweeps, profiled, PICTURES.name)
    assert readme(cpu, "docs/benchmarks") in README.read_text()
