"""The MERaLiON family on transformers 5: audio and text in, text out."""

from __future__ import annotations

from functools import cache, wraps
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMultimodalLM,
    Gemma2Config,
    Gemma2Model,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import can_return_tuple

from mowe.checkpoint import check_keys, check_source, read_model
from mowe.configuration_mowe import CACHE
from mowe.errors import AudioError, ConfigError, naming
from mowe.meralion.configuration_meralion import CONFIG_CLASSES, MeralionConfig
from mowe.meralion.mlx import is_mlx, read_mlx

_KEYS = {
    "speech_encoder.": "model.audio_tower.",
    "ln_speech.": "model.multi_modal_projector.ln_speech.",
    "speech_audio_adapter.": "model.multi_modal_projector.adapter.",
    "text_decoder.model.": "model.language_model.",
    "text_decoder.lm_head.": "lm_head.",  # tied, and left out of the authors' checkpoints
}
"""What the parameters' names begin with in the family's checkpoints, and here."""


class MeralionAdapter(nn.Module):
    """Adapter of the first MERaLiON: [N, T, C * s] stacked frames -> [N, T, H]."""

    def __init__(self, config: MeralionConfig):
        super().__init__()
        width = config.speech_config.d_model
        stacked = width * config.speech_mlp_scale_factor
        self.mlp_adapter = nn.Sequential(nn.Linear(stacked, width), nn.SiLU(), nn.Dropout(0.1))
        self.speech_llm_proj = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, config.text_config.hidden_size),
        )

    def forward(self, stacked: Tensor) -> Tensor:
        return self.speech_llm_proj(self.mlp_adapter(stacked))


class MeralionGatedAdapter(nn.Module):
    """Adapter of MERaLiON-2 and 3: [N, T, C * s] stacked frames -> [N, T, H]."""

    def __init__(self, config: MeralionConfig):
        super().__init__()
        stacked = config.speech_config.d_model * config.speech_mlp_scale_factor
        inner = config.speech_config.d_model * 5
        self.mlp_adapter = nn.Sequential(nn.Linear(stacked, inner), nn.SiLU(), nn.Dropout(0.01))
        self.gated = config.speech_mlp_use_projection
        if self.gated:
            self.gate_proj = nn.Linear(inner, inner)
            self.pool_proj = nn.Linear(inner, inner)
        self.out_proj = nn.Linear(inner, config.text_config.hidden_size)

    def forward(self, stacked: Tensor) -> Tensor:
        h = self.mlp_adapter(stacked)
        if self.gated:
            h = nn.functional.silu(self.gate_proj(h)) * self.pool_proj(h)
        return self.out_proj(h)


class MeralionProjector(nn.Module):
    """LayerNorm, frames stacked s at a time, adapter: [N, frames, C] -> [N, frames / s, H]."""

    def __init__(self, config: MeralionConfig):
        super().__init__()
        self.scale_factor = config.speech_mlp_scale_factor
        self.ln_speech = nn.LayerNorm(config.speech_config.d_model)
        self.adapter = (MeralionGatedAdapter if config.gated_adapter else MeralionAdapter)(config)

    def forward(self, frames: Tensor) -> Tensor:
        return self.adapter(self.ln_speech(frames).unflatten(1, (-1, self.scale_factor)).flatten(2))


class MeralionPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of all models of the family."""

    config_class = MeralionConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("WhisperEncoderLayer", "Gemma2DecoderLayer")
    _skip_keys_device_placement = (CACHE,)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MeralionModel(MeralionPreTrainedModel):
    """Whisper encoder, projector and Gemma2 decoder, without the decoder's head.

    Unless an attention implementation is asked for, the decoder's is "eager": Gemma2 caps its attention logits, and
    transformers' "sdpa" leaves the cap out without a word.
    """

    def __init__(self, config: MeralionConfig):
        super().__init__(config)
        text = config.text_config
        if text._attn_implementation is None and text.attn_logit_softcapping is not None:
            text._attn_implementation = "eager"
        self.audio_tower = WhisperEncoder(config.speech_config)
        self.multi_modal_projector = MeralionProjector(config)
        self.language_model = Gemma2Model(text)
        self.audio_scale = text.hidden_size**0.5 if _gemma2_scales_in_embedding() else 1.0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode chunks of audio.

        input_features: [N, mel bins, 3000], log-mel spectrograms of 30 s each, in any floating dtype.
        Returns last_hidden_state [N, 1500, C], the encoder's, and pooler_output [N, tokens, H], the projector's. (These
        numbers are those of Whisper; the configuration decides.) Raises AudioError for another shape.
        """
        speech = self.config.speech_config
        expected = [speech.num_mel_bins, 2 * speech.max_source_positions]
        if input_features.dim() != 3 or list(input_features.shape[1:]) != expected:
            raise AudioError(
                f"input_features must be [chunks, {expected[0]}, {expected[1]}], got {list(input_features.shape)}"
            )
        kwargs["return_dict"] = True
        output = self.audio_tower(input_features.to(self.audio_tower.conv1.weight.dtype), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.multi_modal_projector(output.last_hidden_state),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def chunks_of(self, input_ids: Tensor, input_features: Tensor | None) -> list[int]:
        """Chunks of audio that each prompt of input_ids [B, T] has placeholders for.

        Raises AudioError where these are not the chunks of input_features [N, ...].
        """
        per_chunk = self.config.fixed_speech_embeds_length
        counts = (input_ids == self.config.speech_token_index).sum(1).tolist()
        for i, count in enumerate(counts):
            if count % per_chunk:
                raise AudioError(f"prompt {i} has {count} audio placeholders, expected {per_chunk} for every chunk")
        chunks = 0 if input_features is None else input_features.shape[0]
        if sum(counts) != chunks * per_chunk:
            raise AudioError(
                f"the prompts have {sum(counts)} audio placeholders, {sum(counts) // per_chunk} chunks, "
                f"but input_features has {chunks} chunks"
            )
        return [count // per_chunk for count in counts]

    def embed(self, input_ids: Tensor, input_features: Tensor) -> Tensor:
        """Embeddings [B, T, H] of prompts, audio in the place of its placeholders, as the decoder takes them."""
        embeds = self.get_input_embeddings()(input_ids)
        tokens = self.get_audio_features(input_features).pooler_output.to(embeds.device, embeds.dtype)
        # The scale is rounded to the embeddings' dtype, as Gemma2 does with that of the text.
        tokens = tokens * torch.tensor(self.audio_scale, dtype=tokens.dtype, device=tokens.device)
        placeholders = input_ids == self.config.speech_token_index
        return embeds.masked_scatter(placeholders[..., None], tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As MeralionForConditionalGeneration.forward, up to the last hidden state of the decoder."""
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and input_features is not None):
            raise ConfigError("expected either inputs_embeds or input_ids, the latter with or without input_features")
        past = kwargs.get(CACHE, kwargs.get("past_key_values"))
        prefill = past is None or past.get_seq_length() == 0
        if input_features is not None or (prefill and input_ids is not None):
            self.chunks_of(input_ids, input_features)
        if input_features is not None:
            inputs_embeds, input_ids = self.embed(input_ids, input_features), None
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )


class MeralionForConditionalGeneration(MeralionPreTrainedModel, GenerationMixin):
    """Any model of the family, by its configuration. Greedy decoding without repeated 6-grams is the default.

    The placeholder of audio is never an answer (our choice): a prompt that is continued would have too many.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MeralionConfig):
        super().__init__(config)
        self.model = MeralionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        _fill(self.generation_config, config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], *args: Any, **kwargs: Any):
        """As in transformers, from the authors' checkpoints, those saved here, and folders with MLX checkpoints.

        Quantised MLX parameters are dequantised (see mowe.meralion.mlx); all dtypes become the configuration's unless
        `dtype` is given.
        Raises CheckpointError for missing, surplus or misshapen parameters and for damaged files, ConfigError for a
        configuration that is not of the family.
        """
        source, want_info = str(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
        with naming(source):
            if is_mlx(source):
                settings, kwargs["state_dict"] = read_mlx(source)
                kwargs.setdefault("config", MeralionConfig.from_dict(settings))
                if Path(source, "generation_config.json").is_file():
                    kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(source))
                model, info = read_model(super().from_pretrained, None, *args, **kwargs)
            else:
                if not kwargs.get("subfolder"):
                    check_source(source)
                model, info = read_model(super().from_pretrained, source, *args, **kwargs)
            check_keys(info, "model")
        _fill(model.generation_config, model.config)
        return (model, info) if want_info else model

    @property
    def audio_tower(self) -> WhisperEncoder:
        """The audio encoder."""
        return self.model.audio_tower

    @property
    def multi_modal_projector(self) -> MeralionProjector:
        """Shortens the audio features and maps them into the language model."""
        return self.model.multi_modal_projector

    @property
    def language_model(self) -> Gemma2Model:
        """The language model, without its head."""
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See MeralionModel.get_audio_features."""
        return self.model.get_audio_features(input_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids: [B, T] with `audio_token_id` at the audio's places. input_features: [N, mel bins, 3000], chunks of
        audio in the order of their placeholders (see get_audio_features). labels: [B, T], -100 where no loss is wanted.
        The rest is as in transformers; kwargs, the cache among them, are the decoder's. Raises AudioError where
        placeholders and chunks do not match.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        cap = self.config.text_config.final_logit_softcapping
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocab_size, num_items_in_batch=num_items)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions")},
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # generate takes what is named here: embeddings, a cache
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Later steps read the audio from the cache; not every supported transformers leaves it out by itself.
        features = kwargs.pop("input_features", None)
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if features is not None and (kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True)):
            inputs["input_features"] = features
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # Beams and returned sequences repeat prompts; a prompt's chunks have to be repeated together.
        features = kwargs.get("input_features")
        if features is not None and expand_size > 1:
            of_prompts = features.split(self.model.chunks_of(input_ids, features))
            features = torch.cat([chunks.repeat(expand_size, 1, 1) for chunks in of_prompts])
            kwargs["input_features"] = None
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if features is None else {**kwargs, "input_features": features}


@cache
def _gemma2_scales_in_embedding() -> bool:
    """Whether Gemma2's multiplication by sqrt(hidden size) is done by its embedding, which audio does not pass, or
    after it; it has moved between versions of transformers."""
    config = Gemma2Config(
        vocab_size=2, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=4, bos_token_id=1,
    )  # fmt: skip
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        embedding = Gemma2Model(config).get_input_embeddings()
        embedding.weight.fill_(1.0)
        return embedding(torch.ones(1, dtype=torch.long)).flatten()[0].item() == 2.0


def _fill(generation: GenerationConfig, config: MeralionConfig) -> None:
    """Set what a checkpoint's own generation configuration leaves open: decoding as the authors do."""
    defaults = {"do_sample": False, "no_repeat_ngram_size": 6, "suppress_tokens": [config.speech_token_index]}
    for name, value in defaults.items():
        if getattr(generation, name) is None:
            setattr(generation, name, value)
    if generation.cache_implementation == "hybrid":
        # What Gemma2 asked of transformers 4. Now it is a cache of fixed size, with which generation is compiled.
        generation.cache_implementation = None


register_checkpoint_conversion_mapping(
    MeralionForConditionalGeneration.__name__,
    [
        WeightRenaming("^" + theirs.replace(".", r"\."), "^" + ours.replace(".", r"\."))
        for theirs, ours in _KEYS.items()
    ],
)
for config_class in CONFIG_CLASSES.values():
    # One class runs all of them, which `register` itself does not allow for.
    AutoModelForMultimodalLM._model_mapping.register(config_class, MeralionForConditionalGeneration)
