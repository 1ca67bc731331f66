"""A mixture as a CUDA graph: everything between features and tokens launched at once, for any lengths up to a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from mowe.audio import AudioBatch
from mowe.errors import AudioError, ConfigError, naming
from mowe.families import ClipFeatures, EncoderFamily
from mowe.mixture import MixtureOfWeakEncoders, MixtureOutput
from mowe.projector import BaseFeatures, MoweProjector
from mowe_kernels.backend import implementation
from mowe_kernels.plan import device_lengths, static_lengths

Key = tuple[str, Any]
_PLAN = ("order", "position", "encoder", "cu_seqlens", "group_offsets")
_RESULTS = ("weights", "indices", "router_logits", "independent_logits")


class MixtureGraph:
    """Called like the mixture it was made of: base features, waveforms, base lengths.

    The graph reads its inputs from buffers for the longest clips it takes, and every length from one table of integers,
    so that its shapes depend neither on the lengths nor on the routing. A call makes the input features, fills the
    buffers and the table, and replays. The parameters are read where they lie: changed in place, they count.
    """

    def __init__(self, mixture: MixtureOfWeakEncoders, clips: int, samples: int, frames: int):
        """clips: of every batch. samples, frames: the most that a waveform and its base features may have.

        Raises ConfigError for a mixture that cannot be captured, AudioError for clips that its encoders cannot take.
        """
        if not isinstance(mixture.multi_modal_projector, MoweProjector):
            raise ConfigError("a mixture attached to a model cannot be captured, its parts run where the model's do")
        if clips < 1 or frames < 1:
            raise ConfigError(f"expected at least one clip and one base frame, got {clips} and {frames}")
        parameter = next(mixture.parameters())
        self.mixture, self.clips, self.samples, self.frames = mixture, clips, samples, frames
        self._device = parameter.device
        if self._device.type == "cuda" and "reference" in implementation("grouped_linear", [parameter]).__name__:
            raise ConfigError(
                "plain torch cannot be captured, it reads lengths on the host; CUDA graphs need the kernels "
                "(python -m mowe_kernels.tune)"
            )
        mixture.pool.layout(self._device)  # its tensors must outlive the graph
        with naming("the longest clip"):
            features = self._features([torch.zeros(samples, device=self._device)] * clips)
            tables = self._tables(features, [frames] * clips)
        self._base = torch.zeros(clips * frames, mixture.config.audio_config.hidden_size, device=self._device)
        self._starts = torch.arange(clips, device=self._device, dtype=torch.int32) * frames
        self._inputs = {key: tuple(x.clone() for x in given) for key, given in self._given(features)}
        self._table = device_lengths([row for table in tables for row in table], self._device)
        self._rows = [len(table) for table in tables]
        self._bounds = features.audio.lengths
        self._replay = _capture(self._run, self._device)

    @torch.no_grad()
    def __call__(
        self, base: Tensor, waveforms: Sequence[Tensor], base_lengths: Sequence[int] | Tensor | None = None
    ) -> MixtureOutput:
        """As the mixture's `forward`, whose result it gives, in tensors of its own.

        Raises AudioError besides for another number of clips, and for clips longer than the bound.
        """
        lengths = self.mixture.check(base, waveforms, base_lengths)
        if len(waveforms) != self.clips:
            raise AudioError(f"captured for {self.clips} clips, got {len(waveforms)}")
        for clip, (wave, length) in enumerate(zip(waveforms, lengths, strict=True)):
            if len(wave) > self.samples or length > self.frames:
                raise AudioError(
                    f"clip {clip}: captured for up to {self.samples} samples and {self.frames} base frames, "
                    f"got {len(wave)} and {length}"
                )
        features = self._features(waveforms)
        tables = self._tables(features, lengths)
        kept = min(base.shape[1], self.frames)
        self._base.view(self.clips, self.frames, -1)[:, :kept].copy_(base[:, :kept])
        for key, given in self._given(features):
            for buffer, value in zip(self._inputs[key], given, strict=True):
                buffer[: value.shape[0]].copy_(value)
        self._table.copy_(device_lengths([row for table in tables for row in table], self._device))
        return self._own(self._replay(), tables)

    def _features(self, waveforms: Sequence[Tensor]) -> ClipFeatures:
        return ClipFeatures(AudioBatch.from_waveforms(waveforms, self._device), self.mixture.pool.config.context)

    def _tables(self, features: ClipFeatures, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Every length that the graph reads, in the order in which it asks for them."""
        projector = cast(MoweProjector, self.mixture.multi_modal_projector)
        return [[list(lengths)], self.mixture.pool.lengths(features), projector.levels(lengths)]

    def _given(self, features: ClipFeatures) -> Iterator[tuple[Key, tuple[Tensor, Tensor]]]:
        """What each of the families reads, once: packed frames, and the first of each clip."""
        for key in dict.fromkeys(map(_key, self.mixture.pool.families)):
            yield key, getattr(features, key[0])(key[1])

    def _run(self) -> MixtureOutput:
        """The mixture over the buffers, as if every clip were of the longest."""
        base = BaseFeatures(self._base, self._starts, (self.frames,) * self.clips, self.mixture.base_clock)
        features = cast(ClipFeatures, _StaticFeatures(self))
        with torch.no_grad(), static_lengths(self._table.split(self._rows)):
            return self.mixture.mix(base, features)

    def _own(self, out: MixtureOutput, tables: list[list[list[int]]]) -> MixtureOutput:
        """A result that the next replay leaves alone."""
        _, pool, tokens = tables
        plan = {name: getattr(out.plan, name).clone() for name in _PLAN}
        copied = {name: None if (value := getattr(out, name)) is None else value.clone() for name in _RESULTS}
        return replace(
            out,
            tokens=out.tokens[: sum(tokens[-1])].clone(),
            lengths=tuple(tokens[-1]),
            plan=replace(out.plan, **plan, lengths=tuple(map(tuple, pool))),
            **copied,
        )


class _StaticFeatures:
    """Stands in for the features of the clips: gives the buffers instead."""

    def __init__(self, graph: MixtureGraph):
        self.audio = SimpleNamespace(lengths=graph._bounds)
        self.context = graph.mixture.pool.config.context
        self.log_mel = lambda num_mel_bins: graph._inputs["log_mel", num_mel_bins]
        self.wave = lambda normalize: graph._inputs["wave", normalize]


def _key(family: EncoderFamily) -> Key:
    """Which features a family reads: the method of ClipFeatures, and its argument."""
    asked = SimpleNamespace(log_mel=lambda bins: ("log_mel", bins), wave=lambda normalize: ("wave", normalize))
    return cast(Key, family.inputs(cast(ClipFeatures, asked)))


def _capture(run: Callable[[], MixtureOutput], device: torch.device) -> Callable[[], MixtureOutput]:
    """What repeats the launches of `run`, and gives its result, always in the same tensors."""
    if device.type != "cuda":
        raise ConfigError(f"a CUDA graph needs the mixture on a CUDA device, it is on {device}")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles the kernels, which cannot be done while a graph is made
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):  # else one of the current device
        out = run()

    def replay() -> MixtureOutput:
        graph.replay()
        return out

    return replay
