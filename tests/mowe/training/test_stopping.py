"""SIGTERM and Ctrl-C end a run in order, and it goes on to where it would have come without."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mowe.errors import Terminated
from mowe.training import TrainConfig, train
from mowe.training.log import read_lines

FIELDS: dict[str, Any] = {"stages": [{"steps": 4}, {"steps": 2}], "save_every": 2, "accumulate": 2}


class SigtermAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def checkpoints(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("stage-*/*"))


def losses(folder: Path) -> list[tuple[int, int, float]]:
    return [(e["stage"], e["step"], e["loss"]) for e in read_lines(folder / "log.jsonl") if "loss" in e]


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_ends_a_run_after_the_step(settings: Callable[..., TrainConfig], tmp_path: Path, workers: int) -> None:
    train(settings(**FIELDS, output=str(tmp_path / "whole")))
    before = signal.getsignal(signal.SIGTERM)
    config = settings(**FIELDS, data={"workers": workers})
    with pytest.raises(Terminated):
        train(config, callbacks=[SigtermAt(2)])
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints(tmp_path / "run") == ["stage-0/checkpoint-2", "stage-0/checkpoint-3"]
    done = train(config, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() and done.stages


def test_sigterm_in_a_save_leaves_it_whole(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def save_and_be_told(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Terminated):
        patched.setattr(torch, "save", save_and_be_told)
        train(settings(**FIELDS))
    assert checkpoints(tmp_path / "run") == ["stage-0/checkpoint-2", "stage-0/checkpoint-3"]
    train(settings(**FIELDS), resume=True)


def test_ctrl_c_in_a_save_leaves_the_checkpoint_before(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted(state: Any, file: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(file):
            raise KeyboardInterrupt
        save(state, file, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", interrupted)
        train(settings(**FIELDS))
    assert checkpoints(tmp_path / "run") == ["stage-0/checkpoint-2"]
    train(settings(**FIELDS), resume=True)
    assert [step for _, step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 1, 2]


def test_a_thread_cannot_listen_and_trains(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    thread = Thread(target=train, args=[settings(stages=[{"steps": 1}])])
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model").is_dir()
