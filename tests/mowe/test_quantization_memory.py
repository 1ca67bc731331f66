"""Loading a model of several files never holds much more than what is left of it in 4 bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import mowe
from tests.mowe.audio_llm import tiny_model
from tests.mowe.encoders import whisper

MEASURE = """
import sys
import mowe, mowe.quantization, bitsandbytes, torch  # what loading imports is no part of the model
from mowe import MoweForConditionalGeneration, MoweQuantizationConfig
torch.set_num_threads(1)
tiny, large, out = sys.argv[1:]
settings = {"quantization_config": MoweQuantizationConfig()} if out else {}

def resident(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

MoweForConditionalGeneration.from_pretrained(tiny, **settings)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = MoweForConditionalGeneration.from_pretrained(large, **settings)
for tensor in model.state_dict().values():  # files are mapped: only what is read takes memory
    tensor.flatten()[::256].clone()
print(resident("VmHWM") - before)
if out:
    model.save_pretrained(out, max_shard_size="16MB")
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")


def peak(tiny: Path, large: Path, out: Path | str = "") -> int:
    """Bytes at most while the large model is loaded, or quantised while loading and saved in a folder."""
    done = subprocess.run([sys.executable, "-c", MEASURE, tiny, large, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def shards(folder: Path) -> list[int]:
    return [file.stat().st_size for file in folder.glob("*.safetensors")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny and a large model in full precision and in 4 bits, and the peak of quantising the large one."""
    root = tmp_path_factory.mktemp("memory")
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
        )
    )
    base = whisper(0, d_model=1024, encoder_ffn_dim=4096, encoder_attention_heads=8)
    tiny_model().bfloat16().save_pretrained(root / "tiny")
    tiny_model(language_model, base=base).bfloat16().save_pretrained(root / "large", max_shard_size="32MB")
    mowe.quantize(tiny_model()).save_pretrained(root / "tiny-nf4")
    return root, peak(root / "tiny", root / "large", root / "large-nf4")


def test_peak_memory_of_loading(folders):
    root, _ = folders
    files = shards(root / "large-nf4")
    assert len(files) > 4
    assert 0.5 * sum(files) < peak(root / "tiny-nf4", root / "large-nf4") <= 1.15 * sum(files) + max(files)


def test_peak_memory_of_quantising_while_loading(folders):
    root, quantising = folders
    before, after = shards(root / "large"), shards(root / "large-nf4")
    assert len(before) > 4 and sum(before) > 3 * sum(after)
    assert 0.5 * sum(after) < quantising <= 1.15 * sum(after) + max(before)
