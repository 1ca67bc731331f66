"""The projector and the mixture as one would write them without the library: clip by clip, everything concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mowe import EncoderPool, MixtureOfWeakEncoders
from mowe.projector import MoweProjector
from tests.mowe.encoders import alone

# Sample on which frame 0 is centred, and samples between frames.
WHISPER_TIMES = (0, 320)
WAVE_TIMES = (200, 320)


def frames_at(base_times: Tensor, rows: Tensor, times: tuple[int, int]) -> Tensor:
    """[T, D]: for each time the row that happens nearest to it; zeros where none is within a frame and a half."""
    first, hop = times
    happens = first + hop * torch.arange(len(rows))
    distance = (base_times[:, None] - happens).abs()
    nearest = rows[distance.argmin(1)]
    return nearest * (distance.amin(1, keepdim=True) < 1.5 * hop)


def encoder_gradients(pool: EncoderPool, index: int, encoder: nn.Module) -> dict[str, Tensor]:
    """The gradients that encoder `index` of a pool has, under the names of its transformers module."""
    family, place = next(
        (family, members.index(index))
        for family, members in zip(pool.families, pool.members, strict=True)
        if index in members
    )
    ours, theirs = dict(family.named_parameters()), dict(encoder.named_parameters())
    gradients = {}
    for entry in family.entries():
        if ours[entry.ours].grad is None:
            continue
        parts = [theirs[name].detach().clone().requires_grad_() for name in entry.theirs]
        found = torch.autograd.grad(entry.pack(parts), parts, ours[entry.ours].grad[place])
        gradients |= dict(zip(entry.theirs, found, strict=True))
    return gradients


class NaiveProjector(nn.Module):
    """nn.Conv1d or nn.Linear over [base ; slot 1 ; ... ; slot k], each slot with columns for every family."""

    def __init__(self, projector: MoweProjector):
        super().__init__()
        slots = len(projector.slot_weights[0])
        parts = [projector.base_weight, *(w[s] for s in range(slots) for w in projector.slot_weights)]
        self.columns = [part.shape[-1] for part in parts]
        weight = torch.cat(parts, dim=-1).detach()  # [N, taps, columns]
        self.stacked = len(projector.strides) == 1 and projector.padding == 0
        if self.stacked:
            layers = [_with(nn.Linear(*weight.flatten(1).shape[::-1]), weight.flatten(1), projector.bias)]
            self.stride = projector.strides[0]
        else:
            layers = [_conv(weight, projector.bias)]
            layers += [_conv(conv.weight[0], conv.bias[0]) for conv in projector.convs]
        self.layers = nn.ModuleList(layers)
        self.linear = _with(
            nn.Linear(projector.linear.in_features, projector.linear.out_features),
            projector.linear.weight,
            projector.linear.bias,
        )

    def forward(self, base: Tensor, weak: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """Tokens of one clip. base: [T, D]. weak: per slot and family, [T, D_f]; None for a family not chosen."""
        flat = [None] + [part for slot in weak for part in slot]
        parts = [
            base if i == 0 else base.new_zeros(len(base), width) if part is None else part
            for i, (part, width) in enumerate(zip(flat, self.columns, strict=True))
        ]
        h = torch.cat(parts, dim=1)
        for layer in self.layers:
            if self.stacked:
                h = nn.functional.pad(h, (0, 0, 0, -len(h) % self.stride))
                h = layer(h.reshape(-1, self.stride * h.shape[1]))
            else:
                h = layer(h.T[None])[0].T
            h = nn.functional.gelu(h)
        return self.linear(h)

    def gradients(self, projector: MoweProjector) -> dict[str, Tensor]:
        """The gradients under the names of the projector's own parameters."""
        first = self.layers[0]
        taps = projector.taps
        grad = first.weight.grad.unflatten(1, (taps, -1)) if self.stacked else first.weight.grad.mT
        base, *weak = grad.split(self.columns, dim=-1)
        families = len(projector.slot_weights)
        gradients = {"base_weight": base, "bias": first.bias.grad}
        for f in range(families):
            gradients[f"slot_weights.{f}"] = torch.stack(weak[f::families])
        for i, conv in enumerate(self.layers[1:]):
            gradients[f"convs.{i}.weight"] = conv.weight.grad.mT[None]
            gradients[f"convs.{i}.bias"] = conv.bias.grad[None]
        return gradients | {"linear.weight": self.linear.weight.grad, "linear.bias": self.linear.bias.grad}


def _with(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _conv(weight: Tensor, bias: Tensor) -> nn.Conv1d:
    n, taps, channels = weight.shape
    return _with(nn.Conv1d(channels, n, taps, stride=2, padding=1), weight.mT, bias)


class NaiveMixture(nn.Module):
    """A loop over clips and slots, with the encoders as transformers has them."""

    def __init__(self, mixture: MixtureOfWeakEncoders):
        super().__init__()
        pool, router = mixture.pool, mixture.router
        self.config, self.context, self.members = mixture.config, pool.config.context, pool.members
        self.do_normalize = [entry["do_normalize"] for entry in pool.config.encoders]
        self.encoders = nn.ModuleList(pool.to_transformers(i) for i in range(pool.num_encoders))
        self.projector = NaiveProjector(mixture.multi_modal_projector)
        self.independent = self.dependent = None
        if router.independent_logits is not None:
            self.independent = nn.Parameter(router.independent_logits.detach().clone())
        if router.dependent is not None:
            self.dependent = nn.Parameter(router.dependent.weight.detach().clone())

    def forward(
        self, base: Sequence[Tensor], waves: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[list[int]], Tensor | None, Tensor | None]:
        """Tokens [T, H] and choices of each clip; the logits of both routers, divided by the temperature."""
        config = self.config
        independent = None if self.independent is None else self.independent / config.router_temperature
        dependent = None
        if self.dependent is not None:
            dependent = torch.stack([self.dependent @ frames.mean(0) for frames in base]) / config.router_temperature
        tokens, choices = [], []
        for b, (frames, wave) in enumerate(zip(base, waves, strict=True)):
            slots = []
            for logits, k in (
                (independent, config.num_independent_slots),
                (None if dependent is None else dependent[b], config.num_dependent_slots),
            ):
                if k:
                    weights, chosen = logits.softmax(-1).topk(k)
                    slots += [(self._weight(w), e) for w, e in zip(weights, chosen.tolist(), strict=True)]
            choices.append([encoder for _, encoder in slots])
            tokens.append(self.projector(frames, [self._slot(frames, wave, w, e) for w, e in slots]))
        return tokens, choices, independent, dependent

    def _weight(self, weight: Tensor) -> Tensor | float:
        if not self.config.scale_by_weight:
            return 1.0
        return weight - weight.detach() + 1.0 if self.config.router_straight_through else weight

    def _slot(self, base: Tensor, wave: Tensor, weight: Tensor | float, chosen: int) -> list[Tensor | None]:
        encoder = self.encoders[chosen]
        rows = weight * alone(encoder, wave, self.context, self.do_normalize[chosen])
        base_times = torch.arange(len(base)) * 320 + _times(self.config.audio_config.model_type)[0]
        aligned = frames_at(base_times, rows, _times(encoder.config.model_type))
        return [aligned if chosen in members else None for members in self.members]


def _times(model_type: str) -> tuple[int, int]:
    return WHISPER_TIMES if model_type == "whisper" else WAVE_TIMES
