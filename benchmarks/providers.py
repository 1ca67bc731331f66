"""Ways to compute a workload. Each takes what exists before the clock starts and returns what is timed.

A timed function gives [clip][slot] -> [T, D]: the encoders' features, or, in a training step, the gradient that the
clips' features together leave on each chosen encoder. transformers runs with its own choice of attention (SDPA).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from transformers import WhisperFeatureExtractor

from benchmarks.workloads import Workload
from mowe import EncoderPool
from mowe.audio import SAMPLING_RATE
from mowe.families import Context
from mowe_kernels import use_backend

Outputs = list[list[Tensor]]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Provider:
    """prepare: builds the timed function. context: what its Whisper outputs equal; None for the workload's own.

    same_as: the library's provider whose outputs it must equal; None for one that computes only a part of them.
    missing: why it cannot run on this machine, None where it can. learns: whether it computes gradients. dtype: of its
    weights, where that is not the workload's. tolerance: of its outputs, where its arithmetic is not the workload's.
    """

    prepare: Callable[..., Run]
    context: Context | None
    meaning: str
    same_as: str | None = "packed"
    missing: Callable[[], str | None] = lambda: None
    learns: bool = False
    dtype: str | None = None
    tolerance: float | None = None


@lru_cache(maxsize=1)
def shared_encoders(workload: Workload) -> list[nn.Module]:
    """The members of the pool, one copy for all who leave them as they are."""
    return workload.encoders()


@lru_cache(maxsize=1)
def shared_pool(workload: Workload) -> EncoderPool:
    """The packed pool, likewise; no encoder of transformers stays beside it."""
    return EncoderPool.from_encoders(workload.encoders())


def packed(workload: Workload, context: Context | None = None) -> Run:
    pool, waveforms = shared_pool(workload), workload.waveforms()

    def run() -> Outputs:
        return pool.encode(waveforms, workload.indices, context or workload.context).pairs()

    return run


def per_clip(workload: Workload) -> Run:
    return _each_alone(workload, "max_length", _encode)


def padded_loop(workload: Workload) -> Run:
    encoders = shared_encoders(workload)
    return loop(workload, encoders, [lambda x, e=e: e(x).last_hidden_state for e in encoders])


def padded_loop_compiled(workload: Workload) -> Run:
    """One compiled graph for encoders of one architecture; the number of clips may change."""
    encoders = shared_encoders(workload)
    skeleton = deepcopy(encoders[0]).to("meta")
    compiled = torch.compile(
        lambda parameters, x: functional_call(skeleton, parameters, (x,)).last_hidden_state, dynamic=True
    )
    states = [dict(encoder.named_parameters()) | dict(encoder.named_buffers()) for encoder in encoders]
    return loop(workload, encoders, [lambda x, s=s: compiled(s, x) for s in states])


def all_encoders(workload: Workload) -> Run:
    """Every encoder on every clip, stacked by torch.func: no routing of the work at all."""
    encoders = shared_encoders(workload)
    inputs = torch.cat([clip[0] for clip in given(workload, encoders)])
    parameters, buffers = stack_module_state(encoders)
    skeleton = deepcopy(encoders[0]).to("meta")

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,)).last_hidden_state

    def run() -> Outputs:
        hidden = torch.vmap(one, in_dims=(0, 0, None))(parameters, buffers, inputs)
        return [[hidden[e, b] for e in chosen] for b, chosen in enumerate(workload.indices)]

    return run


def packed_by_blas(workload: Workload, context: Context | None = None) -> Run:
    """Packed rows, each encoder's slice of them through torch's own routines."""
    run = packed(workload, context)

    def by_blas() -> Outputs:
        with use_backend("reference"):
            return run()

    return by_blas


def trimmed(workload: Workload) -> Run:
    return _each_alone(workload, "do_not_pad", _encode_own_frames)


def _each_alone(workload: Workload, padding: str, encode: Callable[[nn.Module, Tensor], Tensor]) -> Run:
    """An encoder at a time, on the features of a clip at a time, which encoders of one kind share."""
    encoders, waveforms = shared_encoders(workload), workload.waveforms()
    extract = extractors(encoders, padding)

    def clip(wave: Tensor, chosen: Sequence[int]) -> list[Tensor]:
        readers = {kind(encoders[e]): e for e in chosen}
        inputs = {name: extract[e](wave) for name, e in readers.items()}
        return [encode(encoders[e], inputs[kind(encoders[e])]) for e in chosen]

    return lambda: [clip(wave, chosen) for wave, chosen in zip(waveforms, workload.indices, strict=True)]


def _needs_compiler() -> str | None:
    return None if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"


PROVIDERS = {
    "packed": Provider(packed, None, "one packed pass, from waveforms"),
    "per_clip": Provider(per_clip, "window", "transformers, each clip and slot alone, from waveforms"),
    "padded_loop": Provider(padded_loop, "window", "transformers, one batch an encoder, features given"),
    "padded_loop_compiled": Provider(
        padded_loop_compiled,
        "window",
        "transformers under torch.compile, one batch an encoder, features given",
        missing=_needs_compiler,
    ),
    "all_encoders": Provider(all_encoders, "window", "torch.func.vmap: every encoder on every clip, features given"),
    "packed_by_blas": Provider(packed_by_blas, None, "the packed pass in plain torch: BLAS, one call an encoder"),
    "trimmed": Provider(trimmed, "valid", "transformers' layers on each clip's own frames, from waveforms"),
}


def loop(workload: Workload, encoders: Sequence[nn.Module], runs: Sequence[Callable[[Tensor], Tensor]]) -> Run:
    """Each encoder once, on all clips that chose it."""
    inputs = given(workload, encoders)

    def run() -> Outputs:
        outputs: list[dict[int, Tensor]] = [{} for _ in inputs]
        for e, encode in enumerate(runs):
            clips = [b for b, chosen in enumerate(workload.indices) if e in chosen]
            if clips:
                for b, features in zip(clips, encode(torch.cat([inputs[b][e] for b in clips])), strict=True):
                    outputs[b][e] = features
        return [[found[e] for e in chosen] for found, chosen in zip(outputs, workload.indices, strict=True)]

    return run


def given(workload: Workload, encoders: Sequence[nn.Module]) -> list[list[Tensor]]:
    """[clip][encoder]: its input, prepared before the clock starts; encoders of one kind share it."""
    prepare = extractors(encoders)
    kinds = {kind(encoder): e for e, encoder in enumerate(encoders)}
    by_kind = [{name: prepare[e](wave) for name, e in kinds.items()} for wave in workload.waveforms()]
    return [[clip[kind(encoder)] for encoder in encoders] for clip in by_kind]


def kind(encoder: nn.Module) -> tuple[str, int]:
    """Equal for encoders that read the same input."""
    return encoder.main_input_name, getattr(encoder.config, "num_mel_bins", 1)


def extractors(encoders: Sequence[nn.Module], padding: str = "max_length") -> list[Callable[[Tensor], Tensor]]:
    """Waveform -> each encoder's input [1, ...]: the clip as it is for wave encoders, for Whisper log-mel features,
    computed on the clip's own device.
    """
    return [_extractor(encoder, padding) for encoder in encoders]


def _extractor(encoder: nn.Module, padding: str) -> Callable[[Tensor], Tensor]:
    if encoder.main_input_name != "input_features":
        return lambda wave: wave[None].to(encoder.dtype)
    extract = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    dtype = encoder.dtype
    return lambda wave: extract(
        wave.cpu().numpy(), sampling_rate=SAMPLING_RATE, padding=padding, return_tensors="pt", device=wave.device.type
    ).input_features.to(wave.device, dtype)


def _encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    return encoder(inputs).last_hidden_state[0]


def _encode_own_frames(encoder: nn.Module, features: Tensor) -> Tensor:
    """WhisperEncoder without its demand for 30 s."""
    h = nn.functional.gelu(encoder.conv1(features))
    h = nn.functional.gelu(encoder.conv2(h)).mT
    h = h + encoder.embed_positions.weight[: h.shape[1]]
    for layer in encoder.layers:
        h = layer(h, None)
    return encoder.layer_norm(h)[0]
