"""Two results files side by side, from Python and from the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.compare import changes
from tests.benchmarks.reports import report, result


def verdicts(before: float, now: float) -> list[str]:
    old, new = (report(result("per_clip", 1.0), result("packed", speedup)) for speedup in (before, now))
    return [change.verdict for change in changes(old, new)]


def test_verdicts():
    assert verdicts(5.0, 4.0) == ["slower"]
    assert verdicts(5.0, 6.0) == ["faster"]
    assert verdicts(5.0, 4.8) == ["same"]  # their spreads overlap


@pytest.mark.parametrize(("name", "value"), [("device", "another CPU"), ("threads", 4)])
def test_another_machine(name, value):
    with pytest.raises(ValueError, match=f"results of different {name}s cannot be compared"):
        list(changes(report(result("packed", 5.0)), report(result("packed", 5.0), **{name: value})))


def test_nothing_in_common():
    with pytest.raises(ValueError, match="no measurement in common"):
        list(changes(report(result("packed", 5.0)), report(result("packed", 5.0, subject="tiny8/short/8"))))


@pytest.mark.parametrize(("now", "code"), [(5.0, 0), (4.0, 1)])
def test_command(tmp_path, now, code):
    for name, speedup in (("old", 5.0), ("new", now)):
        (tmp_path / name).write_text(json.dumps(report(result("packed", speedup))))
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert done.exit_code == code
    assert ("slower" in done.stdout) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--suite", "nope"], "unknown suite 'nope'; expected one of cpu, gpu, sweeps"),
        (["run", "--workload", "x"], "unknown workload 'x'"),
        (["run", "--provider", "x"], "unknown provider 'x'"),
        (["run", "--suite", "sweeps", "--provider", "naive"], "nothing of suite sweeps is left"),
        (["run", "--suite", "sweeps", "--workload", "tiny8/1s/4"], "a part of suite sweeps does not take the place"),
        (["compare", "nope.json", "nope.json"], "nope.json: No such file or directory"),
        (["compare", "text", "text"], "text: expected a results file, JSON"),
        (["compare", "older", "older"], "older: expected results of schema 3, got 1"),
        (["compare", "here", "there"], "results of different devices cannot be compared: 'a CPU' and 'another'"),
        (["run", "--workload", ""], "unknown workload ''; suite cpu has tiny8/speech/8"),
        (["profile", "--workload", "tiny8/nap/8"], "unknown workload 'tiny8/nap/8'; expected pool/mix/clips"),
        (["profile", "--beside", "hubert1/1s/1"], "hubert1/1s/1: no base encoder; there is one beside tiny2"),
        (["page", "--results", "."], "cpu.json: No such file or directory"),
    ],
)
def test_bad_input(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no results")
    (tmp_path / "older").write_text('{"schema": 1}')
    for name, device in (("here", "a CPU"), ("there", "another")):
        (tmp_path / name).write_text(json.dumps(report(result("packed", 5.0), device=device)))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
