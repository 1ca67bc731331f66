from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType

import pytest
import torch

import mowe_kernels
from mowe_kernels.backend import _triton_runs, implementation
from tests.mowe_kernels.checks import int32, normal, raises

CPU = torch.device("cpu")


@pytest.fixture
def spy(monkeypatch) -> list[str]:
    """A triton implementation of sequence_mean that only says it was called."""
    calls = []
    module = ModuleType("mowe_kernels.triton.sequence_mean")

    def forward(x, starts, lengths):
        calls.append("forward")
        return x.new_zeros(starts.shape[0], x.shape[1])

    def backward(grad, x, starts, lengths):
        calls.append("backward")
        return torch.ones_like(x)

    module.forward, module.backward = forward, backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def mean(x: torch.Tensor) -> torch.Tensor:
    return mowe_kernels.sequence_mean(x, int32(0), int32(x.shape[0]))


def test_the_cpu_computes_with_plain_torch():
    assert implementation("sequence_mean", CPU).__name__ == "mowe_kernels.reference.sequence_mean"


def test_a_forced_backend_computes_forward_and_backward(spy):
    x = normal(4, 3).requires_grad_()
    with mowe_kernels.use_backend("triton"):
        mean(x).sum().backward()
        with mowe_kernels.use_backend("reference"):
            torch.testing.assert_close(mean(x)[0], x.mean(0))
        mean(x)
    assert spy == ["forward", "backward", "forward"]
    torch.testing.assert_close(mean(x)[0], x.mean(0))


def test_a_forced_backend_holds_in_the_threads_of_autograd(spy):
    with mowe_kernels.use_backend("triton"):
        thread = threading.Thread(target=mean, args=(normal(4, 3),))
        thread.start()
        thread.join()
    assert spy == ["forward"]


def test_a_forced_backend_holds_in_compiled_code(spy):
    compiled = torch.compile(mean, backend="aot_eager", fullgraph=True)
    x = normal(4, 3)
    compiled(x)
    with mowe_kernels.use_backend("triton"):
        compiled(x)
    assert spy == ["forward"]


def test_an_error_restores_what_was(spy):
    with pytest.raises(RuntimeError), mowe_kernels.use_backend("triton"):
        raise RuntimeError
    mean(normal(4, 3))
    assert spy == []


def test_an_unknown_backend():
    with raises("unknown backend 'cuda'", "reference, triton"), mowe_kernels.use_backend("cuda"):
        pass


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """A GPU the kernels run on, as far as the choice of a backend can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("CC", "cc")
    _triton_runs.cache_clear()
    yield torch.device("cuda", 0)
    _triton_runs.cache_clear()


def test_a_gpu_computes_with_triton(gpu, spy):
    assert implementation("sequence_mean", gpu, {torch.float32}).__name__ == "mowe_kernels.triton.sequence_mean"
    with mowe_kernels.use_backend("reference"):
        assert implementation("sequence_mean", gpu).__name__ == "mowe_kernels.reference.sequence_mean"


def test_float64_has_no_triton_kernels(gpu):
    module = implementation("sequence_mean", gpu, {torch.int32, torch.float64})
    assert module.__name__ == "mowe_kernels.reference.sequence_mean"


@pytest.mark.parametrize("missing", ["triton", "compiler", "capability"])
def test_a_gpu_triton_cannot_serve_computes_with_plain_torch_and_says_so_once(gpu, monkeypatch, missing):
    if missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "compiler":
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(RuntimeWarning, match=missing) as warned:
        for _ in range(2):
            assert implementation("sequence_mean", gpu).__name__ == "mowe_kernels.reference.sequence_mean"
    assert len(warned) == 1
