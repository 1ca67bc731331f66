"""What the packed pool saves: the same features from it and from transformers encoders called clip by clip."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mowe.audio import SAMPLING_RATE
from mowe.pool import EncoderPool


class PerClipDispatch:
    """What packing replaces: every chosen encoder run on every clip alone, as transformers runs it.

    Whisper encoders get the 30 s window of `WhisperFeatureExtractor`, HuBERT and wav2vec 2.0 the clip unpadded. An
    encoder that two slots of a clip chose runs once, and encoders with the same features share them.
    """

    def __init__(self, pool: EncoderPool):
        self.device = next(pool.parameters()).device
        self.encoders = [pool.to_transformers(i) for i in range(pool.num_encoders)]
        self.extractors = [pool.feature_extractor(index) for index in range(pool.num_encoders)]

    @torch.inference_mode()
    def __call__(self, waveforms: Sequence[Tensor], indices: Sequence[Sequence[int]]) -> dict[tuple[int, int], Tensor]:
        """waveforms: B 1-D float CPU tensors at 16 kHz. indices: [B, k]. Features [T, D] of every (clip, encoder)."""
        features = {}
        for clip, (wave, chosen) in enumerate(zip(waveforms, indices, strict=True)):
            inputs: dict[str, Tensor] = {}
            for index in dict.fromkeys(chosen):
                encoder, extractor = self.encoders[index], self.extractors[index]
                key = repr(extractor)
                if key not in inputs:
                    extracted = extractor(wave.numpy(), sampling_rate=SAMPLING_RATE, return_tensors="pt")
                    inputs[key] = extracted[encoder.main_input_name].to(self.device)
                features[clip, index] = encoder(inputs[key]).last_hidden_state[0]
        return features


@dataclass(frozen=True)
class Comparison:
    """seconds_packed: the pool in its own context. seconds_per_clip: `PerClipDispatch`. Both medians, from waveforms to
    features. max_abs_diff: largest difference between the two where both see 30 s windows.
    """

    seconds_packed: float
    seconds_per_clip: float
    max_abs_diff: float

    @property
    def speedup(self) -> float:
        return self.seconds_per_clip / self.seconds_packed


@torch.inference_mode()
def compare(
    pool: EncoderPool,
    waveforms: Sequence[Tensor],
    indices: Sequence[Sequence[int]],
    runs: int = 3,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Comparison:
    """Time the packed pool against per-clip dispatch on the same choices, and compare their features.

    waveforms: B 1-D float CPU tensors at 16 kHz. indices: [B, k], encoder of each slot. track: wraps the rounds, for a
    progress bar. The two take turns, so that a machine that slows down slows both.
    """
    dispatch = PerClipDispatch(pool)

    def packed() -> None:
        pool.encode(waveforms, indices)

    def per_clip() -> None:
        dispatch(waveforms, indices)

    seconds: dict[Callable[[], None], list[float]] = {packed: [], per_clip: []}
    for round_ in track(range(runs + 1)):
        if round_ == 0:  # the warm-up of both
            difference = max_abs_diff(pool, dispatch, waveforms, indices)
            packed()
            continue
        for job, measured in seconds.items():
            start = _now(dispatch.device)
            job()
            measured.append(_now(dispatch.device) - start)
    return Comparison(statistics.median(seconds[packed]), statistics.median(seconds[per_clip]), difference)


def max_abs_diff(
    pool: EncoderPool, dispatch: PerClipDispatch, waveforms: Sequence[Tensor], indices: Sequence[Sequence[int]]
) -> float:
    """Largest absolute difference between packed and per-clip features.

    Like with like: transformers pads Whisper's input to 30 s, so the packed side runs in the "window" context, which
    does the same. HuBERT and wav2vec 2.0 run on the clip unpadded on both sides.
    """
    output = pool.encode(waveforms, indices, context="window")
    return max(
        (output.pair(clip, list(indices[clip]).index(index)) - alone).abs().max().item()
        for (clip, index), alone in dispatch(waveforms, indices).items()
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
