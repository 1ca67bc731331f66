"""MoweConfig in files, and what the tools around it write there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, WhisperConfig

import mowe
from mowe.errors import ConfigError
from tests.mowe.audio_llm import tiny_pool

EVERYTHING = {
    "audio_token_id": 7, "context": "valid", "num_independent_slots": 2, "num_dependent_slots": 3,
    "router_temperature": 0.5, "router_noise": 0.1, "router_straight_through": True, "scale_by_weight": False,
    "router_losses": {"z_loss": 1e-3}, "projector_type": "stack", "projector_stride": 5, "projector_hidden_size": 48,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_every_setting_survives_a_file(tmp_path: Path) -> None:
    config = mowe.MoweConfig(
        audio_config=WhisperConfig(d_model=64),
        text_config=LlamaConfig(hidden_size=96),
        pool_config=tiny_pool("valid").config,
        **EVERYTHING,
    )
    config.save_pretrained(tmp_path)
    for loaded in (mowe.MoweConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {name: getattr(loaded, name) for name in EVERYTHING} == EVERYTHING
        assert loaded.pool_config.encoders == config.pool_config.encoders
        assert (type(loaded.audio_config), loaded.audio_config.d_model) == (WhisperConfig, 64)
        assert (type(loaded.text_config), loaded.text_config.hidden_size) == (LlamaConfig, 96)
        assert loaded.pool_config.context == "valid"
        assert loaded.get_text_config() is loaded.text_config


def test_what_trainers_write_is_read_again(tmp_path: Path) -> None:
    config = mowe.MoweConfig()
    config.use_cache, config.pad_token_id = False, 3
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False
    assert mowe.MoweConfig.from_pretrained(tmp_path).to_dict().keys() >= EVERYTHING.keys()


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "{}"])
def test_file_of_another_model_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="model_type must be 'mowe'"):
        mowe.MoweConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["audio_config", "text_config", "pool_config"])
@pytest.mark.parametrize("value", [3, "llama", ["llama"]])
def test_part_that_is_no_configuration_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected .* or its dictionary, got"):
        mowe.MoweConfig(**{name: value})
