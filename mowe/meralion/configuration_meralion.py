"""Configurations of the MERaLiON family, with the names their checkpoints use."""

# No `from __future__ import annotations` here: transformers checks the fields' types, which must not be strings.
from typing import Any, ClassVar

from transformers import AutoConfig, Gemma2Config, PreTrainedConfig, WhisperConfig

from mowe.configuration_mowe import as_config, checked
from mowe.errors import ConfigError

_LARGE_V3 = {
    "model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500,
}  # fmt: skip
_DEFAULT_SCALE_FACTOR = 15


@checked
class MeralionConfig(PreTrainedConfig):
    """MERaLiON-AudioLLM, the first of the family; the base of the others.

    speech_config, text_config: the Whisper encoder (Whisper-large-v3 by default) and the Gemma2 decoder, as
        configurations of transformers or dictionaries.
    speech_mlp_scale_factor: encoder frames that the adapter stacks into one token; 15 by default, 100 tokens a chunk.
    fixed_speech_embeds_length: tokens that a chunk of 30 s takes in a prompt; follows from the scale factor, or the
        scale factor from it.
    speech_token_index: the token that stands for audio in a prompt, also known as `audio_token_id`.
    speech_mlp_use_projection: whether the gated adapter of MERaLiON-2 and 3 has its gate; the first one's adapter does
        not know it.

    Keys of a checkpoint's config.json that are not named here are kept as they are.
    Raises ConfigError for settings that are out of range or contradict each other.
    """

    model_type = "meralion"
    gated_adapter: ClassVar[bool] = False
    sub_configs = {"speech_config": WhisperConfig, "text_config": Gemma2Config}
    attribute_map = {"audio_token_id": "speech_token_index", "audio_config": "speech_config"}

    speech_config: Any = None
    text_config: Any = None
    speech_mlp_scale_factor: int | None = None
    fixed_speech_embeds_length: int | None = None
    speech_token_index: int = 255_999
    speech_mlp_use_projection: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.speech_config = _part(self.speech_config or _LARGE_V3, WhisperConfig, "speech_config")
        self.text_config = _part(self.text_config or {}, Gemma2Config, "text_config")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        length = self.fixed_speech_embeds_length or 0
        if self.speech_mlp_scale_factor is None:
            self.speech_mlp_scale_factor = self._frames // length if length > 0 else _DEFAULT_SCALE_FACTOR
        if self.fixed_speech_embeds_length is None and self.speech_mlp_scale_factor > 0:
            self.fixed_speech_embeds_length = self._frames // self.speech_mlp_scale_factor
        self._check()
        kwargs.pop("auto_map", None)  # names the authors' code, which neither runs here nor is saved along
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "MeralionConfig":
        """As in transformers, but of the class that the checkpoint's model_type names."""
        config, _ = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return super(MeralionConfig, _class_of(config)).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MeralionConfig":
        return super(MeralionConfig, _class_of(config_dict)).from_dict(config_dict, **kwargs)

    @property
    def _frames(self) -> int:
        return self.speech_config.max_source_positions

    def _check(self) -> None:
        frames, factor, length = self._frames, self.speech_mlp_scale_factor, self.fixed_speech_embeds_length
        if factor < 1 or frames % factor:
            raise ConfigError(f"speech_mlp_scale_factor must divide the encoder's {frames} frames, got {factor}")
        if length * factor != frames:
            raise ConfigError(
                f"fixed_speech_embeds_length {length} and speech_mlp_scale_factor {factor} contradict each other: "
                f"the encoder's {frames} frames give {frames // factor} tokens"
            )
        vocab_size = self.text_config.vocab_size
        if not 0 <= self.speech_token_index < vocab_size:
            raise ConfigError(
                f"speech_token_index must lie in the vocabulary of {vocab_size}, got {self.speech_token_index}"
            )


@checked
class Meralion2Config(MeralionConfig):
    """MERaLiON-2: the gated adapter."""

    model_type = "meralion2"
    gated_adapter = True


@checked
class Meralion3Config(Meralion2Config):
    """MERaLiON-3: as MERaLiON-2."""

    model_type = "meralion3"


@checked
class Meralion3AsrConfig(Meralion2Config):
    """MERaLiON-3-ASR: as MERaLiON-2."""

    model_type = "meralion3_asr"


CONFIG_CLASSES = {cls.model_type: cls for cls in (MeralionConfig, Meralion2Config, Meralion3Config, Meralion3AsrConfig)}


def _class_of(config: dict[str, Any]) -> type[MeralionConfig]:
    model_type = config.get("model_type")
    if model_type not in CONFIG_CLASSES:
        raise ConfigError(f"model_type must be one of {', '.join(CONFIG_CLASSES)}, got {model_type!r}")
    return CONFIG_CLASSES[model_type]


def _part(config: Any, cls: type[PreTrainedConfig], name: str) -> PreTrainedConfig:
    """A part's configuration; checkpoints call its model_type by names of their own."""
    if isinstance(config, dict):
        config = as_config({**config, "model_type": cls.model_type}, name)
    if type(config) is not cls:
        raise ConfigError(f"{name}: expected a {cls.__name__} or its dictionary, got {type(config).__name__}")
    return config


for model_type, config_class in CONFIG_CLASSES.items():
    AutoConfig.register(model_type, config_class)
