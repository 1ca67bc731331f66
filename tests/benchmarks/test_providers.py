"""Every provider on small workloads: the same outputs, as they are checked before anything is timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import WhisperFeatureExtractor

from benchmarks import memory, workloads
from benchmarks.catalogue import ALL
from benchmarks.clock import DeviceClock
from benchmarks.floors import Roofs, base_flops, pool_flops, projector_flops
from benchmarks.host import seconds_a_layer
from benchmarks.measure import OutputsDifferError, outputs_agree, prepare, take_turns
from benchmarks.memory import peak_memory
from benchmarks.ops import NUM_OPS, cases
from benchmarks.rivals import missing
from benchmarks.shares import added, parts
from benchmarks.suites import SUITES, compare_ops
from benchmarks.whole import assembled
from benchmarks.workloads import Workload
from mowe import graphs
from mowe_kernels import backend
from mowe_kernels.reference import route_topk


@pytest.mark.parametrize(
    ("workload", "providers"),
    [
        ("tiny2/1s/1/k1", ("per_clip", "padded_loop", "trimmed", "all_encoders", "packed_by_blas", "packed_by_torch")),
        ("tiny2/1s/1/k1", ("nf4_loop", "nf4_loop_bf16", "packed_nf4")),
        ("tiny4/1s/1", ("naive", "mixture", "base_alone")),
        ("tiny2/1s/1/k1", ("padded_loop_step", "packed_step")),
        ("tiny4/1s/1", ("padded_mixture_step", "mixture_step")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_providers_agree(workload, providers):
    there = [name for name in providers if ALL[name].missing() is None]
    with torch.set_grad_enabled(ALL[providers[0]].learns):
        assert list(prepare(Workload.named(workload), there)) == there


@pytest.mark.parametrize("workload", ["tiny4/1s/2", "tiny4/short/2"])
def test_a_captured_mixture_agrees(monkeypatch, workload):
    """On the CPU the captured function runs again instead of a CUDA graph."""
    monkeypatch.setattr(graphs, "_capture", lambda run, device: run)
    with torch.no_grad():
        assert list(prepare(Workload.named(workload), ["mixture", "captured"])) == ["mixture", "captured"]


@pytest.mark.parametrize(
    ("provider", "workload", "times"),
    [("naive", "tiny4/1s/2", 1), ("naive", "tiny2/1s/2", 2), ("per_clip", "tiny4/1s/2", 1)],
)
@torch.no_grad()
def test_rivals_extract_features_once_for_encoders_that_read_the_same(monkeypatch, provider, workload, times):
    """And where the waveform lies, as the library does."""
    monkeypatch.setitem(workloads.BASES, "tiny2", workloads._whisper(384, 1, 6, num_mel_bins=128))
    extract, places = WhisperFeatureExtractor.__call__, []
    monkeypatch.setattr(
        WhisperFeatureExtractor, "__call__", lambda *a, device, **how: places.append(device) or extract(*a, **how)
    )
    run = ALL[provider].prepare(Workload.named(workload))
    run()
    assert places == ["cpu"] * 2 * times


def test_suites_name_providers_that_exist():
    assert {name for suite in SUITES.values() for c in suite for name in c.providers} <= set(ALL)


def test_outputs_that_differ_are_not_timed():
    with pytest.raises(OutputsDifferError, match=r"a rival differs from this library's outputs .* by 1.0e-01 relative"):
        outputs_agree("a rival", [[torch.ones(4) * 1.1]], [[torch.ones(4)]])


def test_ops_forward_and_backward():
    results = compare_ops(Workload.named("tiny3/1s/2"), 2, torch.get_num_threads(), Roofs(1e11, 1e10))
    seen = {(r.subject, r.mode) for r in results}
    assert len(seen) == 2 * NUM_OPS
    rivals = {"loop", "grouped_mm", "experts_grouped_mm", "padded", "dense", "reference"}
    assert rivals | {"packed"} == {r.provider for r in results}


def test_host_time_of_a_layer():
    assert 0 < seconds_a_layer("cpu", "float32", "tiny2/1s/1") < 1


def test_rivals_that_are_not_here_are_named():
    reasons = missing("cpu")
    assert reasons["scattermoe"].startswith("needs ") and reasons["torch_varlen"] == "needs a CUDA GPU"


def test_turns(monkeypatch):
    taken = {"slow": 10.0, "fast": 0.3}
    calls = []

    def clock(run):
        calls.append(run())
        return taken[calls[-1]]

    seconds = take_turns({name: lambda name=name: name for name in taken}, 3, clock=clock)
    assert seconds == {"slow": [10.0, 10.0], "fast": [0.3] * 3}  # who is slow stops early
    assert calls.count("fast") == 3 * 5  # who is fast runs again in its turn


@pytest.mark.parametrize(("host_ms", "slept"), [(1, [5]), (12, [5, 10, 20]), (99, [5, 10, 20, 40])])
def test_the_device_is_timed_while_nothing_is_left_to_ask_of_it(monkeypatch, host_ms, slept):
    """An invented GPU that sleeps 5 ms at first, and a run that takes the host `host_ms` and the GPU 2 ms."""
    sleeps = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def query(self):
            return sleeps[-1] < host_ms

        def elapsed_time(self, end):
            return 2.0 + max(0, host_ms - sleeps[-1])

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch, "empty", lambda *args, **how: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: sleeps.append(cycles // 2_000_000))
    clock = DeviceClock()
    assert clock(lambda: None) == (2.0 + max(0, host_ms - slept[-1])) / 1e3
    assert sleeps == slept


def test_peak_memory():
    (peak,) = peak_memory([(Workload.named("tiny1/1s/1"), "packed")], 1)
    assert peak is None or peak["before"] < peak["peak"]


def test_what_a_library_says_beside_peak_memory(monkeypatch):
    said = SimpleNamespace(stdout='a library greets\n[{"before": 1, "peak": 2}]\nand parts\n')
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **how: said)
    monkeypatch.setattr(memory.Path, "exists", lambda self: True)
    assert peak_memory([(Workload.named("tiny1/1s/1"), "packed")], 1) == [{"before": 1, "peak": 2}]


def test_parts_of_a_mixture():
    workload = Workload.named("tiny4/1s/1")
    of = parts(workload, rounds=1)
    model = assembled(workload, workload.context)
    assert of["projector"]["flops"] == projector_flops(model, workload)
    assert of["base encoder"]["flops"] == base_flops(workload) and of["pool"]["flops"] == pool_flops(workload)
    assert added(of, "pool")["seconds"] == of["pool"]["seconds"] / of["base encoder"]["seconds"] > 0


def test_projector_flops_by_hand():
    workload = Workload.named("tiny4/1s/1")  # 50 base frames of width 384, two slots of 384, an LLM of width 2048
    convolutions = 25 * 3 * 3 * 384 * 2048 + 13 * 3 * 2048**2 + 7 * 3 * 2048**2
    expected = 2 * (convolutions + 7 * 2048**2)
    assert projector_flops(assembled(workload, workload.context), workload) == expected


def test_a_rival_in_plain_torch_is_that_in_its_backward_too(monkeypatch):
    *_, routing = cases(Workload.named("tiny2/1s/1"))
    forced, backward = [], route_topk.backward
    monkeypatch.setattr(route_topk, "backward", lambda *args: (forced.append(backend._forced), backward(*args))[1])
    routing.backward("reference")()
    assert forced == ["reference"]
