"""What every encoder family is: encoders of one architecture and size, run together over a plan."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mowe.audio import MIN_SAMPLES, WINDOW_SAMPLES, AudioBatch
from mowe.errors import naming
from mowe.families.convert import Entry, encoder_state_dict, load_encoder
from mowe.features import Context, Spectrogram, check_context, log_mel_rows, normalize_waves
from mowe_kernels import FamilyPlan, FrameClock
from mowe_kernels.plan import only_bounds

# Rows that go through all layers together on the CPU, a window of 30 s at 50 Hz: enough for full GEMM speed.
_ROWS_IN_CACHE = 1536


class ClipFeatures:
    """A batch of clips in every form an encoder takes, each computed once, when first asked for."""

    def __init__(self, audio: AudioBatch, context: Context):
        check_context(context)
        self.audio = audio
        self.context = context
        self._spectrogram: Spectrogram | None = None
        self._log_mel: dict[int, Tensor] = {}
        self._normalized: AudioBatch | None = None
        self._wave_starts: Tensor | None = None

    def log_mel(self, num_mel_bins: int) -> tuple[Tensor, Tensor]:
        """Whisper's log-mel rows [S, num_mel_bins] and the first row of each clip, int32 [B]."""
        if torch.compiler.is_compiling():
            return log_mel_rows(self.audio, self.context, num_mel_bins)
        if self._spectrogram is None:
            self._spectrogram = Spectrogram(self.audio, self.context)
        if num_mel_bins not in self._log_mel:
            self._log_mel[num_mel_bins] = self._spectrogram.log_mel(num_mel_bins)
        return self._log_mel[num_mel_bins], self._spectrogram.starts

    def wave(self, normalize: bool) -> tuple[Tensor, Tensor]:
        """The samples [S, 1], with zero mean and unit variance if asked, and the first of each clip, int32 [B]."""
        if normalize and self._normalized is None:
            self._normalized = normalize_waves(self.audio)
        if self._wave_starts is None:
            self._wave_starts = self.audio.starts
        audio = self._normalized if normalize else self.audio
        return audio.samples[:, None], self._wave_starts


class KeepsFixed:
    """A module with families in it, whose fixed parameters stay fixed when everything is asked to learn."""

    def requires_grad_(self: Any, requires_grad: bool = True) -> Any:
        """As in torch, but for what is never learned (see `EncoderFamily.fixed`)."""
        super().requires_grad_(requires_grad)  # type: ignore[misc]
        hold_fixed(self)
        return self


def hold_fixed(module: nn.Module) -> None:
    """Keep fixed what is fixed in every family of a module."""
    for family in module.modules():
        if isinstance(family, EncoderFamily):
            family.hold_fixed()


