"""An AudioLLM with a mixture of weak encoders, as transformers users expect one."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from mowe.checkpoint import (
    check_keys,
    check_source,
    load_language_model,
    load_pretrained_encoder,
    normalizes,
    read_model,
)
from mowe.configuration_mowe import CACHE, MoweConfig
from mowe.errors import ConfigError, naming
from mowe.families import EncoderFamily, family_class, find_encoder
from mowe.generation import PlaceholderNeverChosen
from mowe.losses import loss_share
from mowe.mixture import MixtureOfWeakEncoders, MixtureOutput
from mowe.model import MoweAudioOutput, MoweModel, MowePreTrainedModel
from mowe.pool import EncoderPool

__all__ = [
    "MoweAudioOutput",
    "MoweCausalLMOutputWithPast",
    "MoweForConditionalGeneration",
    "MoweModel",
    "MowePreTrainedModel",
]


@dataclass
class MoweCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of MoweForConditionalGeneration: that of transformers and three fields more.

    loss: next-token loss plus aux_loss. logits: [B, T, V]. aux_loss: weighted sum of the router losses, a float32
    scalar. router_logits: float32 [audio windows, E] of the data-dependent router. router_indices: int64
    [audio windows, k], the chosen encoders. Without audio the last three are None.
    mixture: all of MixtureOutput, with the weights; no field but an attribute, so that nobody gathers it over batches.
    """

    mixture: ClassVar[MixtureOutput | None] = None

    aux_loss: Tensor | None = None
    router_logits: Tensor | None = None
    router_indices: Tensor | None = None


