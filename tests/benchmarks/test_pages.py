"""Pages and pictures made from results, and the committed ones."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import PAGE, PICTURES, README, RESULTS
from benchmarks.page import page, readme
from benchmarks.pictures import _speedups, draw
from benchmarks.results import load, on_gpus
from benchmarks.tables import BEGIN, END, fill, rich_tables, speedup, title
from tests.benchmarks.reports import BASELINES, report, result

CPU = report(
    *(
        result(provider, speedup, mode=mode)
        for mode, own in (
            ("features", "packed"), ("whole", "mixture"), ("step", "packed_step"), ("frozen step", "mixture_step")
        )
        for provider, speedup in ((BASELINES[mode], 1.0), (own, 5.0))
    ),
    *(
        result(provider, speedup, mode=mode, subject="grouped_linear")
        for mode in ("forward", "backward")
        for provider, speedup in (("loop", 1.0), ("packed", 1.5))
    ),
)  # fmt: skip
SWEEPS = report(
    *(
        result(provider, speedup, sweep={"axis": "encoders in the pool", "value": value})
        for value in (2, 4)
        for provider, speedup in (("padded_loop", 1.0), ("packed", 4.0))
    )
)

PARTS = {"base encoder": (2.0, 1e11), "routers": (0.01, 0.0), "pool": (0.07, 4e9), "projector": (0.02, 1e9)}
PROFILED = report(
    workload="tiny8/speech/8",
    shares={"matrix products": 0.75, "attention": 0.25},
    beside="tiny2/8s/1",
    parts={name: {"seconds": seconds, "flops": flops} for name, (seconds, flops) in PARTS.items()},
)


OF_64_CLIPS = (
    "- tiny8/speech/64, features of the chosen encoders: transformers, each clip and slot alone, from waveforms;"
)


def test_page_says_what_was_measured_and_what_was_not():
    text = page(CPU, SWEEPS, PROFILED, {}, "benchmarks")
    assert "| one packed pass, from waveforms | 0.20 s | 5.00 | 4.75 to 5.25 | 25% | 1024 MiB |" in text
    assert "- transformers under torch.compile, one batch an encoder, features given: torch.compile needs a" in text
    assert "| matrix products | 75.0% |" in text
    assert "| pool | 70.0 | 4.0 | 3.5% | 4.0% |" in text
    assert "Not measured yet" in text and OF_64_CLIPS in text


def test_page_says_what_was_measured_on_a_gpu():
    packed = [result(name, 5.0, subject="tiny8/speech/64") for name in ("per_clip", "padded_loop", "packed")]
    gpu = report(*packed, seconds_a_layer=123e-6) | {"device": "Some GPU"}
    text = page(CPU, SWEEPS, PROFILED, {"some-gpu": gpu}, "benchmarks")
    assert "takes the host 123 us." in text
    assert "## On Some GPU" in text and "(benchmarks/some-gpu-speedup.png)" in text
    assert OF_64_CLIPS not in text
    assert "- tiny8/speech/64, features of the chosen encoders: transformers with bitsandbytes' Linear4bit" in text


def test_readme_shows_what_a_newcomer_wants_to_know():
    text = readme(CPU, PROFILED, {}, "docs/benchmarks")
    assert "| features of a pool: 2 clips of 2.0 to 9.5 s | transformers, each clip" in text and "| **5.0x** |" in text
    assert "add 4.0% to the time of a Whisper-large base encoder, with the projector 5.0%" in text


def test_no_speedup_where_the_spread_is_larger():
    assert speedup(result("packed", 1.02)) == "no difference"
    assert speedup(result("packed", 1.2)) == "1.20"
    assert speedup(result("per_clip", 1.0)) == "1.00"


def test_screen_shows_a_table_for_each_subject():
    assert len(list(rich_tables(CPU))) == 6


def test_pictures(tmp_path):
    paths = draw(CPU, SWEEPS, {"some-gpu": CPU}, tmp_path)
    assert {path.stem for path in paths} == {
        *("overview", "speedup", "memory", "floor", "sweeps", "some-gpu-speedup", "some-gpu-floor")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_comparisons_of_one_workload_are_drawn_apart():
    rows = [
        result(provider, speedup, baseline=baseline)
        for baseline in ("per_clip", "nf4_loop")
        for provider, speedup in ((baseline, 1.0), ("packed", 5.0))
    ]
    (axes,) = _speedups(report(*rows), "somewhere").axes
    shown = [text.get_text() for text in axes.texts]
    assert shown.count(title(rows[0])) == 2


@pytest.mark.parametrize("ops", [True, False], ids=["ops", "workloads"])
def test_a_run_on_a_gpu_that_was_stopped(tmp_path, ops):
    """Nothing is drawn, linked or announced of what it did not come to."""
    gpu = report(*(r for r in CPU["results"] if (r["mode"] in ("forward", "backward")) == ops))
    there, absent = ("floor", "speedup") if ops else ("speedup", "floor")
    drawn = {path.stem for path in draw(CPU, SWEEPS, {"some-gpu": gpu}, tmp_path)}
    on_gpu = page(CPU, SWEEPS, PROFILED, {"some-gpu": gpu}, "benchmarks").split("\n## On ")[-1]
    for name, expected in ((f"some-gpu-{there}", True), (f"some-gpu-{absent}", False)):
        assert (name in drawn) == (f"{name}.png" in on_gpu) == expected
    assert ("### Single ops" in on_gpu) == ops and ("### Training the pool" in on_gpu) != ops
    assert "the same pools" not in readme(CPU, PROFILED, {"some-gpu": gpu}, "docs/benchmarks")


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
    gpus = on_gpus(RESULTS.parent)
    assert PAGE.read_text() == page(cpu, sweeps, profiled, gpus, PICTURES.name)
    assert readme(cpu, profiled, gpus, "docs/benchmarks") in README.read_text()
