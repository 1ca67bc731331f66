"""Configurations of a pool of weak encoders and of an AudioLLM built on one."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mowe.errors import ConfigError

ROUTER_LOSSES = ("independent_entropy", "dependent_entropy", "diversity", "load_balance", "z_loss")
PAPER_ROUTER_LOSSES = {"independent_entropy": 0.1, "dependent_entropy": 0.1, "diversity": 0.1}


def _reject_unknown(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """Raise ConfigError for keys that neither this configuration nor transformers knows."""
    known = set(PreTrainedConfig().to_dict()) | {
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
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{name}: model_type must be one that transformers knows, got {model_type!r}")
    return CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if k != "model_type"})


@strict
class MowePoolConfig(PreTrainedConfig):
    """A pool of weak encoders.

    encoders: one dictionary an encoder, `{"config": its transformers configuration, "do_normalize": bool}`;
        do_normalize says whether a wave encoder takes waves of zero mean and unit variance.
    context: "window" pads every clip of a Whisper encoder to 30 s, as it was pre-trained; "valid" runs it on the
        clip's own frames alone.
    """

    model_type = "mowe_pool"

    encoders: list[dict[str, Any]] | None = None
    context: str = "window"

    def __post_init__(self, **kwargs):
        _reject_unknown(self, kwargs)
        super().__post_init__(**kwargs)
        self.encoders = self.encoders or []
        if self.context not in ("window", "valid"):
            raise ConfigError(f"pool context must be 'window' or 'valid', got {self.context!r}")

    def encoder_configs(self) -> list[PreTrainedConfig]:
        """The encoders' transformers configurations."""
        return [as_config(e["config"], f"encoder {i}") for i, e in enumerate(self.encoders)]


@strict
class MoweConfig(PreTrainedConfig):
    """An AudioLLM with a mixture of weak encoders beside its base encoder.

    audio_config, text_config: base encoder (of a supported family) and language model, as transformers has them.
    pool_config: the pool. audio_do_normalize: whether a wave-type base encoder takes normalised waves.
    context: as in the pool's configuration, for the base encoder.
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
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig, "pool_config": MowePoolConfig}

    audio_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    pool_config: dict[str, Any] | PreTrainedConfig | None = None
    audio_token_id: int = 0
    audio_do_normalize: bool = False
    context: str = "window"
    num_independent_slots: int = 1
    num_dependent_slots: int = 1
    router_temperature: float = 1.0
    router_noise: float = 0.0
    router_straight_through: bool = False
    scale_by_weight: bool = True
    router_losses: dict[str, float] | None = None
    projector_type: str = "conv"
    projector_stride: int = 8
    projector_hidden_size: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        _reject_unknown(self, kwargs)
        self.audio_config = as_config(self.audio_config or {"model_type": "whisper"}, "audio_config")
        self.text_config = as_config(self.text_config or {"model_type": "llama"}, "text_config")
        if not isinstance(self.pool_config, MowePoolConfig):
            self.pool_config = MowePoolConfig(**(self.pool_config or {}))
        if self.router_losses is None:
            self.router_losses = dict(PAPER_ROUTER_LOSSES)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.text_config.hidden_size
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        unknown = sorted(set(self.router_losses) - set(ROUTER_LOSSES))
        if unknown:
            raise ConfigError(f"router_losses: unknown terms {unknown}; known: {', '.join(ROUTER_LOSSES)}")
        if self.context not in ("window", "valid"):
            raise ConfigError(f"context must be 'window' or 'valid', got {self.context!r}")
        if self.router_temperature <= 0:
            raise ConfigError(f"router_temperature must be positive, got {self.router_temperature}")
        if self.projector_type not in ("conv", "stack"):
            raise ConfigError(f"projector_type must be 'conv' or 'stack', got {self.projector_type!r}")
        stride = self.projector_stride
        if stride < 1 or (self.projector_type == "conv" and (stride < 2 or stride & (stride - 1))):
            raise ConfigError(f"projector_stride of a {self.projector_type!r} projector cannot be {stride}")
        encoders = len(self.pool_config.encoders)
        for name in ("num_independent_slots", "num_dependent_slots"):
            slots = getattr(self, name)
            if slots < 0 or (encoders and slots > encoders):
                raise ConfigError(f"{name} is {slots} but the pool has {encoders} encoders")
        if self.num_independent_slots + self.num_dependent_slots == 0:
            raise ConfigError("num_independent_slots and num_dependent_slots are both 0: no encoder would be chosen")
