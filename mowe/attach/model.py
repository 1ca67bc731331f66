"""Attaching a mixture to a model, and taking it off again."""

from __future__ import annotations

import inspect
import re
from contextlib import AbstractContextManager
from functools import cache
from os import PathLike
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from mowe.attach.classes import made_again_by
from mowe.attach.configuration import AdapterConfig
from mowe.attach.layouts import AudioLayout, Fusion, layout_of
from mowe.attach.mixture import AttachedMixture
from mowe.errors import ConfigError
from mowe.families import KeepsFixed
from mowe.losses import loss_share
from mowe.mixture import MixtureOutput
from mowe.pool import EncoderPool

Model = TypeVar("Model", bound=PreTrainedModel)

_WEAK_INPUTS = ("mowe_waveforms", "mowe_waveforms_mask")


class Attached(KeepsFixed):
    """What a model with an attached mixture can do besides what its own class does.

    mowe: pool, routers and fusion. forward and generate also take mowe_waveforms, [N, S] float32 at 16 kHz and
    zero-padded on the right, one row for each audio that the model's feature extractor was given, and
    mowe_waveforms_mask, [N, S], true where a sample is real. `mowe.wrap_processor` adds both to a processor's output.
    """

    mowe: AttachedMixture

    def train(self: Any, mode: bool = True) -> Any:
        """As in torch, but a frozen audio tower stays in evaluation mode: it gives what it gave when it was trained."""
        super().train(mode)  # type: ignore[misc]
        tower = self.mowe.layout.submodule(self, self.mowe.layout.tower)
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        mowe_waveforms: Tensor | None = None,
        mowe_waveforms_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers. The pool runs once, whatever the number of steps, beams and returned sequences."""
        if mowe_waveforms is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with self._hearing(mowe_waveforms, mowe_waveforms_mask):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _hearing(self, waveforms: Tensor, mask: Tensor | None) -> AbstractContextManager[None]:
        if not isinstance(self.mowe, AttachedMixture):
            raise ConfigError(
                "the mixture is one of peft's modules_to_save, which are copies that the model does not ask; "
                "model.mowe.requires_grad_(True) trains it, mowe.save_adapter saves it"
            )
        return self.mowe.hearing(waveforms, mask)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Beams and returned sequences repeat the audio, every model in its own order, which the mixture notes."""
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]
        name = self.mowe.layout.inputs
        if expand_size > 1 and kwargs.get(name) is not None:
            numbers = torch.arange(kwargs[name].shape[0])[:, None, None]
            prompts = {key: kwargs[key] for key in ("input_ids", "is_encoder_decoder") if key in kwargs}
            self.mowe.repeats(expand(expand_size=expand_size, **prompts, **{name: numbers})[1][name].flatten().tolist())
        return expand(expand_size=expand_size, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, the mixture included; `mowe.load_attached` reads it back, and so does `attach_from`.

        Of a model with adapters (`add_adapter`) transformers saves those alone: the mixture then lies beside them.
        """
        from mowe.attach.adapter import check_full_precision, save_beside_model

        check_full_precision(self.mowe)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            save_beside_model(self, save_directory)  # type: ignore[arg-type]

    def save_adapter(self, save_directory: str | PathLike[str]) -> None:
        """See `mowe.save_adapter`."""
        from mowe.attach.adapter import save_adapter

        save_adapter(self, save_directory)

    def lora_config(self, **settings: Any) -> Any:
        """A peft LoraConfig on the linear layers of the language model alone: not on head, tower, projector or pool.

        peft freezes everything else: after `get_peft_model`, `model.mowe.requires_grad_(True)` trains the mixture too.
        settings: other fields of LoraConfig (r, lora_alpha, ...).
        """
        from peft import LoraConfig

        path = self.mowe.layout.language_model
        layers = self.mowe.layout.submodule(self, path).named_modules()  # type: ignore[arg-type]
        linear = [name for name, module in layers if isinstance(module, nn.Linear | Conv1D)]
        # A layer that has an adapter already holds the one it had, and those of the adapter.
        own = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]
        names = {name.split(".")[-1] for name in own}
        named = sorted(name for name in names if not name.isdigit())  # a number names other modules too
        inside = rf"{re.escape(path)}\."
        ours = {
            "task_type": "CAUSAL_LM",
            "target_modules": rf"{inside}.*\.({'|'.join(named)})",
            # For a mixture of experts peft keeps only the last names of the targets.
            "exclude_modules": rf"(?!{inside}).*",
        }
        return LoraConfig(**{**ours, **settings})


def attach(
    model: Model,
    pool: EncoderPool,
    *,
    fusion: Fusion | str = "auto",
    layout: AudioLayout | None = None,
    **settings: Any,
) -> Model:
    """Give a trained AudioLLM a mixture of weak encoders, which changes none of its outputs until it is trained.

    model: any AudioLLM of transformers that has a layout, with its language-model head; changed in place, given back.
    pool: the weak encoders; they become part of the model. fusion: "concat", the paper's, gives the first linear layer
    of the projector columns for the weak features; "residual" adds them to the audio features, their width kept; "auto"
    is the first of the two that the model allows. Both start at zero. layout: where the audio features are, for a model
    type that is not supported. settings: the routers', as in MoweConfig (num_independent_slots, num_dependent_slots,
    router_temperature, router_noise, router_straight_through, scale_by_weight, router_losses).
    Nothing is frozen: to train the mixture alone, `model.requires_grad_(False)` and `model.mowe.requires_grad_(True)`.
    Raises ConfigError for a model that is not supported or has a mixture already, and for a pool or settings that do
    not fit it.
    """
    layout = check_attachable(model, layout)
    if fusion != "auto" and fusion not in layout.fusions:
        allowed = " or ".join(map(repr, ("auto", *layout.fusions)))
        raise ConfigError(f"fusion of a {model.config.model_type!r} model must be {allowed}, got {fusion!r}")
    if not isinstance(pool, EncoderPool):
        raise ConfigError(f"expected an EncoderPool, got {type(pool).__name__}")
    device, dtype = _place_of(model, layout)
    first = next(pool.parameters())
    if (first.device, first.dtype) != (device, dtype):
        raise ConfigError(
            f"the pool is {first.dtype} on {first.device}, the model's audio tower {dtype} on {device}; move the pool "
            f"there first: pool.to({str(device)!r}, {dtype})"
        )
    chosen = layout.fusions[0] if fusion == "auto" else fusion
    measured = {**measure(model, layout, chosen), "fusion": chosen, "pool_config": pool.config}
    routers = AdapterConfig.__annotations__.keys() - measured.keys()
    if unknown := sorted(settings.keys() - routers):  # the configuration would take those of `generate`: top_k
        raise ConfigError(f"unknown settings {unknown}; known: {', '.join(sorted(routers))}")
    return join(model, AttachedMixture(AdapterConfig(**settings, **measured), pool, layout))


def detach(model: Model) -> Model:
    """Take the mixture off again, in place: the model is what it was before. Raises ConfigError where there is none."""
    if not isinstance(model, Attached):
        wrapped = any(isinstance(module, Attached) for module in model.modules())
        said = "wraps the model that has the mixture; unwrap it first" if wrapped else "has no mixture to detach"
        raise ConfigError(f"{type(model).__name__} {said}")
    model.mowe.unhook()
    del model.mowe
    model.__class__ = type(model).__bases__[1]
    _refresh(model)
    return model


def attached_of(model: nn.Module) -> PreTrainedModel:
    """The model with a mixture, inside whatever wraps it (peft, DistributedDataParallel)."""
    found = [module for module in model.modules() if isinstance(module, Attached)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no mixture attached")
    return found[0]


def check_attachable(model: PreTrainedModel, layout: AudioLayout | None) -> AudioLayout:
    """The layout to attach by. Raises ConfigError for what cannot take a mixture."""
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"expected a model of transformers, got {type(model).__name__}; attach before wrapping it")
    if isinstance(model, Attached):
        raise ConfigError(f"{type(model).__name__} has a mixture already; mowe.detach(model) takes it off")
    if "forward" in vars(model) and "_old_forward" not in vars(model):
        raise ConfigError(
            f"the forward method of this {type(model).__name__} was replaced (compiled?); attach before that"
        )
    layout = layout or layout_of(model)
    if _place_of(model, layout)[0].type == "meta":
        raise ConfigError("the model's audio tower is offloaded; only its language model can be, by its device_map")
    return layout


def join(model: Model, mixture: AttachedMixture) -> Model:
    """Make the mixture, in the model's device and dtype, a part of the model."""
    mixture.to(*_place_of(model, mixture.layout)).train(model.training)
    mixture.hook(model)
    model.mowe = mixture
    model.__class__ = _attached_class(type(model))
    _refresh(model)
    return model


