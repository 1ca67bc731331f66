"""The examples of the README run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import soundfile
import torch

from tests.mowe.audio_llm import language_model
from tests.mowe.encoders import clip, hubert, whisper
from tests.mowe.tokenizer import byte_tokenizer

README = Path(__file__).parents[2] / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but that of attaching, which docs/attach.md has as a whole. Tiny models stand in for those that are named."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    examples = [block for block in blocks if "Qwen2Audio" not in block]
    assert (len(blocks), len(examples)) == (4, 3)
    for number, name in enumerate(("whisper-large-v3", "whisper-tiny", "whisper-tiny.en")):
        whisper(number).save_pretrained(f"openai/{name}")
    for number, name in enumerate(("facebook/hubert-base-ls960", "superb/hubert-base-superb-er")):
        hubert(number).save_pretrained(name)
    language_model().save_pretrained("your/language-model")
    soundfile.write("clip.wav", clip(16_000).numpy(), 16_000)
    names = {
        "whisper_a": whisper(1),
        "whisper_b": whisper(2),
        "hubert": hubert(3),
        "waveforms": [clip(16_000), clip(9_000)],
        "base": whisper(5),
        "llm": language_model(),
        "base_features": torch.randn(2, 50, 32),
        "base_lengths": [50, 28],
        "tokenizer": byte_tokenizer(),
    }
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
