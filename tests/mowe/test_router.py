"""Router choices, weights and gradients against softmax and top-k written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe import MoweConfig
from mowe.router import MoweRouter, Routing
from mowe_kernels import PackLayout
from tests.mowe.encoders import assert_same

ENCODERS, WIDTH, LENGTHS = 5, 8, [[7, 3, 11]]
LAYOUT = PackLayout.build([0] * ENCODERS, [1])


def router(independent: int = 1, dependent: int = 1, **settings: object) -> MoweRouter:
    torch.manual_seed(0)
    config = MoweConfig(num_independent_slots=independent, num_dependent_slots=dependent, **settings)
    made = MoweRouter(config, WIDTH, ENCODERS).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def route(made: MoweRouter, summary: Tensor | None = None) -> Routing:
    return made(summaries() if summary is None else summary, LENGTHS, LAYOUT)


def summaries() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


def naive(made: MoweRouter, summary: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices [B, k], one clip and one slot at a time, in double precision."""
    config, rows = made.config, []
    for clip in summary.double():
        row = []
        for k, logits in (
            (config.num_independent_slots, made.independent_logits),
            (config.num_dependent_slots, made.dependent.weight.double() @ clip if made.dependent else None),
        ):
            if k:
                p = torch.exp(logits.double() / config.router_temperature)
                p = p / p.sum()
                best = sorted(range(ENCODERS), key=lambda e: -p[e].item())[:k]
                row += [(p[e], e) for e in best]
        rows.append(row)
    weights = torch.stack([torch.stack([w for w, _ in row]) for row in rows])
    return weights, torch.tensor([[e for _, e in row] for row in rows])


SLOTS = [(1, 1), (0, 1), (1, 0), (0, 2), (2, 0), (2, 2), (3, 1), (ENCODERS, ENCODERS)]


@pytest.mark.parametrize(("independent", "dependent"), SLOTS)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_choices_weights_and_gradients(independent, dependent, temperature):
    made = router(independent, dependent, router_temperature=temperature)
    ours, theirs = summaries().requires_grad_(), summaries().requires_grad_()
    routing = route(made, ours)
    weights, indices = naive(made, theirs)
    assert routing.weights.dtype == torch.float32 and routing.indices.dtype == torch.int64
    assert torch.equal(routing.indices, indices)
    assert_same(routing.weights, weights)
    cotangent = torch.randn_like(weights)
    sources = list(made.parameters())
    got = torch.autograd.grad(routing.weights, [ours, *sources], cotangent.float(), allow_unused=True)
    expected = torch.autograd.grad(weights, [theirs, *sources], cotangent, allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other)


def test_independent_slots_are_the_same_for_every_clip():
    routing = route(router(2, 1))
    assert (routing.indices[:, :2] == routing.indices[0, :2]).all()
    assert (routing.weights[:, :2] == routing.weights[0, :2]).all()
    assert len(set(routing.indices[:, 2].tolist())) > 1


def test_ties_go_to_the_lower_index():
    made = router(2, 2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert route(made).indices.tolist() == [[0, 1, 0, 1]] * 3


def test_logits_are_the_ones_the_choice_was_made_from():
    made = router(1, 2, router_temperature=0.5)
    logits = route(made).logits
    torch.testing.assert_close(logits.dependent, summaries() @ made.dependent.weight.T / 0.5)
    torch.testing.assert_close(logits.independent, made.independent_logits / 0.5)
    assert route(router(0, 1)).logits.independent is None
    assert route(router(1, 0)).logits.dependent is None


def test_routers_without_slots_have_no_parameters():
    assert {name for name, _ in router(0, 1).named_parameters()} == {"dependent.weight"}
    assert {name for name, _ in router(1, 0).named_parameters()} == {"independent_logits"}


def test_noise_is_added_in_training_alone():
    made = router(1, 1, router_noise=0.5)
    evaluated = route(made)
    assert torch.equal(route(made).logits.dependent, evaluated.logits.dependent)
    made.train()
    samples = torch.stack([route(made).logits.dependent for _ in range(400)])
    noise = samples - evaluated.logits.dependent
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    assert not torch.equal(route(made).logits.independent, evaluated.logits.independent)
    quiet = router(1, 1).train()
    assert torch.equal(route(quiet).logits.dependent, route(quiet).logits.dependent)


def test_straight_through_weighs_one_and_has_the_gradient_of_the_softmax():
    plain, through = router(2, 2), router(2, 2, router_straight_through=True)
    cotangent = torch.randn(3, 4)
    for made, weights in ((plain, route(plain).weights), (through, route(through).weights)):
        weights.backward(cotangent)
        if made is through:
            assert torch.equal(weights, torch.ones_like(weights))
    for one, other in zip(through.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad) and one.grad.any()


def test_features_that_are_not_scaled():
    made = router(1, 1, scale_by_weight=False)
    routing = route(made)
    assert torch.equal(routing.weights, torch.ones(3, 2)) and not routing.weights.requires_grad
    assert torch.equal(routing.indices, route(router(1, 1)).indices)
    assert routing.logits.dependent.requires_grad and routing.logits.independent.requires_grad


def test_half_precision_parameters_route_in_single_precision():
    made = router(1, 1).bfloat16()
    routing = route(made, summaries().bfloat16())
    expected = summaries().bfloat16().float() @ made.dependent.weight.float().T
    assert torch.equal(routing.logits.dependent, expected) and routing.weights.dtype == torch.float32


def test_fresh_routers_prefer_nothing_independently_of_the_clip():
    made = MoweRouter(MoweConfig(), WIDTH, ENCODERS)
    made.reset_parameters()
    assert not made.independent_logits.any()


def test_the_plan_serves_the_choices():
    routing = route(router(1, 1))
    plan = routing.plan.family(0)
    for clip, row in enumerate(routing.indices.tolist()):
        for slot, encoder in enumerate(row):
            position = int(routing.plan.position[clip, slot])
            assert int(plan.clip[position]) == clip and int(plan.encoder[position]) == encoder
            start, stop = plan.rows.cu_seqlens[position : position + 2].tolist()
            assert stop - start == LENGTHS[0][clip]
