"""Configurations: what they check, and that saving them loses nothing."""

from __future__ import annotations

import json

import pytest
from transformers import BertConfig, LlamaConfig, WhisperConfig

from mowe import ConfigError, EncoderPool, MoweConfig, MowePoolConfig
from tests.mowe.encoders import hubert, wav2vec2, whisper

ENTRIES = [{"config": hubert().config, "do_normalize": True}, {"config": whisper().config}]


def test_saving_a_pool_configuration_loses_nothing(tmp_path):
    config = MowePoolConfig(encoders=ENTRIES, context="valid")
    config.save_pretrained(tmp_path)
    again = MowePoolConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert [entry["do_normalize"] for entry in again.encoders] == [True, False]
    assert [c.to_dict() for c in again.encoder_configs()] == [e["config"].to_dict() for e in ENTRIES]


def test_the_configuration_of_a_pool_of_encoders():
    pool = EncoderPool.from_encoders([wav2vec2(), whisper()], context="valid")
    assert pool.config.context == "valid"
    assert [c.to_dict() for c in pool.config.encoder_configs()] == [
        wav2vec2().config.to_dict(),
        whisper().config.to_dict(),
    ]


def test_saving_a_model_configuration_loses_nothing(tmp_path):
    config = MoweConfig(
        audio_config=whisper().config,
        text_config=LlamaConfig(hidden_size=64, num_attention_heads=4),
        pool_config=MowePoolConfig(encoders=ENTRIES, context="valid"),
        context="valid",
        num_independent_slots=0,
        num_dependent_slots=2,
        router_temperature=2,
        router_losses={"z_loss": 0.5, "load_balance": 1},
        projector_type="stack",
        projector_stride=5,
        projector_hidden_size=48,
        scale_by_weight=False,
    )
    config.save_pretrained(tmp_path)
    again = MoweConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.audio_config, WhisperConfig) and isinstance(again.text_config, LlamaConfig)
    assert isinstance(again.pool_config, MowePoolConfig)
    changed = MoweConfig.from_pretrained(tmp_path, projector_stride=3)
    assert changed.projector_stride == 3 and changed.projector_hidden_size == 48


def test_the_defaults_are_those_of_the_paper():
    config = MoweConfig(text_config={"model_type": "llama", "hidden_size": 96})
    assert (config.num_independent_slots, config.num_dependent_slots) == (1, 1)
    assert (config.projector_type, config.projector_stride, config.projector_hidden_size) == ("conv", 8, 96)
    assert config.router_losses == {"independent_entropy": 0.1, "dependent_entropy": 0.1, "diversity": 0.1}
    assert config.audio_config.model_type == "whisper"


def test_unknown_keys_of_a_file(tmp_path):
    MoweConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_slots": 2}))
    with pytest.raises(ConfigError, match=r"MoweConfig: unknown keys \['num_slots'\]"):
        MoweConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_slots": 2, "topk": 1}, r"MoweConfig: unknown keys \['num_slots', 'topk'\]"),
        ({"num_dependent_slots": "2"}, "'num_dependent_slots' expected int, got str"),
        ({"num_dependent_slots": -1}, "num_dependent_slots is -1"),
        ({"num_dependent_slots": 3}, "num_dependent_slots is 3 but the pool has 2 encoders"),
        ({"num_independent_slots": 3}, "num_independent_slots is 3 but the pool has 2 encoders"),
        ({"num_independent_slots": 0, "num_dependent_slots": 0}, "are both 0: no encoder would be chosen"),
        ({"router_temperature": 0}, "router_temperature must be positive, got 0"),
        ({"router_temperature": float("nan")}, "router_temperature must be positive, got nan"),
        ({"router_temperature": "hot"}, "'router_temperature' with value 'hot'"),
        ({"router_noise": -0.1}, "router_noise must not be negative, got -0.1"),
        (
            {"router_losses": {"entropy": 0.1}},
            r"router_losses: unknown terms \['entropy'\]; known: independent_entropy, ",
        ),
        ({"router_losses": {"diversity": "much"}}, "'router_losses'"),
        ({"router_losses": {"diversity": float("nan")}}, "router_losses: coefficients must be finite, got .*nan"),
        ({"projector_type": "cnn"}, "'projector_type' expected one of"),
        ({"projector_stride": 6}, "projector_stride of a 'conv' projector cannot be 6"),
        ({"projector_stride": 1}, "projector_stride of a 'conv' projector cannot be 1"),
        ({"projector_type": "stack", "projector_stride": 0}, "projector_stride of a 'stack' projector cannot be 0"),
        ({"projector_hidden_size": 0}, "projector_hidden_size must be positive, got 0"),
        ({"context": "short"}, "'context' expected one of"),
        ({"audio_config": {"model_type": "nonsense"}}, "audio_config: model_type must be one that .* got 'nonsense'"),
        ({"audio_config": {"model_type": "whisper", "d_model": "wide"}}, "audio_config: .*'d_model' expected int"),
        ({"text_config": {"hidden_size": 8}}, "text_config: model_type must be one that transformers knows, got None"),
        ({"text_config": {"model_type": "gemma3"}}, "text_config: a 'gemma3' configuration has no hidden_size"),
        ({"text_config": 3}, "text_config: expected a transformers configuration"),
        ({"pool_config": {"size": 2}}, r"MowePoolConfig: unknown keys \['size'\]"),
    ],
)
def test_settings_that_cannot_be(settings, told):
    with pytest.raises(ConfigError, match=told) as raised:
        MoweConfig(**{"pool_config": MowePoolConfig(encoders=ENTRIES), **settings})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"encoder": []}, r"MowePoolConfig: unknown keys \['encoder'\]"),
        ({"context": "short"}, "'context' expected one of"),
        ({"encoders": [3]}, "'encoders'"),
        ({"encoders": [ENTRIES[0], {}]}, r"encoder 1: expected keys 'config' and 'do_normalize', got \[\]"),
        (
            {"encoders": [{**ENTRIES[0], "gain": 2}]},
            "encoder 0: expected keys 'config' and 'do_normalize', got .*'gain'",
        ),
        ({"encoders": [{**ENTRIES[0], "do_normalize": 1}]}, "encoder 0: do_normalize must be true or false, got 1"),
        ({"encoders": [{"config": "hubert"}]}, "encoder 0: expected a transformers configuration .* got 'hubert'"),
        ({"encoders": [{"config": {"model_type": "x"}}]}, "encoder 0: model_type must be one that .* knows, got 'x'"),
    ],
)
def test_pools_that_cannot_be(settings, told):
    with pytest.raises(ConfigError, match=told):
        MowePoolConfig(**settings)


def test_encoders_that_transformers_knows_and_no_family_runs():
    config = MowePoolConfig(encoders=[{"config": BertConfig()}])
    with pytest.raises(ConfigError, match="encoder 0: encoders of type 'bert' are not supported; supported: whisper, "):
        EncoderPool(config)
