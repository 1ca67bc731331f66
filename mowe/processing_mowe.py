"""From prompts and audio to model inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from numbers import Real
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from mowe.audio import MIN_SAMPLES, SAMPLING_RATE, WINDOW_SAMPLES, as_waveform, split_windows
from mowe.checkpoint import check_source, reading
from mowe.configuration_mowe import MoweConfig
from mowe.errors import AudioError, ConfigError, naming
from mowe.families import family_class

_SAVED_BY_TRANSFORMERS = {"feature_extractor_type", "padding_side", "processor_class", "return_attention_mask"}
_CALL_SETTINGS = (
    "add_special_tokens", "answers", "max_length", "padding", "padding_side", "return_tensors", "truncation",
)  # fmt: skip
_CALL_VALUES = {"return_tensors": ("pt",), "padding": (True, "longest"), "padding_side": ("left", "right")}

PAPER_PROMPT = "Given the following speech tokens: \n<speech>{audio}</speech>\n\n{instruction}"
"""The prompt of the authors' inference adapter, for language models without a chat template."""


class AudioBatchFeature(BatchFeature):
    """A processor's output that keeps the waveforms in float32 when the rest is cast to the model's dtype.

    waveforms: what they are called in it.
    """

    waveforms: ClassVar[str] = "input_features"

    def to(self, *args: Any, **kwargs: Any) -> AudioBatchFeature:
        kept = self.data.get(self.waveforms)
        super().to(*args, **kwargs)
        if isinstance(kept, Tensor):
            self.data[self.waveforms] = kept.to(self.data[self.waveforms].device)
        return self


