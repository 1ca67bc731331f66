"""From instructions and audio to the inputs of a MERaLiON model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    WhisperFeatureExtractor,
)
from transformers.utils import cached_file

from mowe.audio import SAMPLING_RATE, as_waveform
from mowe.checkpoint import check_source, reading
from mowe.errors import AudioError, ConfigError, naming
from mowe.meralion.configuration_meralion import CONFIG_CLASSES, MeralionConfig
from mowe.processing_mowe import MoweProcessor

PROMPT = "Instruction: {instruction} \nFollow the text instruction based on the following audio: {audio}"
"""What the models were trained to be asked."""

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's turns, for a tokenizer that has lost its chat template."""


class MeralionFeatureExtractor(WhisperFeatureExtractor):
    """Log-mel spectrograms of audio cut into chunks of 30 s.

    tokens_per_chunk: tokens that a chunk takes in the prompt. max_chunks: the most a clip may have. do_normalize:
    whether every chunk is brought to zero mean and unit variance first, as the authors do. The rest is Whisper's.
    """

    def __init__(
        self,
        feature_size: int = 128,
        tokens_per_chunk: int = 100,
        max_chunks: int = 10,
        do_normalize: bool = True,
        **kwargs: Any,
    ):
        super().__init__(feature_size=feature_size, **kwargs)
        self.tokens_per_chunk = tokens_per_chunk
        self.max_chunks = max_chunks
        self.do_normalize = do_normalize

    def __call__(self, raw_speech: Any, sampling_rate: float | None = None) -> BatchFeature:
        """raw_speech: a list of clips, each in any form `mowe.audio.as_waveform` takes; arrays at `sampling_rate`,
        16 kHz by default.

        Returns input_features float32 [chunks, feature_size, 3000], the clips' chunks one after the other, and
        num_audio_tokens, a list with the tokens of each clip.
        Raises AudioError for audio that cannot be read or has more than `max_chunks` chunks.
        """
        rate = SAMPLING_RATE if sampling_rate is None else sampling_rate
        chunks, tokens = [], []
        for i, clip in enumerate(raw_speech):
            wave = as_waveform(clip, rate, f"audio {i}").cpu()
            pieces = wave.split(self.n_samples)
            if len(pieces) > self.max_chunks:
                raise AudioError(
                    f"audio {i}: {len(wave) / SAMPLING_RATE:.1f} s are {len(pieces)} chunks of {self.chunk_length} s, "
                    f"expected at most {self.max_chunks}"
                )
            chunks += [piece.numpy() for piece in pieces]
            tokens.append(len(pieces) * self.tokens_per_chunk)
        features = super().__call__(
            chunks,
            sampling_rate=SAMPLING_RATE,
            padding="max_length",
            return_attention_mask=True,  # so that padding is left out of the normalisation
            do_normalize=self.do_normalize,
            return_tensors="pt",
        )
        return BatchFeature({"input_features": features["input_features"], "num_audio_tokens": tokens})


class MeralionProcessor(MoweProcessor):
    """Puts instructions into the family's prompt, tokenises them, and prepares their audio.

    A message with audio parts becomes "Instruction: ... \\nFollow the text instruction based on the following audio:
    ..." (the family's training prompt); one whose content is a string is taken as it is. Prompts begin with exactly one
    begin token.
    speech_token_index: the id of the placeholder, `<SpeechHere>`, which the tokenizer has.
    """

    def __init__(
        self,
        feature_extractor: MeralionFeatureExtractor,
        tokenizer: Any,
        chat_template: str | None = None,
        speech_token_index: int = 255_999,
    ):
        token = tokenizer.convert_ids_to_tokens(speech_token_index) if speech_token_index < len(tokenizer) else None
        if token is None:
            raise ConfigError(f"speech_token_index is {speech_token_index}, the tokenizer has {len(tokenizer)} tokens")
        if chat_template is None and tokenizer.chat_template is None:
            chat_template = GEMMA_TEMPLATE
        super().__init__(feature_extractor, tokenizer, chat_template, audio_token=token)
        self.speech_token_index = speech_token_index

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> MeralionProcessor:
        """From a folder or hub repository of the authors, or from what `save_pretrained` wrote.

        How the audio is prepared is read from there: processor_config.json and preprocessor_config.json where they
        exist, and the model's config.json, which they must not contradict. (AutoProcessor finds this class only in what
        `save_pretrained` wrote: the authors' files name a class of their own.)
        Raises CheckpointError for files that are missing or damaged, ConfigError for settings that contradict.
        """
        source = str(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)  # there is none to run
        with naming(source), reading("the processor"):
            told = _read(source, "processor_config.json", **kwargs)
            if "feature_extractor" in told:  # by save_pretrained: all is said there
                return super(MoweProcessor, cls).from_pretrained(source, **kwargs)
            check_source(source)
            config = MeralionConfig.from_pretrained(source, **kwargs)
            tokens = {
                "fixed_speech_embeds_length": config.fixed_speech_embeds_length,
                "speech_token_index": config.speech_token_index,
            }
            for name, value in tokens.items():
                _agree(f"{name} of processor_config.json", told.get(name, value), value)
            mel_bins = config.speech_config.num_mel_bins
            extracting = {"feature_size": mel_bins, **_read(source, "preprocessor_config.json", **kwargs)}
            _agree("feature_size of preprocessor_config.json", extracting["feature_size"], mel_bins)
            extracting |= {
                "tokens_per_chunk": config.fixed_speech_embeds_length,
                "max_chunks": told.get("time_duration_limit", 300) // told.get("whisper_chunk_size", 30),
                "do_normalize": told.get("do_normalize", True),
            }
            for name in ("auto_map", "feature_extractor_type", "processor_class"):
                extracting.pop(name, None)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
            return cls(MeralionFeatureExtractor(**extracting), tokenizer, None, config.speech_token_index)

    def _tokenize(self, prompts: list[str], **kwargs: Any) -> list[list[int]]:
        rows = super()._tokenize(prompts, **{**kwargs, "add_special_tokens": False})
        begin = self.tokenizer.bos_token_id
        return rows if begin is None else [row if row[:1] == [begin] else [begin, *row] for row in rows]

    def _flatten(self, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], list[Any]]:
        return super()._flatten([_asked(message) for message in messages])


def _asked(message: Any) -> Any:
    """The message with its parts in the order of the family's prompt, where some of them are audio."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list | tuple) or not all(isinstance(part, dict) for part in content):
        return message
    audio = [part for part in content if part.get("type") == "audio"]
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if not audio or len(audio) + len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return message
    asked = PROMPT.format(instruction="".join(texts).strip(), audio="")
    return {**message, "content": [{"type": "text", "text": asked}, *audio]}


def _read(source: str, name: str, **kwargs: Any) -> dict[str, Any]:
    """Settings in a JSON file of a checkpoint, none where it has no such file."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **kwargs)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def _agree(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ConfigError(f"{name} is {got!r}, but the model's config.json says {expected!r}")


for config_class in CONFIG_CLASSES.values():
    AutoFeatureExtractor.register(config_class, MeralionFeatureExtractor)
    AutoProcessor.register(config_class, MeralionProcessor)
