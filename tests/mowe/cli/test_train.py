"""`mowe train` from a file to an answering model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mowe.cli.conftest import Run
from tests.mowe.training.tones import make_tones


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def config(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(
        f"""
model: {tones}/model
output: {path.parent}/out
data:
  train: [{{manifest: {tones}/train.jsonl}}]
  validation: [{tones}/valid.jsonl]
  batch_frames: 60
  workers: 1
trainable: {{pool: true, language_model: full}}
stages:
  - {{steps: 2, learning_rate: 1e-2, trainable: {{projector: true}}}}
  - {{epochs: 4, learning_rate: 1e-2}}
log_every: 1
"""
    )
    return path


def test_trains_and_the_model_answers(run: Run, config: Path, tones: Path) -> None:
    done = run("train", config, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["stages"][0]["step"] == 2 and said["skipped"] == 0
    entries = [json.loads(line) for line in (config.parent / "out" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) > 10 and losses[-1] < 0.5 * losses[0]
    assert {"eval_any_loss", "eval_low_loss", "eval_high_loss"} <= said["stages"][1].keys()
    answer = run("generate", tones / "valid0.wav", "--prompt", "?", "--model", said["model"], "--json")
    assert json.loads(answer.stdout)["clips"][0]["text"]


def test_a_model_in_4_bits_is_trained_and_answers(run: Run, config: Path, tones: Path, tmp_path: Path) -> None:
    assert run("quantize", tones / "model", tmp_path / "nf4", "--clip", tones / "valid0.wav").exit_code == 0
    arguments = ("trainable={language_model: lora}", "stages=[{steps: 2}]", "data.validation=[]", "data.workers=0")
    done = run("train", config, f"model={tmp_path / 'nf4'}", f"output={tmp_path / 'out'}", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    trained = json.loads(done.stdout)["model"]
    assert Path(trained, "adapter_model.safetensors").exists()
    answer = run("generate", tones / "valid0.wav", "--prompt", "?", "--model", trained, "--json")
    assert answer.exit_code == 0 and json.loads(answer.stdout)["clips"][0]["text"], answer.stderr


def test_a_run_is_not_begun_over_another_one(run: Run, config: Path, tones: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = run("train", config, f"output={tmp_path}")
    assert done.exit_code == 2
    assert done.stderr == f"error: output: {tmp_path} is not empty; go on with --resume or choose another folder\n"


def test_bad_lines_end_a_run_before_it_begins_or_are_counted(
    run: Run,
    config: Path,
    tones: Path,
    tmp_path: Path,
) -> None:
    good = (tones / "train.jsonl").read_text().replace('"train', f'"{tones}/train')
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good + '{"audio": "none.wav", "task": "any", "prompt": "?", "answer": "x"}\n')
    arguments = (
        "train", config, f"data.train.0.manifest={bad}", f"output={tmp_path / 'out'}", "stages=[{steps: 1}]",
        "data.workers=0",
    )  # fmt: skip
    failed = run(*arguments)
    assert failed.exit_code == 2 and not (tmp_path / "out").exists()
    assert failed.stderr.startswith(f"error: {bad}: 1 bad of 13 lines: line 13: ") and "no such file" in failed.stderr
    done = run(*arguments, "--skip-bad")
    assert done.exit_code == 0 and "lines of manifests left out: 1" in done.stderr


def test_what_would_be_markup_is_shown_as_it_is(
    run: Run, config: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "train.jsonl"
    line = {"audio": str(tones / "train0.wav"), "task": "[/asr]", "prompt": "?", "answer": "x"}
    manifest.write_text(json.dumps(line))
    arguments = (
        "train", config, f"data.train.0.manifest={manifest}", f"data.validation=[{manifest}]", "data.workers=0",
        "stages=[{steps: 2}]",
    )  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    for terminal in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", terminal)
        done = run(*arguments, f"output={tmp_path / f'out{terminal}'}")
        assert done.exit_code == 0 and "eval_[/asr]_loss" in done.stdout and "eval_[/asr]_loss" in done.stderr


def test_without_its_log_a_run_that_is_done_is_saved_again(run: Run, config: Path, tmp_path: Path) -> None:
    arguments = ("train", config, f"output={tmp_path / 'out'}", "stages=[{steps: 1}]", "data.workers=0")
    assert run(*arguments).exit_code == 0
    (tmp_path / "out" / "log.jsonl").unlink()
    done = run(*arguments, "--resume")
    assert done.exit_code == 0 and f"saved in {tmp_path / 'out' / 'model'}" in done.stdout


def test_a_run_that_is_stopped_says_how_it_goes_on(run: Run, config: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from mowe.cli import main; main()", "train", str(config)]
    fields = [f"output={tmp_path / 'out'}", "data.workers=2", "stages=[{steps: 1000}]"]
    with subprocess.Popen([*program, *fields], stderr=subprocess.PIPE, text=True, start_new_session=True) as started:
        assert started.stderr is not None
        while not started.stderr.readline().startswith("stage-0 2/"):
            assert started.poll() is None
        os.killpg(started.pid, signal.SIGTERM)  # as job schedulers do, to the workers as well
        *_, told = started.stderr
    assert started.returncode == 128 + signal.SIGTERM
    assert told == f"error: stopped by SIGTERM; mowe train --resume goes on with {tmp_path / 'out'}\n"
    (last,) = (tmp_path / "out" / "stage-0").iterdir()
    assert int(last.name.removeprefix("checkpoint-")) >= 2 and not (tmp_path / "out" / "model").exists()


def test_bad_configurations_end_with_one_line(run: Run, config: Path) -> None:
    done = run("train", config, "data.batch_framse=3")
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "data.batch_framse: unknown field; did you mean batch_frames?" in done.stderr
