"""Attention of other libraries behind varlen_attention: torch's on the CPU, the others' calls against stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mowe_kernels import attention, tables, varlen_attention
from mowe_kernels.attention import dense, flash_attn, torch_varlen
from mowe_kernels.reference import varlen_attention as reference
from mowe_kernels.tables import AttentionChoice, DeviceTable
from tests.mowe_kernels.checks import normal, offsets, rows_with_tail

pytestmark = pytest.mark.usefixtures("poisoned")

HEADS, HEAD_DIM, SCALE = 3, 8, 0.4


def both_ways(module, qkv: Tensor, grad: Tensor, cu_seqlens: Tensor, longest: int, equal: bool) -> tuple[Tensor, ...]:
    out, lse = module.forward(qkv, cu_seqlens, longest, SCALE, True, equal)
    without, nothing = module.forward(qkv, cu_seqlens, longest, SCALE, False, equal)
    assert not nothing.numel()
    torch.testing.assert_close(without, out, equal_nan=True)
    return out, lse.T, module.backward(grad, qkv, out, lse, cu_seqlens, longest, SCALE, equal)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (0, 6, 0, 6), (6,)])
@pytest.mark.parametrize("absent", [0, 2])
def test_dense(lengths, absent):
    """Sequences without rows, first or last, and rows of nobody."""
    rows, tail = sum(lengths), 6 * absent
    qkv, grad = (rows_with_tail(rows, tail, *w, HEADS, HEAD_DIM).float() for w in ((3,), ()))
    cu_seqlens = offsets(lengths)
    assert dense.supports(qkv, 6, SCALE, True)
    ours = both_ways(dense, qkv, grad, cu_seqlens, 6, True)
    for value, expected in zip(ours, both_ways(reference, qkv, grad, cu_seqlens, 6, True), strict=True):
        torch.testing.assert_close(value[:rows], expected[:rows])


@pytest.mark.parametrize(("rows", "equal"), [(12, False), (13, True), (0, True)])
def test_dense_is_not_for_unequal_lengths(rows, equal):
    assert not dense.supports(torch.empty(rows, 3, HEADS, HEAD_DIM), 6, SCALE, equal)


def test_dense_is_not_for_rows_that_all_belong_to_nobody():
    assert not dense.supports(torch.empty(6, 3, HEADS, HEAD_DIM), 0, SCALE, True)


class Library:
    """Stands in for a library's attention: computes it in plain torch, and remembers how it was asked."""

    def __init__(self, splits: bool = True):
        self.asked: list[dict] = []
        if not splits:
            self.varlen_attn = lambda q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux, scale: self._forward(
                (q, k, v), cu_q, max_q, scale
            )

    AuxRequest = staticmethod(lambda lse: SimpleNamespace(lse=lse))

    def varlen_attn(self, q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux, scale, num_splits=None):
        self.asked.append({"num_splits": num_splits})
        return self._forward((q, k, v), cu_q, max_q, scale)

    def _forward(self, qkv, cu_seqlens, longest, scale):
        assert cu_seqlens.dtype == torch.int32
        return reference.forward(torch.stack(qkv, 1), cu_seqlens, longest, scale, True)

    def _wrapped_flash_attn_varlen_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size_left=-1
    ):
        assert (dropout_p, causal) == (0.0, False)
        return *self._forward((q, k, v), cu_q, max_q, softmax_scale), None, None

    def _wrapped_flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert deterministic
        qkv = torch.stack((q, k, v), 1)
        grads = reference.backward(dout, qkv, out, softmax_lse, cu_q, max_q, softmax_scale)
        for target, value in zip((dq, dk, dv), grads.unbind(1), strict=True):
            target.copy_(value)

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, rng_state, unused, *, scale
    ):
        assert cu_q.dtype == torch.int32
        assert torch.are_deterministic_algorithms_enabled()
        assert (rng_state.dtype, list(rng_state.shape), unused.numel()) == (torch.uint64, [2], 0)
        return reference.backward(grad, torch.stack((q, k, v), 1), out, lse, cu_q, max_q, scale).unbind(1)


