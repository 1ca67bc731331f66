"""Base encoder, mixture and language model in one: prompts with audio become embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mowe.audio import AudioBatch
from mowe.checkpoint import StoredTensor
from mowe.configuration_mowe import CACHE, MoweConfig
from mowe.errors import AudioError, ConfigError, naming
from mowe.families import FAMILIES, ClipFeatures, EncoderFamily, KeepsFixed, family_class
from mowe.families.stacked import StackedConv, StackedLinear, StackedNorm
from mowe.mixture import MixtureOfWeakEncoders, MixtureOutput
from mowe.pool import EncoderPool, Layouts
from mowe.projector import BaseFeatures, MoweProjector
from mowe.router import MoweRouter
from mowe_kernels import PackPlan

_OURS = (EncoderFamily, StackedConv, StackedLinear, StackedNorm, MoweProjector, MoweRouter)


@dataclass
class MoweAudioOutput(BaseModelOutputWithPooling):
    """Audio features of a batch.

    last_hidden_state: [R, D], packed frames of the base encoder. pooler_output: [tokens, H], packed embeddings for the
    language model. mixture: what the routers chose and their losses.
    """

    mixture: MixtureOutput | None = None


class MowePreTrainedModel(KeepsFixed, PreTrainedModel):
    """What transformers needs to know of all models here."""

    config_class = MoweConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    # A family and the mixture read their parts without calling them: no hook of accelerate would move what they need.
    _no_split_modules = (*(family.__name__ for family in FAMILIES.values()), MixtureOfWeakEncoders.__name__)
    _skip_keys_device_placement = (CACHE,)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Where a model is quantised while it is read, tensors come one by one. The language model's body keeps its
        name, which transformers since 5.23 takes for a mistake that others once made.
        """
        body = "model.language_model.model."
        kept = [
            transform
            for transform in load_config.weight_mapping or ()
            if isinstance(transform, WeightConverter) or transform.rename_source_key(body)[0] == body
        ]
        load_config = replace(load_config, weight_mapping=kept)
        quantizer = load_config.hf_quantizer
        if quantizer is not None and not quantizer.pre_quantized and state_dict is None and checkpoint_files:
            state_dict = StoredTensor.all_of(checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _OURS):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class MoweModel(MowePreTrainedModel):
    """Base encoder, mixture and language model.

    audio_tower: the base encoder, a family of one, so that it too runs packed. mixture: routers, pool and projector.
    language_model: any causal language model of transformers, with its head.
    """

    def __init__(self, config: MoweConfig):
        super().__init__(config)
        if config.audio_token_id is None:
            raise ConfigError("audio_token_id is not set: which token stands for audio in a prompt?")
        base = config.audio_config
        family = family_class(base.model_type)
        family.signature(base, config.audio_do_normalize)
        self.audio_tower = family([base], config.audio_do_normalize)
        self.mixture = MixtureOfWeakEncoders(config, EncoderPool(config.pool_config))
        with naming("audio_config"):
            self.audio_tower.check_context(config.context)
        with naming("pool_config"):
            for weak in self.mixture.pool.families:
                weak.check_context(config.pool_config.context)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if CACHE not in signature(self.language_model.forward).parameters:
            raise ConfigError(f"a {config.text_config.model_type!r} language model has no {CACHE}")
        width, hidden_size = self.get_input_embeddings().weight.shape[1], config.text_config.hidden_size
        if width != hidden_size:
            raise ConfigError(
                f"the language model's embeddings have width {width}, expected its hidden_size {hidden_size}"
            )
        self._layouts = Layouts([0], [self.audio_tower.num_levels])
        self.post_init()

    @property
    def multi_modal_projector(self) -> nn.Module:
        return self.mixture.multi_modal_projector

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> MoweAudioOutput:
        """Encode windows of audio.

        input_features: [N, S] float waveforms at 16 kHz, zero-padded on the right. input_features_mask: [N, S], true
        where a sample is real; all of them by default. Keep the waveforms in float32 whatever the model's dtype: it is
        their features that are cast. Reads the lengths back from the device once.
        Raises AudioError for shapes that do not fit and for windows the encoders cannot take.
        """
        audio = AudioBatch.from_padded(input_features, input_features_mask, "input_features")
        features = ClipFeatures(audio, self.config.context)
        base = self.encode_base(features)
        pool_context = self.config.pool_config.context
        weak = features if pool_context == features.context else ClipFeatures(features.audio, pool_context)
        mixture = self.mixture.mix(base, weak)
        return MoweAudioOutput(last_hidden_state=base.rows, pooler_output=mixture.tokens, mixture=mixture)

    def encode_base(self, features: ClipFeatures) -> BaseFeatures:
        """Packed features of the base encoder; frames that lie in padding are encoded with it and then left out."""
        tower, audio = self.audio_tower, features.audio
        device = audio.samples.device
        levels = tower.lengths(features)
        tower.prepare(features)
        one = torch.zeros(len(audio.lengths), 1, dtype=torch.int64, device=device)
        plan = PackPlan.build(one, levels, self._layouts.on(device)).family(0)
        own = tuple(tower.level_lengths(samples, "valid")[-1] for samples in audio.lengths)
        rows = tower(features, plan)[: sum(levels[-1])]  # a plan may have room for more
        return BaseFeatures(rows, plan.rows.starts, own, tower.clock)

    def embed(
        self, input_ids: Tensor, input_features: Tensor | None, input_features_mask: Tensor | None
    ) -> tuple[Tensor, MixtureOutput | None]:
        """Embeddings of the prompt [B, T, H], audio in the place of its placeholders, and what the mixture did."""
        placeholders = input_ids == self.config.audio_token_id
        # The placeholder may lie outside the language model's vocabulary; its embedding is replaced in any case.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
        count = int(placeholders.sum())
        if input_features is None:
            if count:
                raise AudioError(f"the prompt has {count} audio placeholders but no input_features")
            return embeds, None
        audio = self.get_audio_features(input_features, input_features_mask)
        tokens = audio.pooler_output
        if count != tokens.shape[0]:
            raise AudioError(f"the prompt has {count} audio placeholders but the audio gives {tokens.shape[0]} tokens")
        embeds = embeds.masked_scatter(placeholders[..., None], tokens.to(embeds.device, embeds.dtype))
        return embeds, audio.mixture
