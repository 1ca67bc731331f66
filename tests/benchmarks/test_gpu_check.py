"""The one command for a GPU: its steps, and what it writes, with the steps stubbed out."""

from __future__ import annotations

import pytest
import torch
import typer

from benchmarks import gpu_check
from mowe_kernels import tables
from mowe_kernels.tables import DeviceTable


@pytest.mark.parametrize("failing", [None, "mowe_kernels.tune", "pytest", "benchmarks"])
def test_steps_and_summary(monkeypatch, tmp_path, failing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu_check, "load", lambda path: {"results": []})
    monkeypatch.setattr(gpu_check, "conditions", lambda report: "conditions")
    monkeypatch.setattr(gpu_check, "markdown", lambda results: "results")
    minutes = []

    def run(module, log, limit):
        minutes.append(limit)
        log.write_text(f"{module[0]} ran\nits last line\n")
        if module[0] == "mowe_kernels.tune":
            DeviceTable("Some GPU", ("route_topk",)).write(tables.user_folder())
        return int(module[0] == failing)

    monkeypatch.setattr(gpu_check, "_run", run)
    with pytest.raises(typer.Exit) as stopped:
        gpu_check.main(tmp_path / "out")
    assert stopped.value.exit_code == int(failing is not None)
    assert minutes[0] + minutes[1] < 6 and minutes[2] < 9
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "# Some GPU" in summary and ("results" in summary) == (failing != "benchmarks")
    assert tables.read(tmp_path / "out" / "some-gpu.json").ops == ("route_topk",)


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "log"
    assert gpu_check._run(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], log, 0.02) == 124
    assert gpu_check._last_line(log) == "stopped after 0.0 minutes"


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as stopped:
        gpu_check.main(tmp_path / "out")
    assert stopped.value.exit_code == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
