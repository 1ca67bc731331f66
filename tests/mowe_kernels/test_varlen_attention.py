from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe_kernels import use_backend, varlen_attention
from mowe_kernels.reference import varlen_attention as reference
from tests.mowe_kernels.checks import (
    LENGTHS,
    assert_accurate,
    assert_matches,
    gradcheck,
    int32,
    normal,
    offsets,
    opcheck,
    raises,
    rows_with_tail,
    table,
)

pytestmark = pytest.mark.usefixtures("poisoned")

HEADS, HEAD_DIM = 3, 5


@pytest.fixture(params=["fused", "scores", "one head at a time"])
def implementation(request, monkeypatch) -> None:
    """The CPU's fused kernels, and the materialised scores of other devices, all heads at once or one by one."""
    if request.param != "fused":
        monkeypatch.setattr(reference, "_fused", lambda qkv: False)
    if request.param == "one head at a time":
        monkeypatch.setattr(reference, "_SCORES", 1)


def op(lengths: tuple[int, ...], scale: float | None = None):
    return lambda qkv: varlen_attention(qkv, offsets(lengths), max(lengths), scale=scale)


def naive(lengths: tuple[int, ...], scale: float = HEAD_DIM**-0.5):
    def call(qkv) -> Tensor:
        """All rows against all rows, those of other sequences masked."""
        q, k, v = qkv[: sum(lengths)].unbind(1)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        probabilities = scores.masked_fill(owner[:, None] != owner[None, :], -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", probabilities, v)

    return call


@pytest.mark.usefixtures("implementation")
@table(LENGTHS, "lengths")
@pytest.mark.parametrize("tail", [0, 3])
def test_matches_masked_dense_attention(lengths, tail):
    qkv = rows_with_tail(sum(lengths), tail, 3, HEADS, HEAD_DIM)
    assert_matches(op(lengths), naive(lengths), {"qkv": qkv}, sum(lengths))


@pytest.mark.usefixtures("implementation")
def test_scale():
    assert_matches(op((4, 3), 0.7), naive((4, 3), 0.7), {"qkv": normal(7, 3, HEADS, HEAD_DIM)}, 7)


@pytest.mark.usefixtures("implementation")
def test_survives_large_scores():
    qkv = 100 * normal(7, 3, HEADS, HEAD_DIM)
    assert_matches(op((4, 3)), naive((4, 3)), {"qkv": qkv}, 7)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    lengths = (0, 61)
    assert_accurate(op(lengths), naive(lengths), {"qkv": normal(61, 3, HEADS, HEAD_DIM)}, 61, dtype)


def test_accepts_any_strides():
    qkv = normal(HEADS, 3, 7, HEAD_DIM + 2).permute(2, 1, 0, 3)[..., :HEAD_DIM]
    assert_matches(op((4, 3)), naive((4, 3)), {"qkv": qkv}, 7)


def test_columns_need_not_lie_side_by_side():
    qkv = normal(7, 3, HEAD_DIM, HEADS).mT
    assert_matches(op((4, 3)), naive((4, 3)), {"qkv": qkv}, 7)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("cu_seqlens", [(0, 4, 8), (-1, 4, 7), (0, 5, 4), (1000, 1004, 1007), ()])
@pytest.mark.parametrize("learns", [False, True])
def test_no_rows_that_are_not_there(cu_seqlens, learns):
    qkv = normal(7, 3, 2, 5).requires_grad_(learns)
    with use_backend("reference"), raises("row offsets must rise from 0", f"got {list(cu_seqlens)}"):
        varlen_attention(qkv, int32(*cu_seqlens), 8)


def test_derivatives():
    gradcheck(op((2, 0, 3)), {"qkv": normal(5, 3, 2, 3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save_lse", [False, True])
def test_registration(dtype, save_lse):
    qkv = normal(5, 3, 2, 4).to(dtype).requires_grad_(save_lse)
    opcheck(torch.ops.mowe.varlen_attention.default, (qkv, offsets((2, 0, 3)), 3, 0.5, save_lse))


def test_registration_of_the_backward():
    qkv, cu_seqlens = normal(5, 3, 2, 4), offsets((2, 0, 3))
    out, lse = torch.ops.mowe.varlen_attention(qkv, cu_seqlens, 3, 0.5, True)
    opcheck(torch.ops.mowe.varlen_attention_backward.default, (normal(5, 2, 4), qkv, out, lse, cu_seqlens, 3, 0.5))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"qkv": normal(7, 3, 10)}, ("qkv must be queries", "[any, 3, any, any]", "got [7, 3, 10]")),
        ({"qkv": normal(7, 2, 2, 5)}, ("qkv must be queries", "[any, 3, any, any]", "got [7, 2, 2, 5]")),
        ({"cu_seqlens": offsets((7,))[None]}, ("cu_seqlens", "[any]", "got [1, 2]")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    fits = {"qkv": normal(7, 3, 2, 5), "cu_seqlens": offsets((4, 3)), "max_seqlen": 4}
    with raises("varlen_attention: ", *parts):
        varlen_attention(**fits | change)
