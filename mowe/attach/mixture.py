"""The mixture inside another model: hooks read its audio features, and add the weak ones where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mowe.attach.configuration import AdapterConfig
from mowe.attach.layouts import AudioLayout
from mowe.attach.pieces import copies_of, pieces, windows
from mowe.audio import AudioBatch
from mowe.errors import AudioError
from mowe.families import ClipFeatures
from mowe.mixture import Mixture, MixtureOutput
from mowe.pool import EncoderPool, PoolOutput
from mowe.projector import BaseFeatures, projected_lengths
from mowe_kernels import FrameClock, mixture_project
from mowe_kernels.plan import device_lengths


class WeakColumns(nn.Module):
    """The columns that weak features meet in a linear layer, beside the trained ones: zero at first.

    [base ; weak] times a widened matrix is the trained product plus this module's, so the trained layer stays as it is
    (quantised, or under LoRA). For a residual the layer is the identity.
    """

    def __init__(self, widths: Sequence[int], slots: int, out_features: int, stack: int, scale: int):
        """scale: what the clocks of the families are multiplied by, so that the base's is whole."""
        super().__init__()
        self.slot_weights = nn.ParameterList(
            nn.Parameter(torch.zeros(slots, out_features, stack, width)) for width in widths
        )
        self.stack, self.scale = stack, scale

    def forward(
        self, base: BaseFeatures, weak: PoolOutput, weights: Tensor, clocks: Sequence[FrameClock]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Packed rows [R, out_features], their int32 offsets [B+1] and the host lengths, as from MoweProjector."""
        columns = list(self.slot_weights)
        device, dtype = base.rows.device, columns[0].dtype
        lengths = projected_lengths(base.lengths, [self.stack])
        on_device = device_lengths([base.lengths, lengths], device)
        offsets = nn.functional.pad(on_device[1].cumsum(0, dtype=torch.int32), (1, 0))
        rows = mixture_project(
            # The base's own product is computed elsewhere: here it has one feature, always zero.
            base.rows.new_zeros(base.rows.shape[0], 1, dtype=dtype),
            [rows.to(dtype) for rows in weak.rows],
            weights,
            base_starts=base.starts,
            base_lengths=on_device[0],
            row_offsets=[weak.plan.row_offsets(f) for f in range(len(weak.rows))],
            position=weak.plan.position,
            base_weight=columns[0].new_zeros(columns[0].shape[1], self.stack, 1),
            row_weights=columns,
            bias=None,
            base_clock=base.clock,
            row_clocks=[FrameClock(self.scale * clock.hop, self.scale * clock.offset) for clock in clocks],
            cu_seqlens=offsets,
            num_rows=sum(lengths),
            stride=self.stack,
        )
        return rows, offsets, tuple(lengths)


@dataclass
class Call:
    """One call of the model: the waveforms it was given and, once its tower has run, what the mixture adds.

    mixture_of: whose mixture it is. packed_frames: frames of each row of a packed tower. repeats: for each row that the
        tower will see, the row that it repeats; None for the rows as they are.
    """

    mixture_of: AttachedMixture
    waveforms: Tensor
    mask: Tensor | None
    packed_frames: list[int] | None = None
    repeats: list[int] | None = None
    mixture: MixtureOutput | None = None
    delta: Tensor | None = None


# Of the context, so that calls in several threads hear their own.
_hearing: ContextVar[Call | None] = ContextVar("hearing", default=None)


class AttachedMixture(Mixture):
    """Pool, routers and fusion beside the audio tower of another model.

    pool, router: as in MixtureOfWeakEncoders; every 30 s of an audio are routed by themselves. fusion: the weak
    features' columns (see WeakColumns), added to the features themselves ("residual") or to the output of the
    projector's first linear layer ("concat").
    """

    def __init__(self, config: AdapterConfig, pool: EncoderPool, layout: AudioLayout):
        scale = layout.hop.denominator
        clock = FrameClock(int(layout.hop * scale), layout.offset * scale)
        super().__init__(config, pool, config.base_width, clock)
        self.layout = layout
        slots = config.num_independent_slots + config.num_dependent_slots
        self.fusion = WeakColumns(pool.widths, slots, config.fusion_width, config.fusion_stack, scale)
        self._handles: list[RemovableHandle] = []

    @property
    def multi_modal_projector(self) -> nn.Module:
        """What `mix` puts the frames through."""
        return self.fusion

    def hook(self, model: PreTrainedModel) -> None:
        """Join the model."""
        layout = self.layout
        if callable(layout.rows):
            tower = layout.submodule(model, layout.tower)
            self._handles.append(tower.register_forward_pre_hook(self._count_packed, with_kwargs=True))
        features = layout.submodule(model, layout.features or layout.tower)
        self._handles.append(features.register_forward_hook(self._on_features))
        for path in layout.linear if self.config.fusion == "concat" else ():
            self._handles.append(layout.submodule(model, path).register_forward_hook(self._on_linear))

    def unhook(self) -> None:
        """Leave the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def hearing(self, waveforms: Tensor, mask: Tensor | None) -> Iterator[None]:
        """What runs inside hears these waveforms. Raises AudioError if the model's audio tower did not run."""
        call = Call(self, waveforms, mask)
        outer = _hearing.set(call)
        try:
            yield
            if call.mixture is None:
                raise AudioError("the model was given mowe_waveforms but no audio features to go with them")
        finally:
            _hearing.reset(outer)

    @property
    def call(self) -> Call | None:
        """What the model is hearing, None if nothing."""
        call = _hearing.get()
        return call if call is not None and call.mixture_of is self else None

    def repeats(self, rows: list[int]) -> None:
        """Note which row of audio each row that the tower will see repeats."""
        if self.call is not None:
            self.call.repeats = rows

    def _count_packed(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call is not None:
            given = signature(tower.forward).bind(*args, **kwargs).arguments
            self.call.packed_frames = cast(Any, self.layout.rows)(given).tolist()

    def _on_features(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self.call
        if call is None:
            raise AudioError(
                "the model got audio but no mowe_waveforms for its mixture: its processor was not wrapped "
                "(processor = mowe.wrap_processor(processor))"
            )
        features = output if isinstance(output, Tensor) else output[0]
        if call.delta is None:
            self._run(call, features)
        if self.config.fusion == "concat":
            return None
        features = features + call.delta.view_as(features).to(features)
        if isinstance(output, ModelOutput):
            output[next(iter(output))] = features
            return output
        return features if isinstance(output, Tensor) else (features, *output[1:])

    def _on_linear(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        delta = None if (call := self.call) is None else call.delta
        return output if delta is None else output + delta.view_as(output).to(output)

    def _run(self, call: Call, features: Tensor) -> None:
        """Fill in what the mixture did and `delta`, one row for every input of the layer that it is added behind."""
        layout, stack = self.layout, self.config.fusion_stack
        audio = AudioBatch.from_padded(call.waveforms, call.mask, "mowe_waveforms")
        waves = list(audio.samples.to(features.device).split(audio.lengths))
        frames = call.packed_frames or [features.shape[1]] * features.shape[0]
        if layout.rows == "windows":
            waves = windows(waves, features.shape[1], layout.hop)
        copies = copies_of(call.repeats or range(len(frames)))
        if len(copies) != len(waves) or sum(map(len, copies)) != len(frames):
            raise AudioError(f"the audio tower encoded {len(copies)} rows of audio, mowe_waveforms has {len(waves)}")
        firsts = [0, *accumulate(frames)]
        own = pieces(waves, [frames[places[0]] for places in copies], layout.hop, stack)
        rows = features.reshape(-1, features.shape[-1])
        starts = device_lengths([[firsts[copies[piece.row][0]] + piece.start for piece in own]], rows.device)[0]
        base = BaseFeatures(rows, starts, tuple(piece.frames for piece in own), self.base_clock)
        batch = AudioBatch.from_waveforms([piece.wave for piece in own], rows.device)
        call.mixture = self.mix(base, ClipFeatures(batch, self.pool.config.context))
        tokens, lengths = call.mixture.tokens, call.mixture.lengths
        inputs = [0, *accumulate(projected_lengths(frames, [stack]))]
        delta = tokens.new_zeros(inputs[-1], tokens.shape[1])
        for copy in range(len(copies[0])):  # rows that repeat one another were encoded once and are written to each
            targets: list[int] = []
            for piece, length in zip(own, lengths, strict=True):
                first = inputs[copies[piece.row][copy]] + piece.start // stack
                targets += range(first, first + length)
            delta = delta.index_copy(0, device_lengths([targets], delta.device)[0].long(), tokens)
        call.delta = delta
