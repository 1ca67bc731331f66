"""The examples of the README run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import mowe
from tests.mowe.attach.models import save_qwen2_audio
from tests.mowe.audio_llm import language_model
from tests.mowe.encoders import clip, hubert, whisper
from tests.mowe.tokenizer import byte_tokenizer

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but that of attaching. Tiny models stand in for those that are named."""
    monkeypatch.chdir(tmp_path)
    examples = [block for block in BLOCKS if "Qwen2Audio" not in block]
    assert (len(BLOCKS), len(examples)) == (5, 4)
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
    kept, given = names["again"].state_dict(), names["pool"].state_dict()
    assert kept.keys() == given.keys() and all(torch.equal(kept[name], given[name]) for name in given)


def test_attaching_to_a_model_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whisper(1).save_pretrained("openai/whisper-tiny")
    hubert().save_pretrained("facebook/hubert-base-ls960")
    save_qwen2_audio("model", torch.bfloat16)
    names = {
        "mowe": mowe,
        "path": "model",
        "AutoProcessor": AutoProcessor,
        "Qwen2AudioForConditionalGeneration": Qwen2AudioForConditionalGeneration,
    }
    (example,) = (block for block in BLOCKS if "Qwen2Audio" in block)
    exec(compile(example, str(README), "exec"), names)
    model, processor = names["model"], names["processor"]
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>What is it?"
    inputs = processor(text=text, audio=clip(16_000).numpy(), return_tensors="pt").to(model.device, model.dtype)
    assert model(**inputs).mixture.tokens.dtype == torch.bfloat16