def measure(model: PreTrainedModel, layout: AudioLayout, fusion: str) -> dict[str, Any]:
    """What the mixture must know of the model, as fields of AdapterConfig."""
    width = layout.setting(model, layout.width)
    stack = layout.setting(model, layout.stack) if isinstance(layout.stack, str) else layout.stack
    linear = [layout.submodule(model, path) for path in layout.linear]
    widened = fusion == "concat"
    return {
        "base_model_type": model.config.model_type,
        "base_width": width,
        "fusion_width": linear[0].out_features if widened else width,
        "fusion_stack": stack if widened else 1,
    }


def _place_of(model: PreTrainedModel, layout: AudioLayout) -> tuple[torch.device, torch.dtype]:
    """Device and dtype in which the tower computes; the parameters of quantised layers do not tell the dtype."""
    return next(layout.submodule(model, layout.tower).parameters()).device, model.dtype


@cache
def _attached_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model's class, under its name: configurations keep naming the class that loads them."""

    def forward(
        self: Any,
        *args: Any,
        mowe_waveforms: Tensor | None = None,
        mowe_waveforms_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if mowe_waveforms is None:  # a text, or a step of `generate`
            return base.forward(self, *args, **kwargs)
        with self._hearing(mowe_waveforms, mowe_waveforms_mask):
            outputs = base.forward(self, *args, **kwargs)
            mixture = self.mowe.call.mixture
        labels = own.bind(self, *args, **kwargs).arguments.get("labels")
        return _with_router_loss(outputs, mixture, labels, kwargs.get("num_items_in_batch"))

    own = inspect.signature(base.forward)
    forward.__doc__ = base.forward.__doc__
    forward.__signature__ = _with_weak_inputs(own)  # type: ignore[attr-defined]
    return type(base.__name__, (Attached, base), {"forward": forward, **made_again_by(_attached_class, base)})


def _with_weak_inputs(own: inspect.Signature) -> inspect.Signature:
    """generate and Trainer look at what forward names."""
    parameters = list(own.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    weak = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _WEAK_INPUTS]
    return own.replace(parameters=[*parameters[:at], *weak, *parameters[at:]])


def _with_router_loss(outputs: Any, mixture: MixtureOutput, labels: Tensor | None, num_items: Any) -> Any:
    """The model's output with the router loss in its loss, and what the mixture did as attributes beside its fields."""
    aux_loss = mixture.aux_loss
    if labels is not None and aux_loss is not None:
        loss = outputs[0] + aux_loss.to(outputs[0].device) * loss_share(labels, num_items)
        if isinstance(outputs, ModelOutput):
            outputs["loss"] = loss
        else:
            outputs = (loss, *outputs[1:])
    if isinstance(outputs, ModelOutput):
        # Attributes and not fields: what evaluates a model gathers the fields of every batch.
        told = {"aux_loss": aux_loss, "router_logits": mixture.router_logits, "router_indices": mixture.indices}
        for name, value in told.items():
            if getattr(outputs, name, None) is None:  # a mixture-of-experts language model has router logits of its own
                setattr(outputs, name, value)
        outputs.mixture = mixture
    return outputs


def _refresh(model: PreTrainedModel) -> None:
    """Forget what was kept of the model as it was before its class and hooks changed."""
    if "_old_forward" in vars(model):  # accelerate keeps the method that it wraps on the instance
        model._old_forward = MethodType(type(model).forward, model)
    torch.compiler.reset()  # what is compiled does not look whether there are hooks
