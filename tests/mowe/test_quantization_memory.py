"""Loading a 4-bit checkpoint of several files never holds much more than the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import mowe
from tests.mowe.audio_llm import tiny_model

MEASURE = """
import sys
import mowe, mowe.quantization, bitsandbytes, torch  # what loading imports is no part of the model
from mowe import MoweForConditionalGeneration
torch.set_num_threads(1)

def resident(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

MoweForConditionalGeneration.from_pretrained(sys.argv[1])
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = MoweForConditionalGeneration.from_pretrained(sys.argv[2])
for tensor in model.state_dict().values():  # files are mapped: only what is read takes memory
    tensor.flatten()[::256].clone()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_peak_memory_of_loading(tmp_path):
    tiny, large = tmp_path / "tiny", tmp_path / "large"
    mowe.quantize(tiny_model()).save_pretrained(tiny)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8
        )
    )
    mowe.quantize(tiny_model(language_model)).save_pretrained(large, max_shard_size="16MB")
    shards = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(shards) > 4
    done = subprocess.run([sys.executable, "-c", MEASURE, tiny, large], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    assert 0.5 * sum(shards) < peak <= 1.15 * sum(shards) + max(shards)
