"""The one command for a GPU: its steps, and what it writes, with the steps stubbed out."""

from __future__ import annotations

import json
import time

import pytest
import torch
import typer

from benchmarks import gpu_check
from mowe_kernels import tables
from mowe_kernels.tables import DeviceTable

COLLECTED = """tests/gpu/a.py::test_y[plain-(1, 1)]
tests/gpu/a.py::test_y[nested-(1, 1)]
tests/gpu/a.py::test_z[torch.float16]

3 tests collected in 1.00s
"""


@pytest.mark.parametrize("failing", [None, "mowe_kernels.tune", "pytest", "benchmarks"])
def test_steps_and_summary(monkeypatch, tmp_path, capsys, failing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "load", lambda path: {"results": [], "failed": {"op 1/5": "it differs"}})
    monkeypatch.setattr(gpu_check, "conditions", lambda report: "conditions")
    monkeypatch.setattr(gpu_check, "markdown", lambda results: "results")
    minutes, tested, compiled, asked = [], [], [], {}

    def run(module, log, limit, by=()):
        code = int(module[0] == failing)
        if "--collect-only" in module:
            log.write_text(COLLECTED)
            return 0
        if module[0] == "pytest":
            tested.append(module[-1])
        elif module[0] == "benchmarks.memory":
            compiled.extend(json.loads(module[1]))
        else:
            minutes.append(limit)
            asked[module[0]] = " ".join(module)
        skipped = "SKIPPED [1] tests/gpu/a.py: 24 GiB are needed\n" * ("-rfs" in module)
        log.write_text(f"FAILED {module[0]}\n" * code + f"{skipped}its last line\n")
        if module[0] == "mowe_kernels.tune":
            DeviceTable("Some GPU", ("route_topk",)).write(tables.user_folder())
        if module[0] == "benchmarks" and not code:
            (tmp_path / "out" / "gpu.json").touch()
        return code

    monkeypatch.setattr(gpu_check, "_run", run)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpu.json").touch()  # of an earlier check
    with pytest.raises(typer.Exit) as stopped:
        gpu_check.main(tmp_path / "out")
    assert stopped.value.exit_code == int(failing is not None)
    assert minutes[0] + gpu_check._MINUTES_OF_TESTS < 6 and minutes[1] < 9
    assert f" --threads {gpu_check._THREADS}" in asked["benchmarks"]  # its own default is for few cores
    assert sorted(tested) == ["tests/gpu/a.py::test_y", "tests/gpu/a.py::test_z[torch.float16]"]
    assert ["tiny8/speech/64", "cuda", "bfloat16", "packed"] in compiled and len(compiled) == len(
        set(map(str, compiled))
    )
    assert {name for *_, name in compiled} == set(gpu_check._COMPILED)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "# Some GPU" in summary and ("results" in summary) == (failing != "benchmarks")
    assert ("- not measured: op 1/5: it differs" in summary) == (failing != "benchmarks")
    assert f"Tests: {0 if failing == 'pytest' else 2} of 2 passed" in summary
    assert summary.count("- FAILED with exit code 1: ") == 2 * (failing == "pytest")
    assert summary.count("- SKIPPED [1] tests/gpu/a.py: 24 GiB are needed") == 2
    assert tables.read(tmp_path / "out" / "some-gpu.json").ops == ("route_topk",)


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "log"
    assert gpu_check._run(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], log, 0.02) == 124
    assert gpu_check._last_line(log) == "stopped after 0.0 minutes"


@pytest.mark.parametrize("minutes", [0.02, 1.0], ids=["stopped", "ended"])
def test_a_step_leaves_nothing_running(tmp_path, minutes):
    late = tmp_path / "late"
    start = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 2.5; touch {late}'])"
    wait = "import time; time.sleep(60)" * (minutes < 1)
    gpu_check._run(["timeit", "-n", "1", "-r", "1", f"{start}; {wait}"], tmp_path / "log", minutes)
    time.sleep(3)
    assert not late.exists()


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as stopped:
        gpu_check.main(tmp_path / "out")
    assert stopped.value.exit_code == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
