"""Processors that also give the pool what they give the model."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from copy import copy
from functools import cache, wraps
from inspect import signature
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin, ProcessorMixin

from mowe.attach.classes import made_again_by
from mowe.audio import as_waveform
from mowe.errors import ConfigError
from mowe.processing_mowe import AudioBatchFeature

_EXTRACTORS = ("feature_extractor", "audio_processor")
_CALLS = ("__call__", "apply_chat_template", "apply_transcription_request")


class WrappedBatchFeature(AudioBatchFeature):
    """What a wrapped processor gives."""

    waveforms = "mowe_waveforms"


# What feature extractors were given during the call of a wrapped processor; None outside of one. Of the context, so
# that calls in several threads hear their own.
_heard: ContextVar[list[Tensor] | None] = ContextVar("heard", default=None)


class Wrapped:
    """What a wrapped processor adds to its own class."""

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mowe_waveforms", "mowe_waveforms_mask"]  # type: ignore[misc]


def wrap_processor(processor: ProcessorMixin) -> ProcessorMixin:
    """A processor that is called as the given one is, and also gives the inputs of an attached mixture.

    Beside what the processor gives, its output has mowe_waveforms, float32 [N, S], and mowe_waveforms_mask, bool
    [N, S]: what its feature extractor was given, as waveforms at 16 kHz, one row an audio (or a window of one, where
    the processor cuts windows itself), in that order. Without audio there is neither. `processor` itself is left as it
    is; both save the same files.
    Raises ConfigError for a processor without a feature extractor of audio, and for one that is wrapped already.
    """
    if isinstance(processor, Wrapped):
        raise ConfigError("the processor is wrapped already")
    found = [name for name in _EXTRACTORS if isinstance(getattr(processor, name, None), FeatureExtractionMixin)]
    if not found:
        raise ConfigError(f"{type(processor).__name__} has no feature extractor of audio to wrap")
    wrapped, extractor = copy(processor), copy(getattr(processor, found[0]))
    extractor.__class__ = _listening(type(extractor))
    setattr(wrapped, found[0], extractor)
    wrapped.__class__ = _wrapped(type(processor))
    return wrapped


@cache
def _listening(base: type) -> type:
    """A feature extractor's class, under its own name, that tells a wrapped processor of the audio it is given."""
    own = signature(base.__call__)
    audio_name = list(own.parameters)[1]

    @wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = own.bind(self, *args, **kwargs).arguments
        rate = given.get("sampling_rate") or given.get("kwargs", {}).get("sampling_rate") or self.sampling_rate
        if (heard := _heard.get()) is not None:
            # Before the call and as a copy: some extractors normalise in place.
            heard += [as_waveform(clip, rate, "audio").clone() for clip in _clips(given[audio_name])]
        return base.__call__(self, *args, **kwargs)

    return type(base.__name__, (base,), {"__call__": __call__, **made_again_by(_listening, base)})


@cache
def _wrapped(base: type) -> type:
    """A processor's class, under its own name, whose calls add what its feature extractor heard."""
    calls = {name: _adding(getattr(base, name)) for name in _CALLS if hasattr(base, name)}
    return type(base.__name__, (Wrapped, base), {**calls, **made_again_by(_wrapped, base)})


def _adding(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def adding(self: Any, *args: Any, **kwargs: Any) -> Any:
        heard: list[Tensor] = []
        outer = _heard.set(heard)
        try:
            outputs = call(self, *args, **kwargs)
        finally:
            _heard.reset(outer)
        return _with_waveforms(outputs, heard) if heard and isinstance(outputs, BatchFeature) else outputs

    return adding


def _with_waveforms(outputs: BatchFeature, waves: list[Tensor]) -> WrappedBatchFeature:
    padded = torch.nn.utils.rnn.pad_sequence([wave.cpu() for wave in waves], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[wave.numel()] for wave in waves])
    weak = {"mowe_waveforms": padded, "mowe_waveforms_mask": mask}
    if not any(isinstance(value, Tensor) for value in outputs.values()):
        weak = {name: value.numpy() for name, value in weak.items()}
    return WrappedBatchFeature({**outputs, **weak})


def _clips(audio: Any) -> list[Any]:
    """The clips of what a feature extractor was called with: one, a list of them, or an array of rows."""
    if isinstance(audio, list | tuple):
        return [audio] if audio and isinstance(audio[0], Real) else list(audio)
    return [audio] if audio.ndim == 1 else list(audio)
