"""The page about models in 4 bits: its examples run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import bitsandbytes as bnb
import pytest

from tests.mowe.audio_llm import language_model, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # bitsandbytes takes widths that are whole blocks.
    wide = language_model(hidden_size=64, intermediate_size=96)
    tiny_model(wide).save_pretrained("model")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    model = names["model"]
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.language_model.modules())
    assert not model.model.mixture.pool.quantized
    assert Path("model-nf4", "model.safetensors").is_file()
