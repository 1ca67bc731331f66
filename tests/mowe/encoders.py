"""Tiny encoders of transformers with random parameters, clips, and what an encoder alone gives for a clip."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

WHISPER = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_mel_bins": 80, "vocab_size": 20, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAVE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 20,
}  # fmt: skip
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
"""The settings in which HuBERT-large and wav2vec2-large-lv60 differ from the base models."""


def whisper(seed: int = 0, **config: Any) -> WhisperModel:
    return randomized(WhisperModel(WhisperConfig(**{**WHISPER, **config})), seed)


def hubert(seed: int = 0, **config: Any) -> HubertModel:
    return randomized(HubertModel(HubertConfig(**{**WAVE, **config})), seed)


def wav2vec2(seed: int = 0, **config: Any) -> Wav2Vec2Model:
    return randomized(Wav2Vec2Model(Wav2Vec2Config(**{**WAVE, **config})), seed)


@torch.no_grad()
def randomized(model: nn.Module, seed: int) -> Any:
    """The model in evaluation mode, no parameter left at the zeros and ones that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clip(samples: int, seed: int = 0, gain: float = 0.1) -> Tensor:
    """[samples] of noise, with a slow envelope and off centre, so that normalisation shows."""
    generator = torch.Generator().manual_seed(seed)
    envelope = 1.2 + torch.sin(torch.arange(samples) / 1_900 + seed)
    return gain * (envelope * torch.randn(samples, generator=generator) + 0.3)


def is_whisper(encoder: nn.Module) -> bool:
    return encoder.config.model_type == "whisper"


def alone(encoder: nn.Module, wave: Tensor, context: str = "window", do_normalize: bool = False) -> Tensor:
    """[T, D]: what a transformers encoder gives for one clip, its feature extractor before it."""
    if not is_whisper(encoder):
        extractor = Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
        values = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
        return encoder(values.to(encoder.dtype)).last_hidden_state[0]
    encoder = getattr(encoder, "encoder", encoder)
    unpadded = {"padding": "do_not_pad", "truncation": False} if context == "valid" else {}
    extracted = _whisper_extractor(encoder.config.num_mel_bins)(
        wave.numpy(), sampling_rate=16_000, return_tensors="pt", **unpadded
    )
    features = extracted.input_features.to(encoder.dtype)
    if context == "window":
        return encoder(features).last_hidden_state[0]
    h = nn.functional.gelu(encoder.conv1(features))
    h = nn.functional.gelu(encoder.conv2(h)).transpose(1, 2)
    h = h + encoder.embed_positions.weight[: h.shape[1]]
    for layer in encoder.layers:
        h = layer(h, None)
    return encoder.layer_norm(h)[0]


@cache
def _whisper_extractor(num_mel_bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=num_mel_bins)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error of a frame (of an entry, for vectors), relative to the root mean square of all frames."""
    assert got.shape == expected.shape, f"{list(got.shape)} instead of {list(expected.shape)}"
    frames = (got.double() - expected.double()).reshape(-1, got.shape[-1] if got.dim() > 1 else 1).norm(dim=1)
    scale = expected.double().reshape(-1, expected.shape[-1] if expected.dim() > 1 else 1).norm(dim=1)
    return (frames.max() / scale.square().mean().sqrt()).item()


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(got, expected)
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same gradients under the same names. Some are zero but for rounding (a bias of all keys changes no softmax),
    so none is measured on a scale under a thousandth of the largest one's.
    """
    assert got.keys() == expected.keys()
    least = 1e-3 * max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert got[name].shape == gradient.shape, name
        error = (got[name].double() - gradient.double()).norm().item() / max(gradient.norm().item(), least)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