class EncoderFamily(KeepsFixed, nn.Module):
    """Encoders of one architecture and size, their parameters stacked along the first axis.

    A subclass knows one architecture of transformers: which configurations it can run, how a clip becomes frames, the
    layers, and the names of the parameters. The layers have no dropout, layer drop or SpecAugment: a frozen encoder
    gives the same features in training as in evaluation.
    """

    encoder_class: ClassVar[type[PreTrainedModel]]  # what `to_transformers` gives back
    fixed: ClassVar[tuple[str, ...]] = ()  # parameters that are given and never learned
    hidden_size: int
    num_levels: int

    def __init__(self, configs: list[PreTrainedConfig], do_normalize: bool = False):
        """do_normalize: whether the encoders take waves of zero mean and unit variance."""
        super().__init__()
        self.configs = configs
        self.do_normalize = do_normalize
        self.clock = self.frame_clock(configs[0])

    @classmethod
    def signature(cls, config: PreTrainedConfig, do_normalize: bool) -> tuple[Any, ...]:
        """What encoders must share to be stacked. Raises ConfigError for a configuration that cannot be run."""
        raise NotImplementedError

    @classmethod
    def frame_clock(cls, config: PreTrainedConfig) -> FrameClock:
        """When the frames of the encoder's output happen."""
        raise NotImplementedError

    @classmethod
    def stages(cls, config: PreTrainedConfig) -> list[tuple[int, int, int]]:
        """(kernel, stride, total padding) of every strided step from the samples of a clip to its frames."""
        raise NotImplementedError

    @classmethod
    def sample_range(cls, config: PreTrainedConfig) -> tuple[int, int]:
        """Fewest and most samples of a window that an encoder takes."""
        fewest = 1
        for kernel, stride, padding in reversed(cls.stages(config)):
            fewest = (fewest - 1) * stride + kernel - padding
        return max(fewest, MIN_SAMPLES), WINDOW_SAMPLES

    def check_context(self, context: Context) -> None:
        """Raise ConfigError for a context that the encoders cannot run in."""

    def level_lengths(self, samples: int, context: Context) -> list[int]:
        """Frames of a clip of `samples` samples at each level, the last being the encoder's output.

        Raises AudioError for a clip that the encoder cannot take.
        """
        raise NotImplementedError

    def lengths(self, features: ClipFeatures) -> list[list[int]]:
        """[num_levels][B]: frames of each clip at each level.

        Raises AudioError for a clip that cannot be taken, ConfigError for the context.
        """
        self.check_context(features.context)
        by_clip: list[list[int]] = []
        with naming(lambda: f"clip {len(by_clip)}"):
            for samples in features.audio.lengths:
                by_clip.append(self.level_lengths(samples, features.context))
        return [list(level) for level in zip(*by_clip, strict=True)]

    def inputs(self, features: ClipFeatures) -> tuple[Tensor, Tensor]:
        """Packed input frames [S, C] of all clips and the first frame of each, int32 [B]."""
        raise NotImplementedError

    def prepare(self, features: ClipFeatures) -> None:
        """Have a GPU make the inputs now, which `features` keeps: it is busy with them while the host lays out who
        reads them. Not in a compiled graph, where nothing is kept.
        """
        if next(self.parameters()).device.type != "cpu" and not torch.compiler.is_compiling():
            self.inputs(features)

    def encode(self, x: Tensor, starts: Tensor, plan: FamilyPlan) -> Tensor:
        """Input frames [S, C], first frame of each pair int32 [P] -> packed rows [R, hidden_size]."""
        raise NotImplementedError

    def entries(self) -> list[Entry]:
        """How the stacked parameters are named in one transformers encoder."""
        raise NotImplementedError

    def forward(self, features: ClipFeatures, plan: FamilyPlan) -> Tensor:
        """Rows [plan.rows.num_rows, hidden_size] of every pair of the plan that belongs to this family.

        Computed in the parameters' dtype, autocast or not.
        """
        if not plan.rows.num_rows:  # known on the CPU alone: nobody chose an encoder of this family
            # Of no entries of each parameter: all get a gradient, which other processes may be waiting for.
            none = next(self.parameters()).new_empty(0)
            of_each = (parameter.flatten()[:0] for parameter in self.parameters() if parameter.requires_grad)
            return torch.cat([none, *of_each]).view(0, self.hidden_size)
        x, starts = self.inputs(features)
        x = x.to(self.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type != "cpu" or only_bounds():
                return self.encode(x, starts[plan.clip], plan)
            # The CPU gains nothing from wide batches: few rows of one encoder at a time stay in cache and reuse memory.
            # Where a gradient is kept, every part costs one of the size of all encoders: then as few as possible.
            kept = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
            parts = plan.by_encoder() if kept else plan.by_encoder(_ROWS_IN_CACHE)
            return torch.cat([self.encode(x, starts[part.clip], part) for part in parts])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def reset_parameters(self) -> None:
        """Initialise what the family holds besides its layers."""

    def hold_fixed(self) -> None:
        """Keep fixed what is fixed; transformers' loading makes all floating-point parameters learn."""
        for name in self.fixed:
            if getattr(self, name) is not None:
                getattr(self, name).requires_grad = False

    def load_encoder(self, index: int, encoder: nn.Module) -> None:
        """Copy a transformers encoder into place `index`. Raises CheckpointError where it does not fit."""
        load_encoder(self, index, encoder.state_dict(), self.entries())

    def to_transformers(self, index: int) -> PreTrainedModel:
        """Encoder `index` as the transformers module it came from, in evaluation mode."""
        encoder = self.encoder_class(self.configs[index])
        state_dict = encoder_state_dict(self, index, self.entries())
        first = next(iter(state_dict.values()))
        encoder.to(first.device, first.dtype).load_state_dict(state_dict)
        return encoder.eval()
