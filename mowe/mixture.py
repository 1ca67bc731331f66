"""Router, pool and projector as one module: base features and waveforms in, language-model embeddings out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mowe.audio import AudioBatch
from mowe.configuration_mowe import MoweConfig
from mowe.errors import AudioError, ConfigError
from mowe.families import ClipFeatures, KeepsFixed, family_class
from mowe.losses import RouterLogits, router_loss
from mowe.pool import EncoderPool
from mowe.projector import BaseFeatures, MoweProjector
from mowe.router import MoweRouter
from mowe_kernels import FrameClock, PackPlan, sequence_mean
from mowe_kernels.plan import device_lengths

if TYPE_CHECKING:
    from mowe.graphs import MixtureGraph

_INTEGER: tuple[Any, ...] = (Integral, torch.SymInt)  # of numpy, and of an exported program, too


@dataclass(frozen=True)
class MixtureOutput:
    """Embeddings for the language model, packed.

    tokens: [R, H], clip after clip, in the mixture's dtype. lengths: tokens of each clip, host integers. weights:
    float32 [B, k], what scales each slot's features. indices: int64 [B, k], the encoder of each slot. router_logits:
    float32 [B, E], temperature and noise included, None without a data-dependent slot. independent_logits: float32 [E],
    as these, None without a data-independent slot. router_losses: the coefficients of aux_loss. plan: how the pairs lay
    in memory.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    weights: Tensor
    indices: Tensor
    router_logits: Tensor | None
    independent_logits: Tensor | None
    router_losses: Mapping[str, float]
    plan: PackPlan

    @property
    def aux_loss(self) -> Tensor | None:
        """The weighted sum of the router losses, a float32 scalar, None without any.

        Made of the logits anew whenever it is read, so that it costs nothing where nobody learns. A reader under
        `torch.no_grad` gets one without a gradient, and leaves the next reader's alone.
        """
        return router_loss(RouterLogits(self.router_logits, self.independent_logits), self.router_losses)

    def clip(self, index: int) -> Tensor:
        """[T, H]: the tokens of one clip, a view. Raises IndexError for one outside of the batch."""
        return self.tokens.narrow(0, sum(self.lengths[:index]), self.lengths[index])

    def padded(self) -> tuple[Tensor, Tensor]:
        """[B, max T, H] with zeros after each clip's tokens, and the mask bool [B, max T] of those that are real.

        Compiled, it makes one graph for all lengths, but one for each clip that is ever the longest where torch takes
        them from its cache on disk.
        """
        device, (rows, width), clips = self.tokens.device, self.tokens.shape, len(self.lengths)
        longest = reduce(torch.sym_max, self.lengths)  # which clip's it is must not decide on a compiled graph
        lengths = device_lengths([self.lengths], device)[0]
        clip = torch.arange(clips, device=device).repeat_interleave(lengths, output_size=rows)
        place = torch.arange(rows, device=device) - (lengths.cumsum(0) - lengths)[clip]
        padded = self.tokens.new_zeros(clips, longest, width).index_put((clip, place), self.tokens)
        return padded, torch.arange(longest, device=device) < lengths[:, None]


torch.export.register_dataclass(MixtureOutput)  # as the pool's output, and for the same reasons


