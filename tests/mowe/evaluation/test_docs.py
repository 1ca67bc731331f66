"""The page about evaluation: its commands and its example run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from mowe.cli import app
from mowe.evaluation import Report
from mowe.evaluation.metrics import NORMALISATIONS
from mowe.evaluation.tasks import KINDS, TASKS
from mowe.nano import nano_model

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the model, the manifests and the clips of the page."""
    monkeypatch.chdir(tmp_path)
    model, processor = nano_model()
    model.save_pretrained("my-model")
    processor.save_pretrained("my-model")
    (manifest,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    Path("clips").mkdir()
    for name in re.findall(r'"(clips/\w+\.wav)"', manifest):
        soundfile.write(name, 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)
    for name in ("test.jsonl", "librispeech_test_clean.jsonl"):
        Path(name).write_text(manifest)
    return tmp_path


def test_the_commands_run(folder: Path) -> None:
    commands = re.findall(r"^mowe (evaluate .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        result = CliRunner().invoke(app, [*shlex.split(command), "--max-new-tokens", "2"], prog_name="mowe")
        assert result.exit_code == 0, result.output
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in ("report.json", "predictions.jsonl", "report.png"):
        assert f"`results/{name}`" in PAGE and f"results/{name}" in written
    assert {"answers.jsonl", "log_for_all_models/my-model/librispeech_test_clean.json"} <= written


def test_the_example_runs(folder: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "evaluation.md", "exec"), names)
    report = names["report"]
    assert isinstance(report, Report) and set(report.tasks) == {"asr", "sound", "language"}


def test_everything_there_is_to_choose_is_on_the_page() -> None:
    for name in (*KINDS, *NORMALISATIONS, *TASKS):
        assert f"`{name}`" in PAGE, name
