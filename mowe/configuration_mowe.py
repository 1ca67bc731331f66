"""Configurations of a pool of weak encoders and of an AudioLLM built on one."""

# No `from __future__ import annotations` here: transformers checks the fields' types, which must not be strings.
import json
import math
from functools import wraps
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from mowe.errors import ConfigError

# What language models call their cache, as an argument and in their output: another name since transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ROUTER_LOSSES = ("independent_entropy", "dependent_entropy", "diversity", "load_balance", "z_loss")
PAPER_ROUTER_LOSSES = {"independent_entropy": 0.1, "dependent_entropy": 0.1, "diversity": 0.1}


def checked(cls: type) -> type:
    """transformers' type checks of the fields, raising ConfigError."""
    cls = strict(cls)
    init = cls.__init__

    @wraps(init)
    def __init__(self, **kwargs):
        try:
            init(self, **kwargs)
        except StrictDataclassError as error:
            raise ConfigError(f"{cls.__name__}: {_last_line(error)}") from None

    cls.__init__ = __init__
    return cls


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip().removeprefix("TypeError: ")


def reject_unknown(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """Raise ConfigError for keys that neither this configuration nor transformers knows.

    Those of a generation configuration are known: the Trainer writes some of them into a model's configuration.
    """
    known = PreTrainedConfig().to_dict().keys() | GenerationConfig().to_dict().keys() | {
        "torch_dtype", "_name_or_path", "name_or_path", "attn_implementation", "_attn_implementation", "auto_map",
        "_commit_hash", "experts_implementation", "quantization_config",
    }  # fmt: skip
    unknown = sorted(key for key in given if key not in known)
    if unknown:
        raise ConfigError(f"{type(config).__name__}: unknown keys {unknown}")


def as_config(config: dict[str, Any] | PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A configuration object from itself or from its dictionary, which must name a model_type of transformers."""
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: expected a transformers configuration or its dictionary, got {config!r}")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{name}: model_type must be one that transformers knows, got {model_type!r}")
    try:
        return CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if k != "model_type"})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {_last_line(error)}") from None


def _as_entry(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """An entry of a pool's configuration as a file would hold it, so that saving and loading changes nothing."""
    if not {"config"} <= entry.keys() <= {"config", "do_normalize"}:
        raise ConfigError(f"{name}: expected keys 'config' and 'do_normalize', got {sorted(entry)}")
    do_normalize = entry.get("do_normalize", False)
    if not isinstance(do_normalize, bool):
        raise ConfigError(f"{name}: do_normalize must be true or false, got {do_normalize!r}")
    config = json.loads(as_config(entry["config"], name).to_json_string())
    return {"config": config, "do_normalize": do_normalize}


@checked
class MowePoolConfig(PreTrainedConfig):
    """A pool of weak encoders.

    encoders: one dictionary an encoder, `{"config": its transformers configuration, "do_normalize": bool}`;
        do_normalize says whether a wave encoder takes waves of zero mean and unit variance (by default it does not).
    context: "window" pads every clip of a Whisper encoder to 30 s, as it was pre-trained; "valid" runs it on the
        clip's own frames alone.
    """

    model_type = "mowe_pool"

    encoders: list[dict[str, Any]] | None = None
    context: Literal["window", "valid"] = "window"

    def __post_init__(self, **kwargs):
        reject_unknown(self, kwargs)
        super().__post_init__(**kwargs)
        self.encoders = [_as_entry(entry, f"encoder {i}") for i, entry in enumerate(self.encoders or [])]

    def encoder_configs(self) -> list[PreTrainedConfig]:
        """The encoders' transformers configurations."""
        return [as_config(e["config"], f"encoder {i}") for i, e in enumerate(self.encoders)]


def check_routers(config: PreTrainedConfig) -> None:
    """Fill in the default router losses of a configuration with routers, and raise ConfigError for what cannot be."""
    if config.router_losses is None:
        config.router_losses = dict(PAPER_ROUTER_LOSSES)
    unknown = sorted(set(config.router_losses) - set(ROUTER_LOSSES))
    if unknown:
        raise ConfigError(f"router_losses: unknown terms {unknown}; known: {', '.join(ROUTER_LOSSES)}")
    if not all(map(math.isfinite, config.router_losses.values())):
        raise ConfigError(f"router_losses: coefficients must be finite, got {config.router_losses}")
    if not config.router_temperature > 0:
        raise ConfigError(f"router_temperature must be positive, got {config.router_temperature}")
    if not config.router_noise >= 0:
        raise ConfigError(f"router_noise must not be negative, got {config.router_noise}")
    encoders = len(config.pool_config.encoders)
    for name in ("num_independent_slots", "num_dependent_slots"):
        slots = getattr(config, name)
        if slots < 0 or (encoders and slots > encoders):
            raise ConfigError(f"{name} is {slots} but the pool has {encoders} encoders")
    if config.num_independent_slots + config.num_dependent_slots == 0:
        raise ConfigError("num_independent_slots and num_dependent_slots are both 0: no encoder would be chosen")


@checked
class MoweConfig(PreTrainedConfig):
    """An AudioLLM with a mixture of weak encoders beside its base encoder.

    audio_config, text_config: base encoder (of a supported family) and language model, as transformers has them.
    pool_config: the pool. audio_token_id: the token that stands for audio in a prompt. audio_do_normalize: whether a
        wave-type base encoder takes normalised waves. context: as in the pool's configuration, for the base encoder.
    num_independent_slots, num_dependent_slots: encoders chosen by the data-independent and by the data-dependent
        router (paper: one router of each kind; its run name says top1 per router).

    The paper does not say the following; these are our choices.
    router_temperature: divides the logits of both routers. router_noise: standard deviation of the normal noise added
    to them in training. router_straight_through: weights are 1 in the forward pass and carry the gradient of the
    softmax. scale_by_weight: whether the weight multiplies the features (else they enter as they are, and only the
    auxiliary losses train the routers). router_losses: coefficient of each term of L_MoWE (see mowe.losses).
    projector_type: "conv", strided convolutions as the run name's `seqcnn8` suggests, or "stack", frame stacking and an
    MLP. projector_stride: frames a token, a power of two for "conv" (8: 6.25 tokens a second).
    projector_hidden_size: width inside the projector, the language model's by default.
    """

    model_type = "mowe"
    keys_to_ignore_at_inference = [CACHE, "aux_loss", "router_logits", "router_indices"]
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig, "pool_config": MowePoolConfig}

    audio_config: Any = None
    text_config: Any = None
    pool_config: Any = None
    audio_token_id: int | None = None
    audio_do_normalize: bool = False
    context: Literal["window", "valid"] = "window"
    num_independent_slots: int = 1
    num_dependent_slots: int = 1
    router_temperature: int | float = 1.0
    router_noise: int | float = 0.0
    router_straight_through: bool = False
    scale_by_weight: bool = True
    router_losses: dict[str, int | float] | None = None
    projector_type: Literal["conv", "stack"] = "conv"
    projector_stride: int = 8
    projector_hidden_size: int | None = None
    initializer_range: int | float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        reject_unknown(self, kwargs)
        self.audio_config = as_config(self.audio_config or {"model_type": "whisper"}, "audio_config")
        self.text_config = as_config(self.text_config or {"model_type": "llama"}, "text_config")
        if not isinstance(self.pool_config or {}, dict | MowePoolConfig):
            raise ConfigError(f"pool_config: expected a MowePoolConfig or its dictionary, got {self.pool_config!r}")
        if not isinstance(self.pool_config, MowePoolConfig):
            self.pool_config = MowePoolConfig(**(self.pool_config or {}))
        if not hasattr(self.text_config, "hidden_size"):
            kind = self.text_config.model_type
            raise ConfigError(f"text_config: a {kind!r} configuration has no hidden_size, expected a language model's")
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.text_config.hidden_size
        self._check()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MoweConfig":
        if config_dict.get("model_type") != cls.model_type:
            raise ConfigError(f"model_type must be {cls.model_type!r}, got {config_dict.get('model_type')!r}")
        return super().from_dict(config_dict, **kwargs)

    def _check(self) -> None:
        check_routers(self)
        if self.projector_hidden_size < 1:
            raise ConfigError(f"projector_hidden_size must be positive, got {self.projector_hidden_size}")
        stride = self.projector_stride
        if stride < 1 or (self.projector_type == "conv" and (stride < 2 or stride & (stride - 1))):
            raise ConfigError(f"projector_stride of a {self.projector_type!r} projector cannot be {stride}")


AutoConfig.register(MowePoolConfig.model_type, MowePoolConfig)
AutoConfig.register(MoweConfig.model_type, MoweConfig)
