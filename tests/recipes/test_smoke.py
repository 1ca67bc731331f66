"""The smoke recipe end to end, as a user runs it: data, training, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mowe.cli import app
from mowe.training.log import read_lines
from recipes.nano.__main__ import app as lab

RECIPE = Path(__file__).parents[2] / "recipes" / "nano" / "smoke.yaml"


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(lab, ["smoke"], catch_exceptions=False).exit_code == 0
    trained = CliRunner().invoke(app, ["train", str(RECIPE)], catch_exceptions=False)
    assert trained.exit_code == 0, trained.output

    log = read_lines(Path("nano-smoke/run/log.jsonl"))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    heard = [entry["eval_sound_loss"] for entry in log if "eval_sound_loss" in entry]
    assert heard[-1] < heard[0]

    before, after = (_routers(Path("nano-smoke", folder)) for folder in ("model", "run/model"))
    assert before.keys() == after.keys() and len(after) == 2
    for name, start in before.items():
        assert (after[name] - start).norm() > 0.03, name

    model = "nano-smoke/run/model"
    judged = CliRunner().invoke(app, ["evaluate", "nano-smoke/test.jsonl", "--model", model, "--json"])
    assert judged.exit_code == 0, judged.output
    right = json.loads(judged.stdout)["tasks"]["sound"]["scores"]["exact_match"]["value"]
    assert right > 0.5  # one in four by chance


def _routers(model: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(model / "model.safetensors").items() if ".router." in name}
