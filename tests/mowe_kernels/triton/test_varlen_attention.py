from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mowe_kernels import use_backend, varlen_attention
from mowe_kernels.reference import varlen_attention as reference
from mowe_kernels.triton import varlen_attention as kernels
from mowe_kernels.triton._launch import ARCHITECTURES, assume, override
from mowe_kernels.triton.varlen_attention import Settings
from tests.mowe_kernels.checks import LENGTHS, normal, offsets, raises, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

# Blocks so small that sequences have several.
SMALL = {f"attention_{kernel}": Settings(16, 16, 4, 1) for kernel in ("forward", "queries", "keys")}
UNEQUAL = {f"attention_{kernel}": Settings(16, 32, 4, 1) for kernel in ("forward", "queries", "keys")}

BLOCK_EDGES = {
    "a row less, a row more": (15, 17, 31, 33),
    "whole blocks": (16, 0, 48, 32),
}


def op(lengths: tuple[int, ...], scale: float | None = None):
    return lambda qkv: varlen_attention(qkv, offsets(lengths).to(DEVICE), max(lengths), scale=scale)


def check(lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
    inputs = {"qkv": rows_with_tail(sum(lengths), 3, 3, heads, head_dim)}
    assert_as_accurate_as_torch(op(lengths), inputs, sum(lengths), dtype)


@table(LENGTHS | BLOCK_EDGES, "lengths")
@table({"small": SMALL, "unequal": UNEQUAL}, "settings")
def test_layouts(lengths, settings):
    with override(**settings):
        check(lengths, heads=2, head_dim=5)


def test_more_sequences_than_a_search_looks_at_at_once():
    with override(**SMALL):
        check((0,) * 129 + (3, 0, 2), heads=1, head_dim=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_settings_of_every_architecture(dtype, head_dim, capability):
    """The blocks of the tables, more than one of them and the last of them not full."""
    with assume(ARCHITECTURES[capability]):
        check((35, 0, 3) if dtype == torch.float32 else (0, 150), heads=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_scales(scale):
    lengths = (20, 7)
    with override(**SMALL):
        inputs = {"qkv": rows_with_tail(sum(lengths), 0, 3, 1, 16)}
        assert_as_accurate_as_torch(op(lengths, scale), inputs, sum(lengths), torch.float32)


def test_large_scores_do_not_overflow():
    lengths = (20, 7)
    qkv = rows_with_tail(sum(lengths), 0, 3, 1, 16)
    qkv[:, :2] *= 100
    with override(**SMALL):
        assert_as_accurate_as_torch(op(lengths), {"qkv": qkv}, sum(lengths), torch.float32)


def test_what_is_kept_for_the_backward_pass():
    """The natural logarithm of the sum of exponentials, as plain torch keeps it."""
    lengths = LENGTHS["primes"]
    rows = sum(lengths)
    qkv = rows_with_tail(rows, 2, 3, 2, 8).to(DEVICE, torch.float32)
    arguments = (offsets(lengths).to(DEVICE), max(lengths), 0.5, True)
    with override(**SMALL):
        _, lse = kernels.forward(qkv, *arguments)
    _, expected = reference.forward(qkv.double(), *arguments)
    assert_close(lse[:, :rows].double(), expected[:, :rows], atol=1e-6, rtol=1e-6)


def test_a_sequence_does_not_see_its_neighbours():
    lengths = (21, 34, 5)
    qkv, grad = (normal(sum(lengths), *widths, 2, 16).to(DEVICE, torch.float32) for widths in ((3,), ()))

    def run(qkv, grad, lengths):
        leaf = qkv.clone().requires_grad_()
        with use_backend("triton"), override(**SMALL):
            out = op(lengths)(leaf)
            return out.detach(), *torch.autograd.grad(out, leaf, grad)

    together = run(qkv, grad, lengths)
    alone = run(qkv[21:55], grad[21:55], (34,))
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours[21:55], theirs)


@pytest.mark.parametrize(
    ("qkv", "scale", "parts"),
    [
        (normal(4, 3, 1, 8), None, ("float64",)),
        (normal(4, 3, 1, 160).float(), None, ("at most 128", "got 160")),
        (normal(4, 3, 1, 8).float(), -1.0, ("positive scale", "got -1.0")),
    ],
)
def test_says_what_it_cannot_compute(qkv, scale, parts):
    with use_backend("triton"), raises("varlen_attention: ", *parts):
        varlen_attention(qkv, offsets((4,)), 4, scale=scale)
