"""Training steps: forward and backward. What a timed function gives is a gradient, [clip][slot] or [0][encoder]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.providers import Outputs, Provider, Run, given, loop
from benchmarks.whole import Parts, assembled, padded
from benchmarks.workloads import Workload
from mowe import EncoderPool
from mowe.families import Context


def packed_step(workload: Workload, context: Context | None = None) -> Run:
    pool, waveforms = (EncoderPool.from_encoders(workload.encoders()), workload.waveforms())
    (family,) = pool.families
    weight = family.layers[0].fc1.weight

    def run() -> Outputs:
        pool.zero_grad()
        out = pool.encode(waveforms, workload.indices, context or workload.context)
        _backward([features for clip in out.pairs() for features in clip])
        return [[weight.grad[e] for e in chosen] for chosen in workload.indices]

    return run


def padded_loop_step(workload: Workload) -> Run:
    encoders = workload.encoders()
    forward = loop(workload, encoders, [lambda x, e=e: e(x).last_hidden_state for e in encoders])

    def run() -> Outputs:
        _zero(encoders)
        _backward([features for clip in forward() for features in clip])
        return [[_fc1_grad(encoders[e]) for e in chosen] for chosen in workload.indices]

    return run


def mixture_step(workload: Workload, context: Context | None = None) -> Run:
    """The base encoder frozen; routers, pool and projector learn."""
    model, waveforms = (assembled(workload, context or workload.context), workload.waveforms())
    model.audio_tower.requires_grad_(False)
    inputs, mask = padded(waveforms)
    (family,) = model.mixture.pool.families
    weight = family.layers[0].fc1.weight

    def run() -> Outputs:
        model.zero_grad()
        out = model.get_audio_features(inputs, mask).mixture
        _backward(out.tokens.split(out.lengths))
        return [[*weight.grad, model.multi_modal_projector.linear.weight.grad]]

    return run


def padded_mixture_step(workload: Workload) -> Run:
    """The same with transformers, base and encoders each on one batch of 30 s windows."""
    model = assembled(workload, "window")
    parts = Parts.of(model)
    base, encoders = parts.base.requires_grad_(False), parts.encoders
    features = [torch.cat([clip[0] for clip in given(workload, [encoder])]) for encoder in (base, encoders[0])]
    frames = [model.audio_tower.level_lengths(len(wave), "valid")[-1] for wave in workload.waveforms()]

    def run() -> Outputs:
        model.zero_grad()
        _zero(encoders)
        of_base = base(features[0]).last_hidden_state
        rows = [of_base[b, :count] for b, count in enumerate(frames)]
        routes = [parts.route(own) for own in rows]
        slots: list[dict[int, Tensor]] = [{} for _ in rows]
        for e, encoder in enumerate(encoders):
            clips = [b for b, (_, chosen) in enumerate(routes) if e in chosen]
            if clips:
                for b, hidden in zip(clips, encoder(features[1][clips]).last_hidden_state, strict=True):
                    slots[b][e] = hidden
        tokens = [
            parts.project(own, weights, [found[e][: len(own)] for e in chosen])
            for own, found, (weights, chosen) in zip(rows, slots, routes, strict=True)
        ]
        _backward(tokens)
        return [[*map(_fc1_grad, encoders), model.multi_modal_projector.linear.weight.grad]]

    return run


STEPS = {
    "packed_step": Provider(
        packed_step, None, "one packed pass and its backward, from waveforms", "packed_step", learns=True
    ),
    "padded_loop_step": Provider(
        padded_loop_step,
        "window",
        "transformers, one batch an encoder and its backward, features given",
        "packed_step",
        learns=True,
    ),
    "mixture_step": Provider(
        mixture_step, None, "base encoder and mixture, packed, from waveforms", "mixture_step", learns=True
    ),
    "padded_mixture_step": Provider(
        padded_mixture_step,
        "window",
        "transformers and torch, one padded batch an encoder, features given",
        "mixture_step",
        learns=True,
    ),
}


def _zero(encoders: Sequence[nn.Module]) -> None:
    for encoder in encoders:
        encoder.zero_grad()


def _fc1_grad(encoder: nn.Module) -> Tensor:
    weight = encoder.layers[0].fc1.weight
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _backward(pieces: Sequence[Tensor]) -> None:
    """Of a loss that every row of every piece has a part in, each piece its own."""
    slope = torch.linspace(-1, 1, pieces[0].shape[1], device=pieces[0].device, dtype=pieces[0].dtype)
    torch.stack([(rows @ slope).mean() for rows in pieces]).mean().backward()
