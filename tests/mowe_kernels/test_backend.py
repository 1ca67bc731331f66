from __future__ import annotations

import sys
import threading
from types import ModuleType

import pytest
import torch

import mowe_kernels
from mowe_kernels.backend import implementation
from tests.mowe_kernels.checks import int32, normal, raises


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


def test_plain_torch_computes_by_default():
    assert implementation("sequence_mean").__name__ == "mowe_kernels.reference.sequence_mean"


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
