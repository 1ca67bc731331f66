"""A run that was killed goes on to where it would have come without; a save that fails harms nothing."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from mowe.errors import CheckpointError, ConfigError
from mowe.training import TrainConfig, train
from mowe.training.log import read_lines

ROOT = Path(__file__).parents[3]
FIELDS: dict[str, Any] = {
    "data": {"batch_clips": 3, "workers": 1},
    "stages": [
        {"steps": 2, "learning_rate": 1e-3},
        {"steps": 6, "learning_rate": 3e-3, "trainable": {"pool": True, "language_model": "lora"}},
    ],
    "lora": {"dropout": 0.2},
    "spec_augment": {},
    "accumulate": 2,
    "save_every": 2,
}  # chance in the adapters and the stripes, four batches in a pass


def losses(folder: Path) -> list[tuple[int, int, float]]:
    return [(e["stage"], e["step"], e["loss"]) for e in read_lines(folder / "log.jsonl") if "loss" in e]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_killed_in_a_save_goes_on_to_the_same_losses(
    settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    train(settings(**FIELDS, output=str(tmp_path / "whole")))
    config = settings(**FIELDS, output=str(tmp_path / "killed"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "tests.mowe.training.worker", str(file), json.dumps({"killed_in_save": 3})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path / "killed") == ["config.json", "log.jsonl", "routing.jsonl", "stage-0", "stage-1"]
    assert names(tmp_path / "killed" / "stage-1") == ["checkpoint-2", "unfinished-checkpoint-4"]
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"stage": 1, "st')  # as a kill leaves a line

    config.data.workers = 0
    train(config, resume=True)
    assert len(losses(tmp_path / "whole")) == 8
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("routing.jsonl", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert names(tmp_path / "killed" / "stage-1") == ["checkpoint-4", "checkpoint-6"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole" / "stage-1").rglob("*")}
    train(settings(**FIELDS, output=str(tmp_path / "whole")), resume=True)  # nothing is left to do but the saving
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


class FullDisk(TrainerCallback):
    """From the first checkpoint on, no file can grow past `limit` bytes."""

    def __init__(self, limit: int):
        self.limit, self.before = limit, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


@pytest.mark.parametrize("limit", [20_000, 400_000])  # too little for the model; for the optimiser's state
def test_a_full_disk_leaves_the_checkpoint_before(
    settings: Callable[..., TrainConfig], tmp_path: Path, limit: int
) -> None:
    config = settings(stages=[{"steps": 3}], trainable={"pool": True}, save_every=1)
    disk = FullDisk(limit)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2: cannot be saved: .*; what was saved before is whole"):
            train(config, callbacks=[disk])
    finally:
        disk.free()
    stage = tmp_path / "run" / "stage-0"
    assert names(stage) == ["checkpoint-1"]
    assert load_file(stage / "checkpoint-1" / "model.safetensors")
    assert torch.load(stage / "checkpoint-1" / "optimizer.pt")
    train(config, resume=True)
    assert [step for _, step, _ in losses(tmp_path / "run")] == [1, 2, 3]


def test_a_disk_that_is_full_already_leaves_nothing_of_a_run(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match=r"config\.json: the configuration cannot be written \(No space left"):
            train(settings())
    assert list((tmp_path / "run").iterdir()) == []
    train(settings())


def test_without_a_run_before_nothing_goes_on(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^output: .*run has no run to go on with; begin one without --resume$"):
        train(settings(), resume=True)
    assert not (tmp_path / "run").exists()


def test_another_configuration_does_not_go_on(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(stages=[{"steps": 1}]))
    with pytest.raises(
        ConfigError, match=r"^stages\.0\.learning_rate: .*run was begun with 0\.0001, it cannot go on with"
    ):
        train(settings(stages=[{"steps": 1, "learning_rate": 1e-3}]), resume=True)
    train(settings(stages=[{"steps": 1}], log_every=7, trainer={"ddp_timeout": 7200}), resume=True)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.json", "run/config.json: cannot read the configuration of the run: "),
        ("log.jsonl", "run/log.jsonl: cannot read the log: "),
        *(
            (f"stage-0/checkpoint-1/{name}", "run/stage-0/checkpoint-1: cannot read the checkpoint: ")
            for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
        ),
    ],
)
def test_what_is_damaged_is_told_in_one_line(
    settings: Callable[..., TrainConfig], tmp_path: Path, name: str, told: str
) -> None:
    config, run = settings(stages=[{"steps": 2}], save_every=1), tmp_path / "run"
    train(config)
    shutil.rmtree(run / "stage-0" / "checkpoint-2")
    (run / name).write_bytes((run / name).read_bytes()[:20] + b"\n")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/{told}") as error:
        train(config, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "told"),
    [([], "none"), (["rng_state_0.pth", "rng_state_1.pth"], "rng_state_0.pth rng_state_1.pth")],
    ids=["lost", "of two processes"],
)
def test_a_run_does_not_go_on_with_other_chance(
    settings: Callable[..., TrainConfig], tmp_path: Path, names: list[str], told: str
) -> None:
    config, stage = settings(stages=[{"steps": 2}], save_every=1), tmp_path / "run" / "stage-0"
    train(config)
    state = (stage / "checkpoint-2").rename(tmp_path / "last") / "rng_state.pth"
    (stage / "checkpoint-1" / state.name).unlink()
    for name in names:
        shutil.copy(state, stage / "checkpoint-1" / name)
    with pytest.raises(
        CheckpointError,
        match=f"^{stage}/checkpoint-1: expected rng_state.pth, the random state of .*, got {told}; a run",
    ):
        train(config, resume=True)
    (tmp_path / "last").rename(stage / "checkpoint-2")
    state = stage / "checkpoint-2" / state.name
    state.unlink()
    train(config, resume=True)  # a stage that is done needs none


def change_state(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": "one"}))


def leave_one_out(checkpoint: Path) -> None:
    trained = load_file(checkpoint / "model.safetensors")
    trained.popitem()
    save_file(trained, checkpoint / "model.safetensors")


def shorten_one(checkpoint: Path) -> None:
    trained = load_file(checkpoint / "model.safetensors")
    name, value = trained.popitem()
    save_file(trained | {name: value[:1].clone()}, checkpoint / "model.safetensors")


@pytest.mark.parametrize("stages", [[{"steps": 2}], [{"steps": 1}, {"steps": 1}]], ids=["in a stage", "between stages"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_state, "cannot read the checkpoint: '>=' not supported between"),
        (leave_one_out, r"1 parameters of model\.safetensors are missing or not of this run, such as model\."),
        (shorten_one, "cannot read the checkpoint: .* size mismatch for model"),
    ],
)
def test_a_checkpoint_that_is_not_of_the_run_is_told(
    settings: Callable[..., TrainConfig], tmp_path: Path, stages: list, change: Callable[[Path], None], told: str
) -> None:
    config, run = settings(stages=stages, save_every=1), tmp_path / "run"
    train(config)
    shutil.rmtree(run / "stage-1" if len(stages) == 2 else run / "stage-0" / "checkpoint-2")
    change(run / "stage-0" / "checkpoint-1")
    with pytest.raises(CheckpointError, match=f"^{run}/stage-0/checkpoint-1: {told}") as error:
        train(config, resume=True)
    assert "\n" not in str(error.value)


def test_a_log_of_routing_that_cannot_be_drawn(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config, log = settings(), tmp_path / "run" / "routing.jsonl"
    train(config)
    log.write_text('{"stage": 0, "step": 1}\n')
    with pytest.raises(CheckpointError, match=f"^{log}: cannot read the routing: 'windows'$"):
        train(config, resume=True)


def test_a_line_of_a_log_that_is_no_entry(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = settings(stages=[{"steps": 2}], save_every=1)
    train(config)
    shutil.rmtree(tmp_path / "run" / "stage-0" / "checkpoint-2")
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match=r"run/log.jsonl: cannot read the log: expected an entry with a stage"):
        train(config, resume=True)


def test_a_field_within_the_trainers_is_told_as_it_was(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(trainer={"adam_beta1": 0.8}))
    with pytest.raises(
        ConfigError, match=r"^trainer\.adam_beta1: .*run was begun with 0\.8, it cannot go on with None$"
    ):
        train(settings(), resume=True)


def test_a_field_that_is_newer_than_a_run_had_its_default(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    stored = tmp_path / "run" / "config.json"
    train(settings(stages=[{"steps": 1}]))
    before = json.loads(stored.read_text())
    del before["load_in_4bit"]
    stored.write_text(json.dumps(before))
    with pytest.raises(ConfigError, match=r"load_in_4bit: .*run was begun with False, it cannot go on with True"):
        train(settings(stages=[{"steps": 1}], load_in_4bit=True), resume=True)
    train(settings(stages=[{"steps": 1}]), resume=True)
