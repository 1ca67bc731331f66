"""`python -m benchmarks run` on a GPU that is not there, its measurements stubbed out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import measure, suites
from benchmarks.catalogue import ALL
from benchmarks.floors import Roofs
from benchmarks.results import Result, load
from benchmarks.suites import Comparison
from benchmarks.workloads import Workload

SUITE = (
    Comparison("tiny8/speech/64", ("per_clip", "padded_loop", "packed"), memory=True, device="cuda"),
    Comparison("tiny8/speech/64", ("padded_loop", "packed_by_torch", "packed"), device="cuda"),
)


def result(comparison: Comparison, provider: str) -> Result:
    spread = {"median": 1.0, "p20": 1.0, "p80": 1.0}
    about = {"encoders": 8, "slots": 2, "seconds": [1.0]}
    baseline = comparison.providers[0]
    return Result(comparison.workload, provider, baseline, comparison.mode, "bfloat16", 2, spread, spread, about=about)


@pytest.mark.parametrize("failing", [None, "packed_by_torch", "per_clip", "memory"])
def test_what_fails_takes_nothing_else_with_it(monkeypatch, tmp_path, failing):
    asked = []

    def compare(comparison, *args, left_out, track):
        if failing == comparison.providers[0]:
            raise RuntimeError("broken")
        if failing in comparison.providers:
            left_out(failing, RuntimeError("broken"))
        return [result(comparison, name) for name in comparison.providers if name != failing]

    def peak_memory(wanted, threads):
        if failing == "memory":
            raise RuntimeError("broken")
        asked.extend((workload.name, provider) for workload, provider in wanted)
        return [{"before": 1, "peak": 2}] * len(wanted)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(Roofs, "measure", lambda *args: Roofs(1e12, 1e11))
    monkeypatch.setitem(suites.SUITES, "gpu", SUITE)
    monkeypatch.setattr(command, "seconds_a_layer", lambda *args: 1e-4)
    monkeypatch.setattr(command, "compare_ops", lambda *args, **how: [])
    monkeypatch.setattr(command, "compare_providers", compare)
    monkeypatch.setattr(suites, "peak_memory", peak_memory)

    done = CliRunner().invoke(command.app, ["run", "--suite", "gpu", "--output", str(tmp_path / "gpu.json")])
    assert done.exit_code == int(failing is not None), done.output
    report = load(tmp_path / "gpu.json")
    titles = {"packed_by_torch": "2/2 tiny8/speech/64 features: packed_by_torch", "memory": "peak memory"}
    titles["per_clip"] = "1/2 tiny8/speech/64 features"
    assert report.get("failed", {}) == ({titles[failing]: "RuntimeError: broken"} if failing else {})
    lost = {"packed_by_torch": 1, "per_clip": 3}
    assert len(report["results"]) == 6 - lost.get(failing, 0)
    assert len(asked) == len(set(asked)) == {"memory": 0, "per_clip": 2}.get(failing, 3)  # nobody twice
    remembered = [r["provider"] for r in report["results"] if r["memory"]]
    assert set(remembered) == {provider for _, provider in asked}


@pytest.mark.parametrize("name", ["per_clip", "padded_loop", "packed"])
def test_a_provider_that_fails_is_left_out_but_not_what_others_are_measured_by(monkeypatch, name):
    def broken(workload):
        raise RuntimeError("broken")

    monkeypatch.setattr(measure, "ALL", ALL | {name: replace(ALL[name], prepare=broken)})
    providers, workload, said = ("per_clip", "padded_loop", "packed"), Workload.named("tiny2/1s/1/k1"), {}
    with torch.no_grad():
        if name == "padded_loop":
            assert list(measure.prepare(workload, providers, said.__setitem__)) == ["per_clip", "packed"]
            assert str(said["padded_loop"]) == "broken"
        for alone in (None, said.__setitem__) if name != "padded_loop" else (None,):
            with pytest.raises(RuntimeError, match="broken"):
                measure.prepare(workload, providers, alone)
