"""Every supported model type with tiny sizes, and what its processor makes of waveforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mowe.meralion import (
    Meralion2Config,
    Meralion3AsrConfig,
    Meralion3Config,
    MeralionConfig,
    MeralionForConditionalGeneration,
)

AUDIO, IMAGE, VIDEO, PAD = 60, 61, 62, 0
MEL = 16
WINDOW = 32_000
"""Samples of one row of the models whose features are windows: 2 s, where the real ones take 30."""

Features = tuple[dict[str, Tensor], list[int]]
"""What the model takes for the audios of a batch, and the tokens of each audio."""

_LM = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
_WHISPER = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": MEL,
}  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    """One model type. make: the model. features: what it takes for a list of waveforms. windows: who cuts an audio into
    rows of two seconds, "processor" or "model", "" where nobody does.
    """

    make: Callable[[], PreTrainedModel]
    features: Callable[[Sequence[Tensor]], Features]
    windows: str = ""


def _frames(wave: Tensor, hop: float, width: int) -> Tensor:
    """[T, width]: some function of every `hop` samples."""
    count, size = math.ceil(wave.numel() / hop), math.ceil(hop)
    starts = [min(int(t * hop), wave.numel() - 1) for t in range(count)]
    parts = torch.stack([nn.functional.pad(wave[s : s + size], (0, size))[:size] for s in starts])
    matrix = torch.randn(size, width, generator=torch.Generator().manual_seed(3)) / size**0.5
    return 5 * parts @ matrix


def _padded(rows: Sequence[Tensor], least: int = 0, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """[N, T, width] and its mask [N, T]."""
    longest = max(least, *(len(row) for row in rows))
    longest += -longest % multiple
    features = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
    return features, mask.long()


def _mel(waves: Sequence[Tensor], **padding: int) -> tuple[Tensor, Tensor]:
    """[N, MEL, T] of 10 ms and the mask [N, T]."""
    features, mask = _padded([_frames(wave, 160, MEL) for wave in waves], **padding)
    return features.transpose(1, 2), mask


def _halved(lengths: Tensor) -> Tensor:
    return (lengths - 1) // 2 + 1


def _cut(waves: Sequence[Tensor]) -> list[Tensor]:
    return [part for wave in waves for part in wave.split(WINDOW)]


def _windows_per_audio(waves: Sequence[Tensor]) -> list[int]:
    return [math.ceil(wave.numel() / WINDOW) for wave in waves]


def _qwen2_audio() -> PreTrainedModel:
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **_WHISPER, "max_source_positions": 100},
        text_config={"model_type": "qwen2", **_LM},
        audio_token_index=AUDIO,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _mel(waves, least=200)
    tokens = (_halved(mask.sum(1)) - 2) // 2 + 1
    return {"input_features": features, "feature_attention_mask": mask}, tokens.tolist()


def _audioflamingo3() -> PreTrainedModel:
    config = transformers.AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **_WHISPER, "max_source_positions": 100},
        text_config={"model_type": "qwen2", **_LM},
        audio_token_id=AUDIO,
    )
    return transformers.AudioFlamingo3ForConditionalGeneration(config)


def _musicflamingo() -> PreTrainedModel:
    config = transformers.MusicFlamingoConfig(
        audio_config={"model_type": "audioflamingo3_encoder", **_WHISPER, "max_source_positions": 100},
        text_config={"model_type": "qwen2", **_LM},
        audio_token_id=AUDIO,
        rope_parameters={"rope_type": "default", "rope_theta": 100, "partial_rotary_factor": 0.5},
    )
    return transformers.MusicFlamingoForConditionalGeneration(config)


def _flamingo_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _mel(_cut(waves), least=200)
    tokens = (_halved(mask.sum(1)) - 2) // 2 + 1
    return {"input_features": features, "input_features_mask": mask}, _sums(tokens, waves)


def _sums(tokens: Tensor, waves: Sequence[Tensor]) -> list[int]:
    return [int(part.sum()) for part in tokens.split(_windows_per_audio(waves))]


def _voxtral() -> PreTrainedModel:
    audio = {
        "model_type": "voxtral_encoder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "num_mel_bins": MEL, "max_source_positions": 100,
    }  # fmt: skip
    config = transformers.VoxtralConfig(
        audio_config=audio, text_config={"model_type": "llama", **_LM}, audio_token_id=AUDIO
    )
    return transformers.VoxtralForConditionalGeneration(config)


def _voxtral_features(waves: Sequence[Tensor]) -> Features:
    features, _ = _mel(_cut(waves), least=200)
    return {"input_features": features}, [25 * count for count in _windows_per_audio(waves)]


def _glmasr() -> PreTrainedModel:
    audio = {
        "model_type": "glmasr_encoder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "num_mel_bins": MEL, "max_position_embeddings": 100,
    }  # fmt: skip
    config = transformers.GlmAsrConfig(
        audio_config=audio, text_config={"model_type": "llama", **_LM}, audio_token_id=AUDIO
    )
    return transformers.GlmAsrForConditionalGeneration(config)


def _glmasr_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _mel(_cut(waves), least=200)
    tokens = (_halved(mask.sum(1)) - 4) // 4 + 1
    return {"input_features": features, "input_features_mask": mask}, _sums(tokens, waves)


def _granite_speech() -> PreTrainedModel:
    config = transformers.GraniteSpeechConfig(**_granite(width=16))
    return transformers.GraniteSpeechForConditionalGeneration(config)


def _granite_speech_plus() -> PreTrainedModel:
    settings = _granite(width=32)
    settings["encoder_config"]["cat_hidden_layers"] = [1]
    config = transformers.GraniteSpeechPlusConfig(**settings)
    return transformers.GraniteSpeechPlusForConditionalGeneration(config)


def _granite(width: int) -> dict[str, Any]:
    """width: of what the tower gives the projector."""
    return {
        "text_config": {"model_type": "granite", **_LM},
        "encoder_config": {
            "input_dim": MEL, "num_layers": 2, "hidden_dim": 16, "feedforward_mult": 2, "num_heads": 2, "dim_head": 8,
            "output_dim": 8, "context_size": 10, "max_pos_emb": 16, "conv_kernel_size": 3, "dropout": 0.0,
        },
        "projector_config": {
            "model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 24, "encoder_hidden_size": width, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "audio_token_index": AUDIO,
        "has_lora_adapter": False,
    }  # fmt: skip


def _granite_speech_features(waves: Sequence[Tensor]) -> Features:
    rows = [_frames(wave, 320, MEL) for wave in waves]
    features, _ = _padded(rows)
    tokens = [3 * math.ceil(len(row) / 15) for row in rows]
    mask = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    return {"input_features": features, "input_features_mask": mask}, tokens


def _qwen3_asr() -> PreTrainedModel:
    audio = {
        "model_type": "qwen3_asr_encoder", **_WHISPER, "output_dim": 64, "downsample_hidden_size": 4,
    }  # fmt: skip
    config = transformers.Qwen3ASRConfig(
        audio_config=audio, text_config={"model_type": "qwen3", **_LM}, audio_token_id=AUDIO, pad_token_id=PAD
    )
    return transformers.Qwen3ASRForConditionalGeneration(config)


def _thirteen_a_second(mel: Tensor) -> list[int]:
    return [13 * (n // 100) + math.ceil(n % 100 / 8) for n in mel.tolist()]


def _qwen3_asr_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _mel(waves, multiple=100)
    return {"input_features": features, "input_features_mask": mask}, _thirteen_a_second(mask.sum(1))


_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}


def _qwen2_5_omni() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
    config = transformers.models.qwen2_5_omni.Qwen2_5OmniThinkerConfig(
        audio_config={**_WHISPER, "output_dim": 64, "max_source_positions": 100, "n_window": 25},
        vision_config={**_VISION, "fullatt_block_indexes": [0]},
        text_config={**_LM, "rope_parameters": rope},
        audio_token_index=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_start_token_id=5,
        audio_end_token_id=6,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen2_5_omni_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _mel(waves)
    tokens = (_halved(mask.sum(1)) - 2) // 2 + 1
    return {"input_features": features, "feature_attention_mask": mask}, tokens.tolist()


def _qwen3_omni_moe() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0, "mrope_interleaved": True}
    config = transformers.models.qwen3_omni_moe.Qwen3OmniMoeThinkerConfig(
        audio_config={**_WHISPER, "output_dim": 64, "downsample_hidden_size": 4, "max_source_positions": 100},
        vision_config={**_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        text_config={
            **_LM, "rope_parameters": rope, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        },
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_start_token_id=5,
        audio_end_token_id=6,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )  # fmt: skip
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)


def _qwen3_omni_moe_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _mel(waves)
    return {"input_features": features, "feature_attention_mask": mask}, _thirteen_a_second(mask.sum(1))


def _phi4_multimodal() -> PreTrainedModel:
    config = transformers.Phi4MultimodalConfig(
        **_LM,
        original_max_position_embeddings=512,
        audio_config={
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "input_size": MEL,
            "nemo_conv_channels": 4, "bias_max_distance": 50, "audio_token_id": AUDIO,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "crop_size": 28, "image_token_id": IMAGE,
        },
    )  # fmt: skip
    return transformers.Phi4MultimodalForCausalLM(config)


def _phi4_multimodal_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _padded([_frames(wave, 160, MEL) for wave in waves])
    tokens = [math.ceil(n / 8) for n in mask.sum(1).tolist()]
    return {
        "audio_input_features": features,
        "audio_attention_mask": mask.bool(),
        "audio_embed_sizes": torch.tensor(tokens),
    }, tokens


def _gemma3n() -> PreTrainedModel:
    text = {
        **_LM, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 0,
        "laurel_rank": 64, "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": None,
    }  # fmt: skip
    config = transformers.Gemma3nConfig(
        text_config=text,
        vision_config={"hidden_size": 16, "vocab_size": 2, "vocab_offset": 61},
        audio_config={
            "vocab_size": 1, "vocab_offset": 63, "input_feat_size": MEL, "hidden_size": 16,
            "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": (4, 4),
            "conf_attention_chunk_size": 4, "conf_attention_context_left": 5,
        },
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        audio_soft_tokens_per_image=30,
    )  # fmt: skip
    return transformers.Gemma3nForConditionalGeneration(config)


def _gemma3n_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _padded([_frames(wave, 160, MEL) for wave in waves])
    return {"input_features": features, "input_features_mask": mask.bool()}, [30] * len(waves)


def _gemma4() -> PreTrainedModel:
    config = transformers.Gemma4Config(
        text_config={
            **_LM, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 64, "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        audio_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "subsampling_conv_channels": (MEL, 4), "attention_chunk_size": 4, "attention_context_left": 5,
            "output_proj_dims": 24,
        },
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )  # fmt: skip
    return transformers.Gemma4ForConditionalGeneration(config)


def _gemma4_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _padded([_frames(wave, 160, MEL) for wave in waves])
    return {"input_features": features, "input_features_mask": mask.bool()}, mask[:, ::2][:, ::2].sum(1).tolist()


def _fun_asr_nano() -> PreTrainedModel:
    config = transformers.FunAsrNanoConfig(
        audio_config={
            "num_mel_bins": MEL, "num_stacked_frames": 1, "hidden_size": 24, "num_attention_heads": 2,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_timestamp_prediction_layers": 1,
            "fsmn_kernel_size": 3, "max_position_embeddings": 200,
        },
        adaptor_config={
            "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1,
            "projector_hidden_size": 24,
        },
        text_config={"model_type": "qwen3", **_LM},
        audio_token_id=AUDIO,
    )  # fmt: skip
    return transformers.FunAsrNanoForConditionalGeneration(config)


def _fun_asr_nano_features(waves: Sequence[Tensor]) -> Features:
    features, mask = _padded([_frames(wave, 960, MEL) for wave in waves])
    return {"input_features": features, "input_features_mask": mask}, mask.sum(1).tolist()


def _vibevoice_asr() -> PreTrainedModel:
    tower = {"num_filters": 2, "downsampling_ratios": [5, 8, 10, 8], "depths": [1] * 5, "ffn_expansion": 1}
    config = transformers.VibeVoiceAsrConfig(
        # Without noise: every call draws another one, and would give another answer.
        acoustic_tokenizer_encoder_config={**tower, "hidden_size": 8, "vae_std": 0.0},
        semantic_tokenizer_encoder_config={**tower, "hidden_size": 12},
        text_config={"model_type": "qwen2", **_LM},
        audio_token_id=AUDIO,
        audio_bos_token_id=5,
        audio_eos_token_id=6,
        acoustic_tokenizer_chunk_size=32_000,
    )
    return transformers.VibeVoiceAsrForConditionalGeneration(config)


def _vibevoice_asr_features(waves: Sequence[Tensor]) -> Features:
    at_24_khz = [nn.functional.interpolate(wave[None, None], scale_factor=1.5)[0, 0] for wave in waves]
    values, mask = _padded([wave[:, None] for wave in at_24_khz], multiple=3_200)
    tokens = [math.ceil(wave.numel() / 3_200) for wave in at_24_khz]
    return {"input_values": values.transpose(1, 2), "padding_mask": mask.bool()}, tokens


def _meralion(config_class: type[MeralionConfig], **settings: Any) -> PreTrainedModel:
    speech = {**_WHISPER, "model_type": "whisper", "max_source_positions": 100}
    return MeralionForConditionalGeneration(
        config_class(speech_config=speech, text_config=_LM, speech_token_index=AUDIO, **settings)
    )


def _meralion_features(tokens: int, waves: Sequence[Tensor]) -> Features:
    features, _ = _mel(_cut(waves), least=200)
    return {"input_features": features}, [tokens * count for count in _windows_per_audio(waves)]


TINY: dict[str, TinyModel] = {
    "qwen2_audio": TinyModel(_qwen2_audio, _qwen2_audio_features),
    "audioflamingo3": TinyModel(_audioflamingo3, _flamingo_features, windows="processor"),
    "musicflamingo": TinyModel(_musicflamingo, _flamingo_features, windows="processor"),
    "voxtral": TinyModel(_voxtral, _voxtral_features, windows="model"),
    "glmasr": TinyModel(_glmasr, _glmasr_features, windows="processor"),
    "granite_speech": TinyModel(_granite_speech, _granite_speech_features),
    "granite_speech_plus": TinyModel(_granite_speech_plus, _granite_speech_features),
    "qwen3_asr": TinyModel(_qwen3_asr, _qwen3_asr_features),
    "qwen2_5_omni_thinker": TinyModel(_qwen2_5_omni, _qwen2_5_omni_features),
    "qwen3_omni_moe_thinker": TinyModel(_qwen3_omni_moe, _qwen3_omni_moe_features),
    "phi4_multimodal": TinyModel(_phi4_multimodal, _phi4_multimodal_features),
    "gemma3n": TinyModel(_gemma3n, _gemma3n_features),
    "gemma4": TinyModel(_gemma4, _gemma4_features),
    "fun_asr_nano": TinyModel(_fun_asr_nano, _fun_asr_nano_features),
    "vibevoice_asr": TinyModel(_vibevoice_asr, _vibevoice_asr_features),
    **{
        config_class.model_type: TinyModel(
            partial(_meralion, config_class, speech_mlp_scale_factor=factor),
            partial(_meralion_features, 100 // factor),
            windows="model",
        )
        for config_class, factor in (
            (MeralionConfig, 10),
            (Meralion2Config, 10),
            (Meralion3Config, 5),
            (Meralion3AsrConfig, 10),
        )
    },
}