class MoweForConditionalGeneration(MowePreTrainedModel, GenerationMixin):
    """Base audio encoder, mixture of weak encoders, language model: audio and text in, text out."""

    def __init__(self, config: MoweConfig):
        super().__init__(config)
        self.model = MoweModel(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str] | None, *args: Any, **kwargs: Any):
        """As in transformers, but missing, surplus or misshapen parameters and damaged files raise CheckpointError.

        quantization_config: a MoweQuantizationConfig, or a BitsAndBytesConfig with load_in_4bit, whose list of modules
        to skip adds to the routers, norms, projector and head, which are never quantised. device_map: only the language
        model can be offloaded; where it offloads something else, ConfigError is raised.
        """
        from mowe.quantization import with_quantization

        source = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        want_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained

        def load_maybe_quantized(source: str | None, *args: Any, **kwargs: Any) -> Any:
            return load(source, *args, **with_quantization(source, kwargs))

        with naming(source or "state_dict"):
            if source is not None and not kwargs.get("subfolder"):
                check_source(source)
            model, info = read_model(load_maybe_quantized, source, *args, **kwargs)
            check_keys(info, "model")
            _check_not_offloaded(model)
        return (model, info) if want_info else model

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers. Raises ConfigError for a pool in 4 bits that the configuration does not know to be so."""
        quantization = getattr(self.config, "quantization_config", None)
        if self.model.mixture.pool.quantized and "pool" not in getattr(quantization, "parts", ()):
            raise ConfigError("the pool was put in 4 bits by itself; quantise the model, mowe.quantize(model)")
        super().save_pretrained(save_directory, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        """Where there are adapters too, transformers goes on to tell of their parameters alone."""
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        check_keys(loading_info.to_dict(), "model")
        return loading_info

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which would go on to save the model's own parameters under the names of an adapter's."""
        conversions = getattr(self, "_weight_conversions", None)
        info = super().load_adapter(*args, **kwargs)
        self._weight_conversions = conversions
        return info

    @classmethod
    def from_parts(
        cls,
        audio_tower: str | PathLike[str] | nn.Module,
        pool: EncoderPool | Sequence[str | PathLike[str]],
        language_model: str | PathLike[str] | PreTrainedModel,
        *,
        audio_token_id: int,
        **settings: Any,
    ) -> MoweForConditionalGeneration:
        """A model from pre-trained parts, with new routers and a new projector.

        audio_tower: the base encoder, a transformers module or a checkpoint. pool: a pool, or the checkpoints of its
        encoders. language_model: a causal language model of transformers or a checkpoint. A pool and a language model
        given as modules become part of the new model, which has the language model's device and dtype.
        audio_token_id: the placeholder, as in MoweProcessor.audio_token_id. settings: other fields of MoweConfig; their
        defaults are the paper's arrangement, with Whisper-large as audio_tower and two Whisper-tiny, HuBERT-base and
        HuBERT-base-er as pool. All parts are in full precision; `mowe.quantize` takes the model made of them.
        Raises CheckpointError for checkpoints that cannot be read, ConfigError for parts that do not go together.
        """
        # The configuration would take those of `generate` too: top_k.
        if unknown := sorted(settings.keys() - {field.name for field in fields(MoweConfig)}):
            raise ConfigError(f"MoweConfig: unknown keys {unknown}")
        if not isinstance(audio_tower, nn.Module):
            audio_tower, extractor = load_pretrained_encoder(audio_tower)
            settings.setdefault("audio_do_normalize", normalizes(audio_tower, extractor))
        base = find_encoder(audio_tower)
        if not isinstance(pool, EncoderPool):
            pool = EncoderPool.from_pretrained(pool, settings.get("context", "window"))
        if not isinstance(language_model, PreTrainedModel):
            language_model = load_language_model(str(language_model))
        in_few_bits = getattr(language_model.config, "quantization_config", None) is not None
        for part, quantized in {"pool": pool.quantized, "language model": in_few_bits}.items():
            if quantized:
                raise ConfigError(f"the {part} is quantised; give it in full precision, and quantise the whole model")
        config = MoweConfig(
            audio_config=base.config,
            pool_config=pool.config,
            text_config=language_model.config,
            audio_token_id=audio_token_id,
            **settings,
        )
        with torch.device("meta"):
            model = cls(config)
        tower = family_class(base.config.model_type)([base.config], config.audio_do_normalize)
        tower.load_encoder(0, base)
        mixture = MixtureOfWeakEncoders(config, pool)
        model.model.audio_tower, model.model.mixture, model.model.language_model = tower, mixture, language_model
        model.generation_config = language_model.generation_config
        return model.to(language_model.device, language_model.dtype).eval()

    @property
    def audio_tower(self) -> EncoderFamily:
        """The base encoder."""
        return self.model.audio_tower

    @property
    def multi_modal_projector(self) -> nn.Module:
        """Shortens the audio features and maps them into the language model."""
        return self.model.multi_modal_projector

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model, with its head."""
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> MoweAudioOutput:
        """See MoweModel.get_audio_features."""
        return self.model.get_audio_features(input_features, input_features_mask)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """As in transformers. The audio is encoded once, whatever the number of steps, beams and returned sequences.
        The placeholder of audio is never an answer.

        Raises ConfigError for audio without input_ids, and for assisted decoding of a prompt with audio: transformers'
        would lose candidate tokens.
        """
        input_ids = inputs if input_ids is None else input_ids
        if input_features is not None:
            if input_ids is None:
                raise ConfigError("expected input_ids with the places of input_features, got none")
            settings = deepcopy(kwargs.get("generation_config") or self.generation_config)
            settings.update(**kwargs)
            if settings.get_generation_mode(kwargs.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION:
                raise ConfigError("assisted decoding is not supported for a prompt with audio")
            kwargs["inputs_embeds"], _ = self.model.embed(input_ids, input_features, input_features_mask)
        return super().generate(input_ids, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return PlaceholderNeverChosen(super()._get_logits_processor(*args, **kwargs), self.config.audio_token_id)

    def lora_config(self, **settings: Any):
        """A peft LoraConfig on the linear layers of the language model alone: not on its head, towers or projector.

        peft has no default for a model type that is not its own, so that `LoraConfig()` alone is refused; targets given
        by the names that are usual in language models (`q_proj`, ...) do not occur outside of it either.
        settings: other fields of LoraConfig (r, lora_alpha, ...).
        """
        from peft import LoraConfig

        body = self.language_model.base_model  # without the head
        layers = (name for name, module in body.named_modules() if isinstance(module, nn.Linear | Conv1D))
        names = sorted({name.split(".")[-1] for name in layers})
        pattern = rf"(.*\.)?language_model\.{self.language_model.base_model_prefix}\..*\.({'|'.join(names)})"
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": pattern, **settings})

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoweCausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids: [B, T] with `audio_token_id` at the audio's places. input_features, input_features_mask: [N, S],
        windows of audio in the order of their placeholders (see get_audio_features). labels: [B, T], -100 where no
        loss is wanted. Under gradient accumulation, the router loss counts by the share of num_windows_in_batch, the
        windows of all accumulated batches, or else by `loss_share`. The rest is as in transformers; kwargs, the cache
        among them, are the language model's.
        Raises AudioError where placeholders and audio do not match, ConfigError for inputs that do not go together.
        """
        mixture = None
        given = (input_ids is not None) + (inputs_embeds is not None)
        if given != 1 or (input_ids is None and input_features is not None):
            raise ConfigError("expected either inputs_embeds or input_ids, the latter with or without input_features")
        if inputs_embeds is None:
            inputs_embeds, mixture = self.model.embed(input_ids, input_features, input_features_mask)
        num_items = kwargs.pop("num_items_in_batch", None)
        num_windows = kwargs.pop("num_windows_in_batch", None)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        aux_loss = mixture.aux_loss if mixture is not None else None
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(outputs.logits, labels, vocab_size=vocab_size, num_items_in_batch=num_items)
            if aux_loss is not None:
                share = loss_share(labels, num_items) if num_windows is None else len(mixture.indices) / num_windows
                loss = loss + aux_loss.to(loss.device) * share
        output = MoweCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            **{name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions")},
            aux_loss=aux_loss,
            router_logits=mixture.router_logits if mixture is not None else None,
            router_indices=mixture.indices if mixture is not None else None,
        )
        output.mixture = mixture
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _check_not_offloaded(model: MoweForConditionalGeneration) -> None:
    """Raise ConfigError where parts are on no device that read their own parts without calling them."""
    for name in ("audio_tower", "mixture"):
        if any(parameter.is_meta for parameter in model.model.get_submodule(name).parameters()):
            raise ConfigError(f"device_map offloads parts of model.{name}; only model.language_model can be offloaded")


AutoModelForMultimodalLM.register(MoweConfig, MoweForConditionalGeneration)
