"""What every op has in common: torch.compile, fake tensors, and which gradients there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import mowe_kernels as mk
from tests.mowe_kernels.checks import int32, normal, offsets, spans

D, HEADS, ENCODERS, N = 8, 2, 3, 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def parameters() -> dict[str, Tensor]:
    shapes = {
        "stem": (ENCODERS, D, 3, 2),
        "stem_bias": (ENCODERS, D),
        "norm": (ENCODERS, D),
        "norm_bias": (ENCODERS, D),
        "qkv": (ENCODERS, 3 * D, D),
        "out": (ENCODERS, D, D),
        "fc1": (ENCODERS, 2 * D, D),
        "fc1_bias": (ENCODERS, 2 * D),
        "fc2": (ENCODERS, D, 2 * D),
        "fc2_bias": (ENCODERS, D),
        "base_weight": (N, 2, D),
        "row_weight": (2, N, 2, D),
        "router": (D, ENCODERS),
        "learned": (ENCODERS,),
    }
    return {name: (normal(*shape) / 2).requires_grad_() for name, shape in shapes.items()}


def batch(indices: list[list[int]], clips: tuple[int, ...]) -> dict[str, Any]:
    """Clips and a routing of them, as tensors and host integers."""
    plan = mk.PackPlan.build(torch.tensor(indices), [clips], mk.PackLayout.build([0] * ENCODERS, [1]))
    rows = plan.family(0).rows
    starts = offsets(clips)[:-1]
    return {
        "clips": normal(sum(clips), 2),
        "base": normal(sum(clips), D),
        "starts": starts,
        "sizes": int32(*clips),
        "clip": plan.family(0).clip.long(),
        "encoder": plan.encoder,
        "position": plan.position,
        "cu_seqlens": rows.cu_seqlens,
        "group_offsets": rows.group_offsets,
        "cu_out": offsets(tuple(n // 2 for n in clips)),
        "num_rows": rows.num_rows,
        "max_seqlen": rows.max_seqlen,
        "num_out": sum(n // 2 for n in clips),
    }


def mixture(p: dict[str, Tensor], b: dict[str, Any]) -> Tensor:
    """Every differentiable op once: a router, a one-layer encoder and a projector."""
    means = mk.sequence_mean(b["base"], b["starts"], b["sizes"])
    weights, _, _ = mk.route_topk(
        means @ p["router"],
        p["learned"],
        top_k=1,
        top_k_independent=1,
        lengths=b["sizes"][None],
        rank=torch.arange(ENCODERS, dtype=torch.int32),
        level_bounds=torch.tensor([[0, ENCODERS]], dtype=torch.int32),
    )
    x = mk.grouped_conv1d(
        b["clips"], p["stem"], p["stem_bias"], starts=b["starts"][b["clip"]], lengths=b["sizes"][b["clip"]],
        encoder=b["encoder"], cu_seqlens=b["cu_seqlens"], num_rows=b["num_rows"], padding=1, activation="gelu",
    )  # fmt: skip
    x = mk.sequence_norm(x, p["norm"], p["norm_bias"], encoder=b["encoder"], cu_seqlens=b["cu_seqlens"])
    h = mk.grouped_layer_norm(x, p["norm"], p["norm_bias"], b["group_offsets"])
    qkv = mk.grouped_linear(h, p["qkv"], None, b["group_offsets"]).view(-1, 3, HEADS, D // HEADS)
    h = mk.varlen_attention(qkv, b["cu_seqlens"], b["max_seqlen"]).flatten(1)
    x = mk.grouped_linear(h, p["out"], None, b["group_offsets"], residual=x)
    x = mk.grouped_mlp(
        x, p["norm"], p["norm_bias"], p["fc1"], p["fc1_bias"], p["fc2"], p["fc2_bias"], b["group_offsets"]
    )
    return mk.mixture_project(
        b["base"], [x], weights, base_starts=b["starts"], base_lengths=b["sizes"], row_offsets=[b["cu_seqlens"]],
        position=b["position"], base_weight=p["base_weight"], row_weights=[p["row_weight"]], bias=None,
        base_clock=mk.FrameClock(320, 0), row_clocks=[mk.FrameClock(320, 0)], cu_seqlens=b["cu_out"],
        num_rows=b["num_out"], stride=2,
    )  # fmt: skip


def run(function: Any, p: dict[str, Tensor], b: dict[str, Any]) -> tuple[Tensor, ...]:
    out = function(p, b)
    return out, *torch.autograd.grad(out.square().sum(), list(p.values()))


def test_compiled_whole_with_its_gradients():
    p, b = parameters(), batch([[0, 2], [2, 2]], (7, 4))
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, p, b), run(mixture, p, b), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_another_routing_or_length_compiles_nothing():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixture, backend=counter, fullgraph=True)
    p = parameters()
    run(compiled, p, batch([[0, 2], [2, 1]], (7, 4)))
    first = counter.frame_count
    run(compiled, p, batch([[1, 0], [0, 2]], (7, 4)))
    assert counter.frame_count == first == 1
    run(compiled, p, batch([[0, 2], [2, 2]], (9, 6)))  # sizes become symbols
    once = counter.frame_count
    for indices, clips in (([[1, 0], [2, 2]], (12, 5)), ([[-1, 0], [2, 1]], (3, 16)), ([[1, 1], [2, -1]], (31, 8))):
        b = batch(indices, clips)
        for ours, theirs in zip(run(compiled, p, b), run(mixture, p, b), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == once <= 2


def test_a_plan_compiles_with_its_ops():
    layout = mk.PackLayout.build([0, 1, 0], [1, 1])

    def rows(indices: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        plan = mk.PackPlan.build(indices, [[4, 3], [2, 5]], layout)
        return mk.grouped_linear(x, weight, None, plan.family(0).rows.group_offsets)

    indices, x, weight = torch.tensor([[0, 1], [2, 0]]), normal(14, 5), normal(2, 3, 5)
    compiled = torch.compile(rows, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(indices, x, weight)[:10], rows(indices, x, weight)[:10])


def test_fake_tensors_compute_nothing():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = torch.empty(7, 5, requires_grad=True), torch.empty(2, 3, 5, requires_grad=True)
        out = mk.grouped_linear(x, weight, None, torch.empty(3, dtype=torch.int32), activation="gelu")
        assert out.shape == (7, 3)
        out.sum().backward()
        assert weight.grad.shape == (2, 3, 5)


def test_a_backend_may_return_one_empty_tensor_for_all_that_nobody_asked_for(monkeypatch):
    def backward(grad, x, *_):
        nothing = x.new_empty(0)
        return torch.ones_like(x), nothing, nothing, nothing

    monkeypatch.setattr("mowe_kernels.reference.grouped_linear.backward", backward)
    compiled = torch.compile(mk.grouped_linear, backend="aot_eager", fullgraph=True)
    x = normal(4, 5).requires_grad_()
    compiled(x, normal(1, 3, 5), None, int32(0, 4)).sum().backward()
    assert x.grad.eq(1).all()


def test_no_second_derivative_instead_of_a_wrong_one():
    x, weight = normal(4, 5).requires_grad_(), normal(1, 3, 5).requires_grad_()
    out = mk.grouped_linear(x, weight, None, int32(0, 4), activation="gelu")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear_backward"):
        grad.square().sum().backward()


def test_no_rows_have_a_gradient_of_no_rows():
    x, weight = normal(0, 5).requires_grad_(), normal(1, 3, 5).requires_grad_()
    mk.grouped_linear(x, weight, None, int32(0, 0)).sum().backward()
    assert x.grad.shape == (0, 5)
    assert weight.grad.eq(0).all()
    scale = normal(0).requires_grad_()
    mk.grouped_linear(x, weight, None, int32(0, 0), row_scale=scale).sum().backward()
    assert scale.grad.shape == (0,)


@pytest.mark.parametrize("learns", [False, True])
def test_a_tangent_is_refused_and_not_dropped(learns):
    weight, at = normal(1, 3, 5).requires_grad_(learns), int32(0, 4)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: mk.grouped_linear(x, weight, None, at), (normal(4, 5),), (normal(4, 5),))
    with torch.autograd.forward_ad.dual_level():
        mk.grouped_linear(normal(4, 5), weight, None, at)


@pytest.mark.parametrize(("transform", "shape"), [(torch.func.grad, (4, 5)), (torch.func.vmap, (2, 4, 5))])
def test_transforms_of_functions_are_refused(transform, shape):
    weight, at = normal(1, 3, 5), int32(0, 4)
    with pytest.raises(NotImplementedError, match=r"cannot be transformed by torch\.func"):
        transform(lambda x: mk.grouped_linear(x, weight, None, at).sum())(normal(*shape))


def test_two_runs_are_bitwise_equal():
    p, b = parameters(), batch([[0, 2], [2, 1], [0, 0]], (17, 9, 30))
    assert all(torch.equal(*pair) for pair in zip(run(mixture, p, b), run(mixture, p, b), strict=True))


@pytest.mark.parametrize("order", [(2, 0, 1), (1,)])
def test_a_clip_does_not_see_its_neighbours(order):
    indices, clips = [[0, 2], [2, 1], [1, -1]], (17, 9, 12)
    p, whole = parameters(), batch(indices, clips)
    part = batch([indices[c] for c in order], tuple(clips[c] for c in order))
    for name in ("clips", "base"):
        part[name] = torch.cat([whole[name][spans(clips)[c]] for c in order])
    outs = [mixture(p, whole)[rows] for rows in spans(tuple(n // 2 for n in clips))]
    torch.testing.assert_close(mixture(p, part), torch.cat([outs[c] for c in order]))