class Mixture(KeepsFixed, nn.Module):
    """Pool and routers over the frames of a base encoder.

    config: the routers' fields of MoweConfig. base_width, base_clock: of the base frames. pool: the weak encoders.
    A subclass has the multi_modal_projector, called as MoweProjector is, that base and weak frames go through.
    """

    multi_modal_projector: nn.Module

    def __init__(self, config: Any, pool: EncoderPool, base_width: int, base_clock: FrameClock):
        super().__init__()
        self.config = config
        self.base_clock = base_clock
        self.pool = pool
        self.router = MoweRouter(config, base_width, pool.num_encoders)

    def _replicate_for_data_parallel(self) -> Any:
        """What torch.nn.DataParallel calls: its replicas have no parameters, which are read here without a call."""
        raise ConfigError(
            "torch.nn.DataParallel cannot copy a mixture: start one process a GPU (torchrun, accelerate launch) or let "
            "this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def mix(self, base: BaseFeatures, features: ClipFeatures) -> MixtureOutput:
        """The mixture over packed base features and the clips they come from, in its own dtype, autocast or not."""
        device = base.rows.device
        with torch.autocast(device.type, enabled=False):
            lengths = self.pool.lengths(features)
            self.pool.prepare(features)
            summary = sequence_mean(base.rows, base.starts, device_lengths([base.lengths], device)[0])
            routing = self.router(summary, lengths, self.pool.layout(device))
            weak = self.pool(features, routing.plan)
            clocks = [family.clock for family in self.pool.families]
            tokens, _, num_tokens = self.multi_modal_projector(base, weak, routing.weights, clocks)
        return MixtureOutput(
            tokens,
            num_tokens,
            routing.weights,
            routing.indices,
            routing.logits.dependent,
            routing.logits.independent,
            self.config.router_losses or {},
            routing.plan,
        )


class MixtureOfWeakEncoders(Mixture):
    """Drop-in for the projector of an AudioLLM: adds a routed mixture of weak encoders to its base features.

    config: routers and projector; its audio_config gives the base width and frame rate, its text_config the width of
    the language model. pool: the weak encoders, which become part of the mixture. Routers and projector are new, of
    torch's default device and dtype wherever the pool is: `.to(device, dtype)` puts the mixture where the model is.
    base_clock: when the base frames happen, those of audio_config's encoder at first. Assign another one where they
    were shortened since: of Whisper frames averaged in twos it is `mowe_kernels.FrameClock(hop=640, offset=160)`.
    """

    def __init__(self, config: MoweConfig, pool: EncoderPool):
        slots = max(config.num_independent_slots, config.num_dependent_slots)
        if slots > pool.num_encoders:
            raise ConfigError(f"{slots} slots for one router but the pool has {pool.num_encoders} encoders")
        base_width = config.audio_config.hidden_size
        base_clock = family_class(config.audio_config.model_type).frame_clock(config.audio_config)
        super().__init__(config, pool, base_width, base_clock)
        self.multi_modal_projector = MoweProjector(config, base_width, pool.widths, config.text_config.hidden_size)

    def forward(
        self, base: Tensor, waveforms: Sequence[Tensor], base_lengths: Sequence[int] | Tensor | None = None
    ) -> MixtureOutput:
        """base: [B, T, D], the base encoder's features, on the mixture's device. waveforms: the B clips, 1-D float
        tensors at 16 kHz on any device, trusted to be finite (a NaN stays in its clip). Both may be of any dtype: the
        tokens have that of the mixture.

        base_lengths: frames of each clip that are not padding, host integers; all T by default. A tensor of them is
        read back from its device.
        Raises AudioError where base features and waveforms do not go together.
        """
        lengths = self.check(base, waveforms, base_lengths)
        batch, frames, _ = base.shape
        starts = torch.arange(batch, device=base.device, dtype=torch.int32) * frames
        features = ClipFeatures(AudioBatch.from_waveforms(waveforms, base.device), self.pool.config.context)
        return self.mix(BaseFeatures(base.flatten(0, 1), starts, lengths, self.base_clock), features)

    def check(
        self, base: Tensor, waveforms: Sequence[Tensor], base_lengths: Sequence[int] | Tensor | None
    ) -> tuple[int, ...]:
        """Frames of each clip that are not padding; raises AudioError as `forward` does."""
        width = self.config.audio_config.hidden_size
        if base.dim() != 3 or base.shape[2] != width or base.shape[0] != len(waveforms) or base.shape[1] < 1:
            raise AudioError(f"base must be [{len(waveforms)}, T, {width}], one entry a clip, got {list(base.shape)}")
        batch, frames, _ = base.shape
        if isinstance(base_lengths, Tensor):
            if base_lengths.dim() != 1:  # a mask, perhaps
                raise AudioError(f"base_lengths must be [{batch}], one entry a clip, got {list(base_lengths.shape)}")
            base_lengths = base_lengths.tolist()
        lengths = tuple(base_lengths) if base_lengths is not None else (frames,) * batch
        if len(lengths) != batch or not all(isinstance(n, _INTEGER) and 0 < n <= frames for n in lengths):
            raise AudioError(f"base_lengths must be {batch} integers in 1..{frames}, got {list(lengths)}")
        return lengths

    def capture(self, clips: int, samples: int, frames: int) -> MixtureGraph:
        """The mixture as a CUDA graph, called like this module: for `clips` clips of up to `samples` samples and
        `frames` base frames, whatever their lengths and routing. For inference: no gradient flows.
        """
        from mowe.graphs import MixtureGraph

        return MixtureGraph(self, clips, samples, frames)