class MoweFeatureExtractor(SequenceFeatureExtractor):
    """Cuts audio into windows of at most 30 s and pads them together; the model computes its features itself.

    token_stages: (kernel, stride, total padding) of every strided step from samples to tokens, from which the number
    of tokens of a window follows. window_samples, min_window_samples: the most a window holds, and the fewest, to which
    a shorter one is padded with zeros. `from_config` reads all of them off a model's configuration.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        token_stages: Sequence[Sequence[int]],
        window_samples: int = WINDOW_SAMPLES,
        min_window_samples: int = MIN_SAMPLES,
        feature_size: int = 1,
        sampling_rate: int = SAMPLING_RATE,
        padding_value: float = 0.0,
        **kwargs: Any,
    ):
        unknown = sorted(kwargs.keys() - _SAVED_BY_TRANSFORMERS)
        if unknown:
            raise ConfigError(f"MoweFeatureExtractor: unknown keys {unknown}")
        if not MIN_SAMPLES <= min_window_samples <= window_samples <= WINDOW_SAMPLES:
            raise ConfigError(
                f"min_window_samples and window_samples must lie in {MIN_SAMPLES}..{WINDOW_SAMPLES}, in order, "
                f"got {min_window_samples} and {window_samples}"
            )
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.window_samples, self.min_window_samples = window_samples, min_window_samples
        self.token_stages = [list(stage) for stage in token_stages]

    @classmethod
    def from_config(cls, config: MoweConfig) -> MoweFeatureExtractor:
        """The feature extractor of a model, whose windows fit its base encoder and all encoders of its pool.

        Raises ConfigError where none does.
        """
        stages = family_class(config.audio_config.model_type).stages(config.audio_config)
        if config.projector_type == "conv":
            stages += [(3, 2, 2)] * (config.projector_stride.bit_length() - 1)
        else:
            stages += [(config.projector_stride, config.projector_stride, config.projector_stride - 1)]
        encoders = [config.audio_config, *config.pool_config.encoder_configs()]
        fewest, most = zip(*(family_class(one.model_type).sample_range(one) for one in encoders), strict=True)
        return cls(token_stages=stages, window_samples=min(most), min_window_samples=max(fewest))

    def num_tokens(self, samples: int) -> int:
        """Tokens that a window of so many samples gives."""
        for kernel, stride, padding in self.token_stages:
            samples = (samples + padding - kernel) // stride + 1
        return samples

    def __call__(
        self, raw_speech: Any, sampling_rate: float | None = None, return_tensors: str = "pt"
    ) -> AudioBatchFeature:
        """raw_speech: one clip or a list of clips, each in any form `mowe.audio.as_waveform` takes.

        sampling_rate: of the clips given as arrays, 16 kHz by default; other rates are resampled. return_tensors: "pt"
        or "np".
        Returns input_features float32 [N, S] and input_features_mask int64 [N, S], one row a window, and for each clip
        the number of windows (`num_windows`) and of tokens (`num_audio_tokens`), as lists.
        Raises AudioError for audio that cannot be read.
        """
        if return_tensors not in ("pt", "np"):
            raise ConfigError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}")
        clips = raw_speech if _is_batch(raw_speech) else [raw_speech]
        rate = self.sampling_rate if sampling_rate is None else sampling_rate
        windows = [
            split_windows(as_waveform(clip, rate, f"audio {i}").cpu(), self.window_samples, self.min_window_samples)
            for i, clip in enumerate(clips)
        ]
        flat = [window for of_clip in windows for window in of_clip]
        if not flat:
            raise AudioError("no audio was given")
        padded = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=self.padding_value)
        lengths = torch.tensor([window.numel() for window in flat])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return AudioBatchFeature(
            {
                "input_features": padded if return_tensors == "pt" else padded.numpy(),
                "input_features_mask": mask if return_tensors == "pt" else mask.numpy(),
                "num_windows": [len(of_clip) for of_clip in windows],
                "num_audio_tokens": [sum(self.num_tokens(w.numel()) for w in of_clip) for of_clip in windows],
            }
        )


class MoweProcessor(ProcessorMixin):
    """Tokenises prompts, prepares their audio, and puts one placeholder per audio token where the audio belongs.

    audio_token: what stands for one audio in a prompt; added to the tokenizer if it does not have it.
    """

    def __init__(
        self,
        feature_extractor: MoweFeatureExtractor,
        tokenizer: Any,
        chat_template: str | None = None,
        audio_token: str = "<|audio|>",
    ):
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ConfigError("the tokenizer has neither a padding nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.add_special_tokens({"additional_special_tokens": [audio_token]}, replace_extra_special_tokens=False)
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> MoweProcessor:
        """As in transformers, but files that are missing or damaged raise CheckpointError."""
        source = str(pretrained_model_name_or_path)
        with naming(source):
            if not kwargs.get("subfolder"):
                check_source(source, "processor_config.json")
            with reading("the processor"):
                return super().from_pretrained(source, **kwargs)

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        sampling_rate: float | None = None,
        answers: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> AudioBatchFeature:
        """Model inputs for a batch of prompts.

        text: prompts, each with `audio_token` once for every audio it speaks of. audio: the clips in the order of their
        tokens, as one list or one list per prompt; any form `mowe.audio.as_waveform` takes. sampling_rate: of clips
        given as arrays, 16 kHz by default. answers: for training; each is appended to its prompt with the end token,
        and `labels` are -100 everywhere else. padding: True or "longest", the only way. padding_side: "left", as
        `generate` needs it, or "right", the default with answers. kwargs: for the tokenizer.
        Returns input_ids and attention_mask [B, T], input_features and input_features_mask [N, S] if there is audio.
        Raises AudioError where prompts and audio do not match or audio cannot be read, ConfigError for settings that
        are not supported.
        """
        if padding_side is None:
            padding_side = "left" if answers is None else "right"
        settings = {"return_tensors": return_tensors, "padding": padding, "padding_side": padding_side}
        for name, value in settings.items():
            if value not in _CALL_VALUES[name]:
                raise ConfigError(f"{name} must be {' or '.join(map(repr, _CALL_VALUES[name]))}, got {value!r}")
        unknown = sorted(kwargs.keys() - signature(self.tokenizer.__call__).parameters - {"split_special_tokens"})
        if unknown:
            raise ConfigError(f"unknown settings {unknown}, neither the processor nor the tokenizer has them")
        prompts = _texts(text, "prompt")
        if not prompts:
            raise ConfigError("expected at least one prompt, got none")
        inputs, counts = self._prepare_audio(prompts, audio, sampling_rate)
        questions = self._tokenize(self._expand(prompts, counts), **kwargs)
        tails = [[]] * len(prompts) if answers is None else self._tails(answers)
        if len(tails) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(tails)} answers")
        rows = list(zip(questions, tails, strict=True))
        ids = _pad([q + a for q, a in rows], self.tokenizer.pad_token_id, padding_side)
        mask = _pad([[1] * (len(q) + len(a)) for q, a in rows], 0, padding_side)
        data = {"input_ids": ids, "attention_mask": mask, **inputs}
        if answers is not None:
            data["labels"] = _pad([[-100] * len(q) + a for q, a in rows], -100, padding_side)
        return AudioBatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        sampling_rate: float | None = None,
        **kwargs: Any,
    ) -> str | list[str] | BatchFeature:
        """Prompts of one conversation or a batch of them, whose messages may hold {"type": "audio", "audio": clip}.

        An audio entry names its clip under "audio", "path" or "url" (a local path). With tokenize=True the result is
        that of calling the processor on the prompts and clips, else the prompts alone. The language model's own chat
        template is used where it has one, the authors' prompt otherwise. kwargs: settings of the processor's call
        (answers, padding_side, ...); the others are for the template.
        Raises ConfigError for what are no messages, and as the processor's call does.
        """
        single = bool(_listed(conversation, "messages or of conversations")) and isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        call = {name: kwargs.pop(name) for name in _CALL_SETTINGS if name in kwargs}
        kwargs.pop("return_dict", None)
        template = chat_template or self.chat_template
        plain = template is None and self.tokenizer.chat_template is None
        prompts, clips = [], []
        for messages in conversations:
            flat, audio = self._flatten(_listed(messages, "messages"))
            clips.append(audio)
            if plain:
                prompts.append(_plain_prompt(flat, self.audio_token))
            else:
                prompts.append(
                    self.tokenizer.apply_chat_template(
                        flat,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **kwargs,
                    )
                )
        if not tokenize:
            return prompts[0] if single else prompts
        # A template writes the special tokens itself.
        return self(prompts, clips, sampling_rate, **{"add_special_tokens": plain, **call})

    def _prepare_audio(
        self, prompts: list[str], audio: Any, sampling_rate: int | None
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Model inputs of all clips, and the tokens of each, after checking that every prompt gets its own."""
        wanted = [prompt.count(self.audio_token) for prompt in prompts]
        if audio is None:
            clips: list[Any] = []
        elif not _is_batch(audio):
            clips = [audio]
        elif audio and all(clip is None or _is_batch(clip) for clip in audio):
            given = [len(clip or ()) for clip in audio]
            for i, (want, got) in enumerate(zip(wanted, given, strict=False)):
                if want != got:
                    raise AudioError(f"prompt {i} has {want} {self.audio_token} but {got} audios")
            if len(given) != len(prompts):
                raise AudioError(f"{len(prompts)} prompts but audio for {len(given)}")
            clips = [clip for of_prompt in audio for clip in of_prompt or ()]
        else:
            clips = list(audio)
        if sum(wanted) != len(clips):
            raise AudioError(f"the prompts have {sum(wanted)} {self.audio_token} but {len(clips)} audios were given")
        if not clips:
            return {}, []
        features = self.feature_extractor(clips, sampling_rate)
        names = self.feature_extractor.model_input_names
        return {name: features[name] for name in names}, features["num_audio_tokens"]

    def _expand(self, prompts: list[str], counts: list[int]) -> list[str]:
        """Each audio token repeated as often as its clip has tokens."""
        left = iter(counts)
        expanded = []
        for prompt in prompts:
            head, *tails = prompt.split(self.audio_token)
            expanded.append(head + "".join(self.audio_token * next(left) + tail for tail in tails))
        return expanded

    def _tokenize(self, prompts: list[str], **kwargs: Any) -> list[list[int]]:
        rows = self.tokenizer(prompts, **kwargs).input_ids
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            wanted, got = prompt.count(self.audio_token), row.count(self.audio_token_id)
            if got != wanted:
                raise AudioError(f"prompt {i}: its audio takes {wanted} tokens, the tokenizer left {got}")
        return rows

    def _tails(self, answers: str | Sequence[str]) -> list[list[int]]:
        """Ids of each answer and the end token."""
        answers = _texts(answers, "answer")
        for i, answer in enumerate(answers):
            if self.audio_token in answer:
                raise AudioError(f"answer {i} has {self.audio_token}, audio belongs in the prompt")
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        return [ids + end for ids in self.tokenizer(answers, add_special_tokens=False).input_ids]

    def _flatten(self, messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], list[Any]]:
        """Messages with plain text contents, audio entries turned into audio tokens, and the clips in order."""
        flat, clips = [], []
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if not isinstance(content, str | list | tuple) or "role" not in message:
                raise ConfigError(f"a message needs a 'role' and a 'content' of text or parts, got {_outline(message)}")
            if not isinstance(content, str):
                clips += [_clip_of(part) for part in content if _type_of(part) == "audio"]
                content = "".join(self.audio_token if _type_of(part) == "audio" else part["text"] for part in content)
            flat.append({**message, "content": content})
        return flat, clips


