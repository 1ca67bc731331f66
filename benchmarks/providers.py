"""Ways to compute a workload. Each takes what exists before the clock starts and returns what is timed.

A timed function gives [clip][slot] -> [T, D]. All of them run under `torch.no_grad`, transformers with its own choice
of attention (SDPA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from benchmarks.workloads import Workload
from mowe import EncoderPool
from mowe.audio import SAMPLING_RATE
from mowe.families import Context

Outputs = list[list[Tensor]]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Provider:
    """prepare: builds the timed function. context: what its Whisper outputs equal; None for the workload's own."""

    prepare: Callable[[Workload], Run]
    context: Context | None
    meaning: str


def packed(workload: Workload, context: Context | None = None) -> Run:
    pool, waveforms = EncoderPool.from_encoders(workload.encoders()), workload.waveforms()

    def run() -> Outputs:
        out = pool.encode(waveforms, workload.indices, context or workload.context)
        return [[out.pair(clip, slot) for slot in range(workload.top_k)] for clip in range(len(waveforms))]

    return run


def per_clip(workload: Workload) -> Run:
    encoders, waveforms = workload.encoders(), workload.waveforms()
    inputs = _extractor(encoders[0])

    def run() -> Outputs:
        return [
            [_encode(encoders[e], inputs(wave)) for e in chosen]
            for wave, chosen in zip(waveforms, workload.indices, strict=True)
        ]

    return run


def per_clip_shared(workload: Workload) -> Run:
    encoders, waveforms = workload.encoders(), workload.waveforms()
    inputs = _extractor(encoders[0])

    def run() -> Outputs:
        return [
            [_encode(encoders[e], given) for e in chosen]
            for given, chosen in zip(map(inputs, waveforms), workload.indices, strict=True)
        ]

    return run


def per_clip_given(workload: Workload) -> Run:
    encoders = workload.encoders()
    given = list(map(_extractor(encoders[0]), workload.waveforms()))

    def run() -> Outputs:
        return [
            [_encode(encoders[e], clip) for e in chosen] for clip, chosen in zip(given, workload.indices, strict=True)
        ]

    return run


def padded_loop(workload: Workload) -> Run:
    encoders = workload.encoders()
    given = list(map(_extractor(encoders[0]), workload.waveforms()))

    def run() -> Outputs:
        outputs: list[dict[int, Tensor]] = [{} for _ in given]
        for e, encoder in enumerate(encoders):
            clips = [b for b, chosen in enumerate(workload.indices) if e in chosen]
            if clips:
                hidden = encoder(torch.cat([given[b] for b in clips])).last_hidden_state
                for b, features in zip(clips, hidden, strict=True):
                    outputs[b][e] = features
        return [[found[e] for e in chosen] for found, chosen in zip(outputs, workload.indices, strict=True)]

    return run


def trimmed(workload: Workload) -> Run:
    encoders, waveforms = workload.encoders(), workload.waveforms()
    inputs = _extractor(encoders[0], padding="do_not_pad")

    def run() -> Outputs:
        return [
            [_encode_own_frames(encoders[e], given) for e in chosen]
            for given, chosen in zip(map(inputs, waveforms), workload.indices, strict=True)
        ]

    return run


PROVIDERS = {
    "packed": Provider(packed, None, "one packed pass, from waveforms"),
    "per_clip": Provider(per_clip, "window", "transformers, each clip and slot alone, from waveforms"),
    "per_clip_shared": Provider(per_clip_shared, "window", "the same, features computed once a clip"),
    "per_clip_given": Provider(per_clip_given, "window", "the same, features given"),
    "padded_loop": Provider(padded_loop, "window", "transformers, one batch an encoder, features given"),
    "trimmed": Provider(trimmed, "valid", "transformers' layers on each clip's own frames, from waveforms"),
}


def _extractor(encoder: nn.Module, padding: str = "max_length") -> Callable[[Tensor], Tensor]:
    """Waveform -> the encoder's input [1, ...]: log-mel features for Whisper, the clip as it is for wave encoders."""
    if encoder.main_input_name != "input_features":
        return lambda wave: wave[None]
    extract = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    return lambda wave: (
        extract(wave.numpy(), sampling_rate=SAMPLING_RATE, padding=padding, return_tensors="pt").input_features
    )


def _encode(encoder: nn.Module, given: Tensor) -> Tensor:
    return encoder(given).last_hidden_state[0]


def _encode_own_frames(encoder: nn.Module, features: Tensor) -> Tensor:
    """WhisperEncoder without its demand for 30 s."""
    h = nn.functional.gelu(encoder.conv1(features))
    h = nn.functional.gelu(encoder.conv2(h)).mT
    h = h + encoder.embed_positions.weight[: h.shape[1]]
    for layer in encoder.layers:
        h = layer(h, None)
    return encoder.layer_norm(h)[0]