@pytest.fixture
def library(monkeypatch, request) -> Library:
    made = Library(getattr(request, "param", True))
    torch_varlen._whole_keys.cache_clear()
    monkeypatch.setattr(torch_varlen, "varlen", made)
    monkeypatch.setattr(flash_attn, "_flash", lambda: made)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", made._flash_attention_backward)
    yield made
    torch_varlen._whole_keys.cache_clear()


@pytest.mark.parametrize("library", [True, False], indirect=True)
@pytest.mark.parametrize("module", [torch_varlen, flash_attn])
def test_calls_of_other_libraries(module, library):
    lengths = (0, 5, 3, 0)
    qkv, grad = normal(8, 3, HEADS, HEAD_DIM).float(), normal(8, HEADS, HEAD_DIM).float()
    arguments = (qkv, grad, offsets(lengths), 5, False)
    for ours, theirs in zip(both_ways(module, *arguments), both_ways(reference, *arguments), strict=True):
        assert torch.equal(ours, theirs)
    assert all(asked == {"num_splits": 1} for asked in library.asked)
    assert torch.is_deterministic_algorithms_warn_only_enabled()  # as the fixture has set it


def test_other_libraries_get_offsets_of_int32(monkeypatch, library):
    monkeypatch.setattr(attention, "choose", lambda *case: torch_varlen)
    qkv, grad = normal(8, 3, HEADS, HEAD_DIM).float(), normal(8, HEADS, HEAD_DIM).float()
    both_ways(attention, qkv, grad, offsets((5, 3)).long(), 5, False)


def test_flash_attn_is_not_needed(monkeypatch):
    monkeypatch.setattr(flash_attn, "importlib", SimpleNamespace(import_module=_missing))
    flash_attn._flash.cache_clear()
    assert flash_attn._flash() is None
    flash_attn._flash.cache_clear()


def _missing(name: str):
    raise ImportError(name)


def fake_cuda(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    device = SimpleNamespace(type="cuda", index=0)
    return SimpleNamespace(shape=(24, 3, 2, head_dim), dtype=dtype, itemsize=dtype.itemsize, device=device)


@pytest.mark.parametrize(
    ("qkv", "case", "direction", "chosen"),
    [
        (fake_cuda(), (6, 0.1, False), "forward", "torch_varlen"),
        (fake_cuda(), (6, 0.1, False), "backward", "triton"),
        (fake_cuda(), (6, 0.1, True), "forward", "dense"),
        (fake_cuda(), (7, 0.1, True), "forward", "triton"),  # no whole number of sequences
        (fake_cuda(128), (6, 0.1, False), "forward", "triton"),  # flash-attn is not installed
        (fake_cuda(96), (6, 0.1, False), "forward", "triton"),  # not in the table
        (fake_cuda(dtype=torch.float32), (6, 0.1, False), "forward", "triton"),
        (fake_cuda(256), (6, 0.1, False), "forward", "reference"),
        (fake_cuda(96), (6, -1.0, False), "forward", "reference"),
    ],
)
def test_who_computes(monkeypatch, qkv, case, direction, chosen):
    choices = (
        AttentionChoice(64, None, False, "torch", "kernel"),
        AttentionChoice(64, None, True, "dense", "kernel"),
        AttentionChoice(128, None, False, "flash-attn", "flash-attn"),
    )
    monkeypatch.setattr(tables, "of_device", lambda index: DeviceTable("x", ("varlen_attention",), {}, choices))
    monkeypatch.setattr(flash_attn, "_flash", lambda: None)
    assert chosen in attention.choose(direction, qkv, *case).__name__


def test_equal_lengths_change_nothing_on_the_cpu():
    qkv = normal(12, 3, HEADS, HEAD_DIM)
    assert torch.equal(
        varlen_attention(qkv, offsets((6, 6)), 6, equal_lengths=True), varlen_attention(qkv, offsets((6, 6)), 6)
    )
