from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe_kernels import route_topk, use_backend
from mowe_kernels.triton._launch import override
from tests.mowe_kernels.checks import int32, normal, raises
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

# (clips, encoders, slots of the logits, slots of the learned logits)
ROUTES = pytest.mark.parametrize(
    ("batch", "encoders", "top_k", "top_k_independent"),
    [(1, 1, 1, 0), (5, 4, 1, 1), (7, 8, 2, 0), (11, 5, 0, 5), (3, 6, 6, 6), (2, 128, 8, 2)],
)
# So small that most batches take several blocks, and as large as it is.
BLOCKS = pytest.mark.parametrize("block", [16, 2048])


def op(batch: int, encoders: int, top_k: int, top_k_independent: int):
    layout = {
        "lengths": torch.arange(2 * batch, dtype=torch.int32).view(2, batch),
        "rank": torch.arange(encoders, dtype=torch.int32).flip(0),
        "level_bounds": int32(0, encoders, encoders // 2, encoders).view(2, 2),
    }
    layout = {name: value.to(DEVICE) for name, value in layout.items()}

    def call(logits: Tensor | None, learned_logits: Tensor | None):
        return route_topk(logits, learned_logits, top_k=top_k, top_k_independent=top_k_independent, **layout)

    return call


def assert_same_route(route, logits: Tensor | None, learned_logits: Tensor | None) -> None:
    """Choices and plan to the bit, weights as closely as the exponential allows, NaN where torch has it."""
    inputs = [None if x is None else x.to(DEVICE) for x in (logits, learned_logits)]
    with use_backend("triton"):
        weights, indices, plan = route(*inputs)
    with use_backend("reference"):
        expected_weights, expected_indices, expected_plan = route(*inputs)
    for ours, theirs in zip((indices, *plan), (expected_indices, *expected_plan), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(weights, expected_weights, equal_nan=True, atol=1e-7, rtol=1e-6)


@ROUTES
@BLOCKS
@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_and_plan(batch, encoders, top_k, top_k_independent, block, dtype):
    """Logits of few different values, so that ties abound."""
    logits = normal(batch, encoders).round().to(dtype) if top_k else None
    learned_logits = normal(encoders).round().to(dtype) if top_k_independent else None
    with override(pack_block=block):
        assert_same_route(op(batch, encoders, top_k, top_k_independent), logits, learned_logits)


def test_values_that_compare_unusually():
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [
            [-0.0, 0.0, -0.0, 0.0],
            [0.0, -0.0, -1.0, -0.0],
            [-inf, -inf, -inf, 1.0],
            [-inf, -1e30, -inf, -1e-30],
            [1.0, nan, 2.0, -nan],
            [inf, 1.0, -inf, inf],
        ]
    )
    for top_k in range(1, 5):
        assert_same_route(op(6, 4, top_k, 0), logits, None)


@ROUTES
@BLOCKS
def test_is_as_accurate_as_torch(batch, encoders, top_k, top_k_independent, block):
    inputs = {
        "logits": normal(batch, encoders) if top_k else None,
        "learned_logits": normal(encoders) if top_k_independent else None,
    }
    route = op(batch, encoders, top_k, top_k_independent)
    with override(pack_block=block, route_block=block):
        assert_as_accurate_as_torch(lambda **logits: route(**logits)[0], inputs, batch, torch.float32)


@pytest.mark.parametrize("learning", ["logits", "learned_logits"])
def test_gradients_one_by_one(learning):
    inputs = {"logits": normal(5, 6), "learned_logits": normal(6)}
    frozen = tuple(name for name in inputs if name != learning)
    route = op(5, 6, 2, 1)
    assert_as_accurate_as_torch(lambda **logits: route(**logits)[0], inputs, 5, torch.float32, frozen)


def test_no_clips():
    learned_logits = normal(3).float().to(DEVICE).requires_grad_()
    assert_same_route(op(0, 3, 1, 1), normal(0, 3).float(), learned_logits.detach())
    with use_backend("triton"):
        weights, _, _ = op(0, 3, 1, 1)(normal(0, 3).float().to(DEVICE), learned_logits)
        assert torch.equal(torch.autograd.grad(weights.sum(), learned_logits)[0], torch.zeros_like(learned_logits))


def test_all_encoders_chosen_twice():
    with override(pack_block=256):
        assert_same_route(op(3, 40, 40, 40), normal(3, 40).float(), normal(40).float())


def test_strides():
    logits = normal(4, 6).float().T.contiguous().T
    assert_same_route(op(4, 6, 2, 0), logits, None)


def test_refuses_types_it_cannot_compute_in():
    with use_backend("triton"), raises("route_topk", "float64"):
        op(2, 3, 1, 0)(normal(2, 3), None)