def _texts(given: Any, name: str) -> list[str]:
    """One text or several as a list. Raises ConfigError, with the name of one, for anything else."""
    texts = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"{name} {i} must be a text, got {type(text).__name__}")
    return texts


def _listed(given: Any, expected: str) -> Any:
    """What was given, if it is a list or the like. Raises ConfigError, with what should be in it, for anything else."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"expected a list of {expected}, got {type(given).__name__}")
    return given


def _type_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "audio" and not (kind == "text" and isinstance(part.get("text"), str)):
        raise ConfigError(f"a message's part must be of type 'text', with a 'text', or 'audio', got {_outline(part)}")
    return kind


def _clip_of(part: dict[str, Any]) -> Any:
    for key in ("audio", "path", "url"):
        if part.get(key) is not None:
            return part[key]
    raise AudioError(f"an audio part of a message needs an 'audio' or a 'path', got {_outline(part)}")


def _outline(value: Any) -> str:
    """What errors show of a message or a part of one: its texts, and of the rest the keys alone."""
    if not isinstance(value, dict):
        return type(value).__name__
    return ", ".join(f"{key!r}: {item!r}" if isinstance(item, str) else repr(key) for key, item in value.items())


def _plain_prompt(messages: list[dict[str, str]], audio_token: str) -> str:
    """The conversation in the authors' form: audio between speech marks, then the instruction."""
    text = "\n".join(message["content"] for message in messages)
    count = text.count(audio_token)
    instruction = text.replace(audio_token, "").strip()
    return PAPER_PROMPT.format(audio=audio_token * count, instruction=instruction) if count else instruction


def _is_batch(audio: Any) -> bool:
    """Whether this is a list of clips rather than one clip (a list of numbers is one clip)."""
    return isinstance(audio, list | tuple) and not (audio and isinstance(audio[0], Real))


def _pad(rows: list[list[int]], value: int, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value, padding_side=side
    )


AutoFeatureExtractor.register(MoweConfig, MoweFeatureExtractor)
AutoProcessor.register(MoweConfig, MoweProcessor)
