"""Names of workloads, and the arithmetic their floors are made of."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floors
from benchmarks.floors import pair_flops
from benchmarks.workloads import Workload, hubert_base, whisper_tiny
from mowe import EncoderPool


def test_a_name_says_everything():
    workload = Workload.named("tiny3/4.5s/5/k1")
    assert (workload.num_encoders, workload.top_k, workload.seconds, workload.context) == (3, 1, (4.5,) * 5, "valid")
    assert len(workload.indices) == 5 and all(len(chosen) == 1 for chosen in workload.indices)


def test_mixes():
    speech, short, full = (Workload.named(f"tiny8/{mix}/64") for mix in ("speech", "short", "full"))
    assert sum(speech.seconds) / 64 == pytest.approx(8, rel=0.03)
    assert min(speech.seconds) >= 1 and max(speech.seconds) <= 30
    assert min(short.seconds) >= 1 and max(short.seconds) <= 5
    assert set(full.seconds) == {30.0} and full.context == "window"
    assert all(len(set(chosen)) == 2 for chosen in speech.indices)


@pytest.mark.parametrize(
    "name", ["", "tiny8", "tiny/speech/8", "nano8/speech/8", "tiny8/talk/8", "tiny8/speech/0", "tiny2/speech/4/k3"]
)
def test_a_name_that_means_nothing(name):
    with pytest.raises(ValueError, match=r"expected"):
        Workload.named(name)


def test_no_base_encoder():
    with pytest.raises(ValueError, match="no base encoder; there is one beside tiny2, tiny4, tiny8"):
        Workload.named("hubert1/8s/1").base()


@pytest.mark.parametrize("make", [whisper_tiny, hubert_base], ids=["whisper", "hubert"])
def test_floor_counts_what_torch_counts(make):
    torch.manual_seed(0)
    encoder = make().eval()
    encoder.set_attn_implementation("eager")  # what torch cannot count in its fused attention
    seconds = 1.5
    if encoder.main_input_name == "input_features":
        given, context = torch.randn(1, 80, 3000), "window"
    else:
        given, context = torch.randn(1, int(16_000 * seconds)), "valid"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(given)
    assert pair_flops(encoder, seconds, context) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_limits_of_a_gpu_are_timed_on_the_gpu(monkeypatch):
    """As the ops are that are compared with them; here its tensors lie on the CPU."""
    randn, empty = torch.randn, torch.empty
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: randn(*shape))
    monkeypatch.setattr(torch, "empty", lambda *shape, device, dtype: empty(*shape))
    monkeypatch.setattr(floors, "_SIZE", {"cuda": 8})
    monkeypatch.setattr(floors, "_BYTES", 64)
    monkeypatch.setattr(floors, "DeviceClock", lambda: lambda run: 2.0)
    assert floors.Roofs.measure("cuda", "bfloat16") == floors.Roofs(2 * 8**3 / 2.0, 2 * 64 / 2.0)


def test_the_packed_pool_runs_a_workload():
    workload = Workload.named("tiny2/1s/2/k1")
    pool = EncoderPool.from_encoders(workload.encoders())
    with torch.no_grad():
        out = pool.encode(workload.waveforms(), workload.indices, workload.context)
    assert out.pair(1, 0).shape == (50, 384)
