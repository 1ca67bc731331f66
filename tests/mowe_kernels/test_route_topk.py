from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mowe_kernels import pack_plan, route_topk
from tests.mowe_kernels.checks import Inputs, assert_accurate, assert_matches, gradcheck, int32, normal, opcheck, raises

pytestmark = pytest.mark.usefixtures("poisoned")

BATCH, ENCODERS = 3, 5
SLOTS = pytest.mark.parametrize(("top_k", "top_k_independent"), [(1, 1), (2, 0), (0, 2), (5, 5), (3, 1)])


def layout(batch: int = BATCH, encoders: int = ENCODERS) -> dict[str, Tensor]:
    return {
        "lengths": torch.arange(1, batch + 1, dtype=torch.int32)[None],
        "rank": torch.arange(encoders, dtype=torch.int32).flip(0),
        "level_bounds": int32(0, encoders)[None],
    }


def make_inputs(top_k: int, top_k_independent: int) -> Inputs:
    return {
        "logits": normal(BATCH, ENCODERS) if top_k else None,
        "learned_logits": normal(ENCODERS) if top_k_independent else None,
    }


def naive(top_k: int, top_k_independent: int):
    def call(logits, learned_logits) -> Tensor:
        """Weights alone, the chosen encoders found by looking for the largest again and again."""
        rows = []
        for b in range(BATCH):
            row = []
            for k, values in ((top_k_independent, learned_logits), (top_k, None if logits is None else logits[b])):
                if k == 0:
                    continue
                probabilities = values.exp() / values.exp().sum()
                left = values.detach().tolist()
                for _ in range(k):
                    best = left.index(max(left))
                    left[best] = -float("inf")
                    row.append(probabilities[best])
            rows.append(torch.stack(row))
        return torch.stack(rows)

    return call


@SLOTS
def test_weights_and_their_gradients(top_k, top_k_independent):
    def op(logits, learned_logits):
        return route_topk(logits, learned_logits, top_k=top_k, top_k_independent=top_k_independent, **layout())[0]

    inputs = make_inputs(top_k, top_k_independent)
    assert_matches(op, naive(top_k, top_k_independent), inputs, BATCH)
    gradcheck(op, inputs)
    assert_accurate(op, naive(top_k, top_k_independent), inputs, BATCH, torch.float32)


@SLOTS
def test_plan_is_that_of_the_indices(top_k, top_k_independent):
    inputs = make_inputs(top_k, top_k_independent)
    weights, indices, plan = route_topk(**inputs, top_k=top_k, top_k_independent=top_k_independent, **layout())
    assert (weights.dtype, indices.dtype) == (torch.float64, torch.int64)
    independent, dependent = indices[:, :top_k_independent], indices[:, top_k_independent:]
    if top_k_independent:
        assert_close(weights[:, :top_k_independent], inputs["learned_logits"].softmax(-1)[independent])
    if top_k:
        assert_close(weights[:, top_k_independent:], inputs["logits"].softmax(-1).gather(1, dependent))
    for ours, theirs in zip(plan, pack_plan(indices, *layout().values()), strict=True):
        assert torch.equal(ours, theirs)


def test_ties_go_to_the_lower_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0]])
    _, indices, _ = route_topk(logits, torch.zeros(5), top_k=2, top_k_independent=2, **layout())
    assert indices.tolist() == [[0, 1, 1, 2], [0, 1, 0, 1], [0, 1, 1, 3]]


def test_weights_are_float32_for_narrow_logits():
    weights, *_ = route_topk(normal(BATCH, ENCODERS).bfloat16(), None, top_k=2, top_k_independent=0, **layout())
    assert weights.dtype == torch.float32


def test_only_weights_carry_a_gradient():
    logits = normal(BATCH, ENCODERS).requires_grad_()
    weights, indices, plan = route_topk(logits, None, top_k=2, top_k_independent=0, **layout())
    assert weights.requires_grad
    assert not any(tensor.requires_grad for tensor in (indices, *plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "top_k_independent"), [(1, 1), (2, 0), (0, 2)])
def test_registration(dtype, top_k, top_k_independent):
    inputs = make_inputs(top_k, top_k_independent).values()
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
    opcheck(torch.ops.mowe.route_topk.default, (*leaves, top_k, top_k_independent, *layout().values()))


@pytest.mark.parametrize(("top_k", "top_k_independent"), [(1, 1), (2, 0), (0, 2)])
def test_registration_of_the_backward(top_k, top_k_independent):
    slots = top_k + top_k_independent
    indices = torch.tensor([[0, 1], [2, 3], [4, 4]])
    logits = make_inputs(top_k, top_k_independent).values()
    opcheck(torch.ops.mowe.route_topk_backward.default, (normal(BATCH, slots), *logits, indices, top_k_independent))


def test_registration_of_the_backward_with_other_strides():
    logits = normal(5, 3).T
    opcheck(torch.ops.mowe.route_topk_backward.default, (normal(3, 2), logits, None, torch.zeros(3, 2).long(), 0))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"top_k": 0, "top_k_independent": 0}, ("no slots",)),
        ({"top_k": 6}, ("6 slots for logits but only 5 encoders",)),
        ({"top_k_independent": -1}, ("-1 slots for learned_logits",)),
        ({"logits": None}, ("logits must be given exactly when", "fills 1")),
        ({"top_k_independent": 0}, ("learned_logits must be given exactly when", "fills 0")),
        ({"logits": normal(2, 5)}, ("logits", "[3, 5]", "got [2, 5]")),
        ({"learned_logits": normal(4)}, ("learned_logits", "[5]", "got [4]")),
        ({"learned_logits": normal(5).half()}, ("of one type", "torch.float64 and torch.float16")),
        ({"lengths": int32(1, 2, 3)}, ("lengths", "[any, 3]", "got [3]")),
        ({"level_bounds": int32(0, 5)}, ("level_bounds", "[1, 2]", "got [2]")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    fits = {"logits": normal(3, 5), "learned_logits": normal(5), "top_k": 1, "top_k_independent": 1, **layout()}
    with raises("route_topk: ", *parts):
        route_topk(**fits | change)
