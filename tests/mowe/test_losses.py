"""The terms of L_MoWE against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mowe.configuration_mowe import PAPER_ROUTER_LOSSES, ROUTER_LOSSES
from mowe.losses import RouterLogits, entropy, loss_share, router_loss, router_loss_terms

# Two clips and two encoders, the clips' probabilities (3/4, 1/4) and (1/2, 1/2); the router of all clips (1/5, 4/5).
DEPENDENT = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
INDEPENDENT = torch.tensor([0.0, math.log(4.0)])
LOGITS = RouterLogits(DEPENDENT, INDEPENDENT)
EXPECTED = {
    "independent_entropy": -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)),
    "dependent_entropy": (-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + math.log(2)) / 2,
    # Mean probabilities (5/8, 3/8).
    "diversity": 0.625 * math.log(0.625) + 0.375 * math.log(0.375),
    # Both clips rank the first encoder first: 2 * (1 * 5/8 + 0 * 3/8).
    "load_balance": 1.25,
    # Log-partitions log 4 and log 2.
    "z_loss": (math.log(4) ** 2 + math.log(2) ** 2) / 2,
}


@pytest.mark.parametrize("name", ROUTER_LOSSES)
def test_each_term(name):
    (term,) = router_loss_terms(LOGITS, {name: 1.0}).values()
    assert term.shape == () and term.dtype == torch.float32
    assert term.item() == pytest.approx(EXPECTED[name], rel=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    coefficients = {name: 0.5 + i for i, name in enumerate(ROUTER_LOSSES)}
    expected = sum(coefficients[name] * EXPECTED[name] for name in ROUTER_LOSSES)
    assert router_loss(LOGITS, coefficients).item() == pytest.approx(expected, rel=1e-6)


def test_the_preset_of_the_paper():
    def h(*probabilities: float) -> float:
        return -sum(p * math.log(p) for p in probabilities)

    expected = 0.1 * (h(0.2, 0.8) + (h(0.75, 0.25) + h(0.5, 0.5)) / 2 - h(0.625, 0.375))
    assert router_loss(LOGITS, PAPER_ROUTER_LOSSES).item() == pytest.approx(expected, rel=1e-6)


def test_the_preset_falls_as_choices_sharpen_and_clips_spread():
    sharp = 20 * torch.eye(4)
    spread = router_loss(RouterLogits(sharp, sharp[0]), PAPER_ROUTER_LOSSES)
    crowded = router_loss(RouterLogits(sharp[:1].expand(4, -1), sharp[0]), PAPER_ROUTER_LOSSES)
    blurred = router_loss(RouterLogits(torch.zeros(4, 4), torch.zeros(4)), PAPER_ROUTER_LOSSES)
    assert spread < crowded < blurred
    assert spread.item() == pytest.approx(-0.1 * math.log(4), abs=1e-4)


def test_load_balance_is_one_for_a_balanced_batch():
    term = router_loss_terms(RouterLogits(5 * torch.eye(4), None), {"load_balance": 1.0})["load_balance"]
    assert term.item() == pytest.approx(1.0, rel=1e-6)


def test_routers_without_slots_have_no_terms():
    coefficients = dict.fromkeys(ROUTER_LOSSES, 1.0)
    assert set(router_loss_terms(RouterLogits(None, INDEPENDENT), coefficients)) == {"independent_entropy"}
    assert set(router_loss_terms(RouterLogits(DEPENDENT, None), coefficients)) == set(ROUTER_LOSSES[1:])
    assert router_loss(RouterLogits(DEPENDENT, None), {"independent_entropy": 1.0}) is None
    assert router_loss(LOGITS, {}) is None


def test_entropy_of_certainty_is_zero():
    assert entropy(torch.tensor([1_000.0, 0.0, -1_000.0])).item() == 0.0


@pytest.mark.parametrize("name", ROUTER_LOSSES)
def test_routers_that_are_certain_have_gradients(name):
    """Probabilities that underflow to zero, one of them for every clip of the batch."""
    dependent = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, -300.0]], requires_grad=True)
    independent = torch.tensor([300.0, 0.0, -300.0], requires_grad=True)
    router_loss(RouterLogits(dependent, independent), {name: 1.0}).backward()
    for logits in (dependent, independent):
        assert logits.grad is None or logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ROUTER_LOSSES)
def test_gradients(name):
    """Against central differences, away from where the first choice of a clip changes."""
    torch.manual_seed(0)
    dependent = (torch.eye(3, 4) + 0.1 * torch.randn(3, 4)).requires_grad_()
    independent = torch.randn(4, requires_grad=True)
    logits = RouterLogits(dependent, independent)
    router_loss(logits, {name: 1.0}).backward()
    source = independent if name == "independent_entropy" else dependent
    direction = torch.randn_like(source)
    step = 1e-2
    values = []
    for sign in (1, -1):
        moved = (source + sign * step * direction).detach()
        both = RouterLogits(moved, None) if source is dependent else RouterLogits(None, moved)
        values.append(router_loss(both, {name: 1.0}).item())
    along = (source.grad * direction).sum().item()
    assert along == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2, abs=1e-3)


def test_a_share_counts_predicted_tokens():
    """The first token of a row is predicted from nothing, so its label counts no more than a -100."""
    labels = torch.tensor([[5, 6, -100, 7], [8, -100, -100, 9]])
    assert float(loss_share(labels, 12)) == 0.25
    assert float(loss_share(labels, torch.tensor(6))) == 0.5
    assert loss_share(labels, None) == 1.0


def test_half_precision_logits_give_single_precision_terms():
    halved = RouterLogits(DEPENDENT.bfloat16(), INDEPENDENT.bfloat16())
    for term in router_loss_terms(halved, dict.fromkeys(ROUTER_LOSSES, 1.0)).values():
        assert term.dtype == torch.float32
