"""Configurations: read as the authors write them, checked, saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from mowe.errors import ConfigError
from mowe.meralion import Meralion2Config, MeralionConfig
from tests.mowe.meralion.family import FRAMES, SPEECH, TEXT, TYPES, config_dict


def saved(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("source", [AutoConfig, MeralionConfig])
def test_reads_and_writes_a_checkpoint_configuration(tmp_path: Path, model_type: str, source: Any) -> None:
    config = source.from_pretrained(saved(tmp_path, config_dict(model_type)))
    assert config.model_type == model_type and type(config).__module__.startswith("mowe.")
    assert config.audio_token_id == config.speech_token_index == 259
    assert config.speech_config.d_model == SPEECH["d_model"] and config.text_config.hidden_size == TEXT["hidden_size"]
    assert config.fixed_speech_embeds_length == FRAMES // 15 and config.tie_word_embeddings
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] == model_type and "auto_map" not in written
    assert written["speech_token_index"] == 259 and written["speech_mlp_scale_factor"] == 15
    assert "audio_token_id" not in written and written["hidden_size"] == TEXT["hidden_size"]
    assert AutoConfig.from_pretrained(tmp_path / "again").to_diff_dict() == config.to_diff_dict()


def test_defaults_are_those_of_the_family() -> None:
    config = Meralion2Config()
    speech = config.speech_config
    assert (speech.d_model, speech.encoder_layers, speech.num_mel_bins) == (1280, 32, 128)
    assert (config.speech_mlp_scale_factor, config.fixed_speech_embeds_length) == (15, 100)
    assert config.speech_token_index == 255_999
    assert Meralion2Config(fixed_speech_embeds_length=300).speech_mlp_scale_factor == 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "qwen2_audio"}, "must be one of meralion, meralion2, meralion3, meralion3_asr, got 'qwen2_aud"),
        ({"model_type": None}, "got None"),
        ({"speech_mlp_scale_factor": 7}, "speech_mlp_scale_factor must divide the encoder's 60 frames, got 7"),
        ({"speech_mlp_scale_factor": 0}, "got 0"),
        ({"speech_mlp_scale_factor": "15"}, "speech_mlp_scale_factor"),
        ({"fixed_speech_embeds_length": 12}, "12 and speech_mlp_scale_factor 15 contradict .* give 4 tokens"),
        ({"fixed_speech_embeds_length": 0}, "fixed_speech_embeds_length 0"),
        ({"speech_token_index": 264}, "vocabulary of 264, got 264"),
        ({"speech_config": {"d_model": "wide"}}, "speech_config: .*d_model"),
        ({"text_config": "gemma2"}, "text_config: expected a Gemma2Config or its dictionary, got str"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        MeralionConfig.from_pretrained(saved(tmp_path, config_dict("meralion2") | settings))
    assert "\n" not in str(error.value)
