from __future__ import annotations

import re
import sys
import threading
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mowe_kernels
from mowe_kernels import backend, tables
from mowe_kernels.backend import implementation
from mowe_kernels.tables import DeviceTable
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


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> DeviceTable:
    """A GPU that is not there, and the table of it, in the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (1, 0))
    for cached in (tables.of_device, backend._tell, backend.module_name):
        cached.cache_clear()
    yield DeviceTable("Some GPU", ("grouped_linear", "varlen_attention"))
    for cached in (tables.of_device, backend.module_name):
        cached.cache_clear()


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor | None]:
    with FakeTensorMode():
        return [None, torch.empty(2, device="cuda", dtype=dtype)]


def test_the_kernels_compute_what_a_table_says_they_compute_rightly(gpu):
    gpu.write(tables.user_folder())
    assert implementation("grouped_linear", on_gpu()).__name__ == "mowe_kernels.triton.grouped_linear"
    assert implementation("varlen_attention", on_gpu()).__name__ == "mowe_kernels.attention"
    with pytest.warns(UserWarning, match="sequence_norm"):
        assert implementation("sequence_norm", on_gpu()).__name__ == "mowe_kernels.reference.sequence_norm"
    assert implementation("grouped_linear", on_gpu(torch.float64)).__name__ == "mowe_kernels.reference.grouped_linear"
    assert implementation("varlen_attention", on_gpu(torch.complex128)).__name__.startswith("mowe_kernels.reference")
    assert implementation("grouped_linear", [torch.empty(2)]).__name__ == "mowe_kernels.reference.grouped_linear"
    with mowe_kernels.use_backend("reference"):
        assert implementation("grouped_linear", on_gpu()).__name__ == "mowe_kernels.reference.grouped_linear"
    with mowe_kernels.use_backend("triton"):
        assert implementation("varlen_attention", on_gpu()).__name__ == "mowe_kernels.triton.varlen_attention"


def test_a_gpu_without_a_table_says_once_how_to_get_the_kernels(gpu, recwarn):
    for op in ("grouped_linear", "sequence_norm"):
        assert implementation(op, on_gpu()).__name__ == f"mowe_kernels.reference.{op}"
    (said,) = recwarn
    assert "Some GPU" in str(said.message) and "python -m mowe_kernels.tune" in str(said.message)


def test_an_op_a_table_does_not_have_is_named_once(gpu, recwarn):
    gpu.write(tables.user_folder())
    for op in ("grouped_linear", "sequence_norm", "encoder_layer"):
        for dtype in (torch.bfloat16, torch.float16):
            implementation(op, on_gpu(dtype))
    said = [str(warning.message) for warning in recwarn]
    assert [re.search("computes (.*) in plain torch on Some GPU", line)[1] for line in said] == [
        "sequence_norm", "grouped_layer_norm", "grouped_mlp",
    ]  # fmt: skip
    assert all("python -m mowe_kernels.tune" in line for line in said)


def test_a_gpu_without_triton(gpu, monkeypatch):
    gpu.write(tables.user_folder())
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert implementation("grouped_linear", on_gpu()).__name__ == "mowe_kernels.reference.grouped_linear"
