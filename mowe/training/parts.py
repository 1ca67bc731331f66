"""Which parameters learn, and which are kept still."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mowe.configuration_mowe import MoweConfig
from mowe.errors import ConfigError
from mowe.losses import RouterLogits, router_loss_terms
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.training.config import LoraConfig, TrainableConfig


def parts_in_4_bits(model: MoweForConditionalGeneration) -> list[str]:
    """Of mowe.quantization.PARTS."""
    quantization = getattr(model.config, "quantization_config", None)
    return [] if quantization is None else list(quantization.parts)


class Parts:
    """Chooses what learns, stage by stage.

    lora: adapters to put into the language model, where it has none. names: of the parameters that learn now. frozen:
    the encoder families that do not. in_4_bits: see `parts_in_4_bits`.
    Raises ConfigError for adapters of the model that are not what `lora` says.
    """

    def __init__(self, model: MoweForConditionalGeneration, lora: LoraConfig | None = None):
        self.model = model
        self.in_4_bits = parts_in_4_bits(model)
        self.names: list[str] = []
        self.frozen: list[nn.Module] = []
        families = (model.audio_tower, *model.model.mixture.pool.families)
        fixed = {getattr(family, name) for family in families for name in family.fixed}
        self._learnable = {p for p in model.parameters() if p.is_floating_point() and p not in fixed}
        self._held: list[tuple[nn.Parameter, list[int]]] = []
        self._kept: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        if lora is not None:
            self._adapt(lora)

    def choose(self, config: TrainableConfig) -> None:
        """Let these parts learn and no others. Raises ConfigError where they do not fit the model."""
        mixture = self.model.model.mixture
        pool = mixture.pool
        wanted = [config.pool] * pool.num_encoders if isinstance(config.pool, bool) else config.pool
        if len(wanted) != pool.num_encoders:
            raise ConfigError(f"trainable.pool: {len(wanted)} entries, but the pool has {pool.num_encoders} encoders")
        self._check_types(config, any(wanted))
        if config.routers:
            _check_routers(self.model.config)
        self.model.requires_grad_(False)
        for hook in self._hooks:
            hook.remove()
        self._held, self._hooks = [], []
        self._let_learn(self.model.audio_tower, config.audio_tower)
        self._let_learn(mixture.router, config.routers)
        self._let_learn(mixture.multi_modal_projector, config.projector)
        self._let_learn(self.model.language_model, config.language_model == "full")
        for name, parameter in self.model.language_model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad = config.language_model == "lora"
        for family, members in zip(pool.families, pool.members, strict=True):
            learning = [wanted[index] for index in members]
            self._let_learn(family, any(learning))
            if any(learning) and not all(learning):
                self._hold(family, learning)
        self.names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        families = (self.model.audio_tower, *pool.families)
        self.frozen = [f for f in families if not any(parameter.requires_grad for parameter in f.parameters())]

    def store_in_bf16(self, stages: Sequence[TrainableConfig]) -> None:
        """Put encoders, projector and language model into bfloat16, except those that learn in one of the stages."""
        from bitsandbytes.nn import Linear4bit  # seconds to import

        learning: set[str] = set()
        for stage in stages:
            self.choose(stage)
            learning.update(self.names)
        mixture = self.model.model.mixture
        parts = [self.model.audio_tower, *mixture.pool.families, mixture.multi_modal_projector]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for part in (*parts, self.model.language_model):
            still = [p for p in part.parameters() if "lora_" not in names[p] and p.is_floating_point()]
            if not learning.intersection(names[p] for p in still):
                for parameter in still:
                    parameter.data = parameter.data.to(torch.bfloat16)
        for layer in self.model.language_model.modules():
            if isinstance(layer, Linear4bit):
                layer.compute_dtype = torch.bfloat16

    @torch.no_grad()
    def before_step(self) -> None:
        """Note the encoders that share a stack with others which learn, but do not themselves."""
        self._kept = [parameter[still].clone() for parameter, still in self._held]

    @torch.no_grad()
    def after_step(self) -> None:
        """Undo what the optimiser did to them all the same (its weight decay)."""
        for (parameter, still), values in zip(self._held, self._kept, strict=True):
            parameter[still] = values

    def save(self, folder: Path) -> None:
        """Save the model, its adapters folded into the language model; beside it where that is in 4 bits, from which
        a sum could not be told exactly. Afterwards the model has none.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        if hasattr(self.model, "peft_config"):
            merge = "language_model" not in self.in_4_bits
            if not merge:
                self.model.save_pretrained(folder)  # the adapters alone
            for name, layer in list(self.model.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    if merge:
                        layer.merge()
                    self.model.set_submodule(name, layer.get_base_layer())
            del self.model.peft_config
            self.model._hf_peft_config_loaded = False
        self.model.save_pretrained(folder)

    def _adapt(self, lora: LoraConfig) -> None:
        settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
        if not hasattr(self.model, "peft_config"):
            try:
                self.model.add_adapter(self.model.lora_config(**settings))
            except (ImportError, ValueError) as error:  # peft is too old for this transformers, or not there
                raise ConfigError(f"trainable.language_model: no adapters can be added: {error}") from None
        elif lora != LoraConfig():
            (there,) = self.model.peft_config.values()
            for name, value in settings.items():
                if getattr(there, name) != value:
                    raise ConfigError(
                        f"lora: the adapters of the model have {name} {getattr(there, name)}, got {value}"
                    )

    def _check_types(self, config: TrainableConfig, pool: bool) -> None:
        """Raise ConfigError where something in 4 bits should learn."""
        full = config.language_model == "full"
        learning = {"audio_tower": config.audio_tower, "pool": pool, "language_model": full, "lm_head": full}
        for part, learns in learning.items():
            if learns and part in self.in_4_bits:
                field, hint = ("language_model", "; lora trains adapters on it") if full else (part, "")
                raise ConfigError(f"trainable.{field}: {part} is in 4 bits, which cannot learn{hint}")

    def _let_learn(self, module: nn.Module, learns: bool) -> None:
        for parameter in module.parameters():
            parameter.requires_grad = learns and parameter in self._learnable

    def _hold(self, family: nn.Module, learning: Sequence[bool]) -> None:
        """Some encoders of a stack learn and others do not, whose gradient is zero from the start."""
        still = [place for place, learns in enumerate(learning) if not learns]

        def silence(gradient: Tensor) -> Tensor:
            return gradient.index_fill(0, torch.tensor(still, device=gradient.device), 0.0)

        for parameter in family.parameters():
            if parameter.requires_grad:
                self._held.append((parameter, still))
                self._hooks.append(parameter.register_hook(silence))


def _check_routers(config: MoweConfig) -> None:
    """Raise ConfigError for a router that nothing gives a gradient, neither the weights of its slots nor a loss."""
    if config.scale_by_weight:
        return
    losses = {name: coefficient for name, coefficient in (config.router_losses or {}).items() if coefficient}
    logits = torch.zeros(1, 2)
    said = {
        "data-independent": (config.num_independent_slots, RouterLogits(None, logits[0])),
        "data-dependent": (config.num_dependent_slots, RouterLogits(logits, None)),
    }
    for kind, (slots, of_it_alone) in said.items():
        if slots and not router_loss_terms(of_it_alone, losses):
            raise ConfigError(
                f"trainable.routers: nothing gives the {kind} router a gradient: the model's scale_by_weight is false, "
                "and router_losses has no term for it"
            )
