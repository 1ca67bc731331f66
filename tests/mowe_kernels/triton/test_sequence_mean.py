from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe_kernels import sequence_mean, use_backend
from mowe_kernels.triton._launch import override
from tests.mowe_kernels.checks import LENGTHS, int32, normal, offsets, raises, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")


def op(starts: Tensor, lengths: Tensor):
    return lambda x: sequence_mean(x, starts.to(DEVICE), lengths.to(DEVICE))


@table(LENGTHS | {"longer": (150, 0, 64, 65)}, "lengths")
@pytest.mark.parametrize("d", [5, 80])
@pytest.mark.parametrize("block", [(4, 16), (16, 64)])
def test_is_as_accurate_as_torch(lengths, d, block):
    x = rows_with_tail(sum(lengths), 3, d)
    with override(mean_block=block, mean_splits=3):
        packed = op(offsets(lengths)[:-1], int32(*lengths))
        assert_as_accurate_as_torch(packed, {"x": x}, len(lengths), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [384, 1280])
def test_widths_of_real_encoders(dtype, d):
    lengths = (5, 0, 30)
    packed = op(offsets(lengths)[:-1], int32(*lengths))
    assert_as_accurate_as_torch(packed, {"x": rows_with_tail(35, 0, d)}, 3, dtype)


def test_rows_of_no_sequence_have_no_gradient():
    """Sequences in any order, with rows between them that belong to none."""
    starts, lengths = int32(12, 2, 7), int32(4, 3, 0)
    assert_as_accurate_as_torch(op(starts, lengths), {"x": normal(20, 6)}, 3, torch.float32)
    x = normal(20, 6).float().to(DEVICE).requires_grad_()
    with use_backend("triton"):
        grad = torch.autograd.grad(op(starts, lengths)(x).sum(), x)[0]
    assert grad.any(1).nonzero().flatten().tolist() == [2, 3, 4, 12, 13, 14, 15]


def test_strides():
    x = normal(6, 10).T
    assert_as_accurate_as_torch(op(int32(1, 5), int32(3, 5)), {"x": x}, 2, torch.float32)


def test_refuses_types_it_cannot_compute_in():
    with use_backend("triton"), raises("sequence_mean", "float64"):
        op(int32(0), int32(4))(normal(4, 3).to(DEVICE))
