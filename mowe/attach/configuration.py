"""What an adapter folder says of a mixture: the pool, the routers, and the model it was made for."""

# No `from __future__ import annotations` here: transformers checks the fields' types, which must not be strings.
from typing import Any, Literal

from transformers import PreTrainedConfig

from mowe.configuration_mowe import MowePoolConfig, check_routers, checked, reject_unknown
from mowe.errors import ConfigError


@checked
class AdapterConfig(PreTrainedConfig):
    """A mixture attached to an AudioLLM.

    base_model_type, base_width: type of the AudioLLM and width of its audio features. fusion: how the weak features
    join them, "concat" or "residual". fusion_width, fusion_stack: rows and frames of the fusion's columns. pool_config:
    the pool. The others are as in MoweConfig.
    """

    model_type = "mowe_adapter"
    sub_configs = {"pool_config": MowePoolConfig}

    base_model_type: str = ""
    base_width: int = 0
    fusion: Literal["concat", "residual"] = "residual"
    fusion_width: int = 0
    fusion_stack: int = 1
    pool_config: Any = None
    num_independent_slots: int = 1
    num_dependent_slots: int = 1
    router_temperature: int | float = 1.0
    router_noise: int | float = 0.0
    router_straight_through: bool = False
    scale_by_weight: bool = True
    router_losses: dict[str, int | float] | None = None

    def __post_init__(self, **kwargs):
        reject_unknown(self, kwargs)
        if not isinstance(self.pool_config, MowePoolConfig):
            if not isinstance(self.pool_config or {}, dict):
                raise ConfigError(f"pool_config: expected a MowePoolConfig or a dictionary, got {self.pool_config!r}")
            self.pool_config = MowePoolConfig(**(self.pool_config or {}))
        check_routers(self)
        super().__post_init__(**kwargs)
