"""The page about attaching: its example runs, its table is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import soundfile

from mowe.attach import LAYOUTS
from tests.mowe.attach.models import save_qwen2_audio
from tests.mowe.encoders import clip, hubert, whisper

PAGE = Path(__file__).parents[3] / "docs" / "attach.md"
BASE, HUBERT = "Qwen/Qwen2-Audio-7B-Instruct", "facebook/hubert-base-ls960"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with tiny checkpoints under the names of the page, and its audio files."""
    monkeypatch.chdir(tmp_path)
    save_qwen2_audio(BASE)
    whisper(1).save_pretrained("openai/whisper-tiny")
    whisper(2).save_pretrained("openai/whisper-tiny.en")
    hubert().save_pretrained(HUBERT)
    for number, name in enumerate(("dog.wav", "rain.wav")):
        soundfile.write(name, clip(16_000, number).numpy(), 16_000)
    return tmp_path


def test_the_example_runs(hub: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert {path.name for path in (hub / "my-mixture").iterdir()} == {"mowe_config.json", "mowe_model.safetensors"}


def test_the_table_has_every_model_type() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == sorted(LAYOUTS)
    assert not any("no" in cells.split(" | ") for _, cells in rows)
    for name, cells in rows:
        concat, residual, *_ = cells.split(" | ")
        assert (concat, residual) == ("yes" if "concat" in LAYOUTS[name].fusions else "-", "yes")
