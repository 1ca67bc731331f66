"""Where a mixture attaches to each AudioLLM of transformers: one entry a model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from operator import attrgetter
from typing import Any, Literal, get_args

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from mowe.errors import ConfigError

Fusion = Literal["concat", "residual"]
Rows = Literal["clips", "windows"]
PackedLengths = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class AudioLayout:
    """Where the audio features of a model are, and when their frames happen.

    tower: path of the audio encoder. projector: path of what maps its output to the language model, "" where the tower
        does that itself. language_model: path of the decoder. Paths are those of `model.get_submodule`.
    width: path in the model's configuration of the features' width, as in "audio_config.hidden_size".
    hop, offset: frame t of the features is centred on sample offset + t * hop of the 16 kHz waveform; hop may be a
        Fraction. 640 is 25 Hz.
    features: the module whose output (a tensor, or the first entry of an output of transformers) holds the features;
        by default the tower.
    rows: how they lie. "clips": [N, T, D], one row for each audio the feature extractor was given. "windows":
        [N, T, D], each audio cut into as many rows of T frames as it needs. Or packed, [sum of T, D], audio after
        audio: a function from the arguments of the tower's call to the frames of each audio, an integer tensor [N].
    linear: paths of the layers that first multiply the features, whose columns "concat" extends; several where the
        model chooses between them. Empty where the features pass through something else first: then only "residual".
    stack: how many frames lie side by side in one input of `linear`, or the path in the configuration that tells; where
        they do not come out even, the last of a row are filled up with zeros.
    inputs: what the model calls its audio input, a tensor with one entry for each row of features (or each audio).
    others: paths of further parts that are not the language model, such as an encoder of images.

    Raises ConfigError for a hop or rows that are none of these.
    """

    tower: str
    projector: str
    width: str
    hop: int | Fraction
    offset: int = 0
    features: str = ""
    rows: Rows | PackedLengths = "clips"
    linear: tuple[str, ...] = ()
    stack: int | str = 1
    inputs: str = "input_features"
    language_model: str = "model.language_model"
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.hop, Rational) or self.hop <= 0:
            raise ConfigError(f"hop must be a positive whole number of samples or a Fraction, got {self.hop!r}")
        if not (callable(self.rows) or self.rows in get_args(Rows)):
            raise ConfigError(f"rows must be {' or '.join(map(repr, get_args(Rows)))} or a function, got {self.rows!r}")

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """What can be done, best first."""
        return get_args(Fusion) if self.linear else ("residual",)

    def submodule(self, model: nn.Module, path: str) -> nn.Module:
        """The module at a path. Raises ConfigError where there is none."""
        try:
            return model.get_submodule(path)
        except AttributeError:
            raise ConfigError(
                f"{type(model).__name__} has no module {path!r}, which its layout names; a mixture attaches to the "
                "whole model with its language-model head, or by a layout of your own"
            ) from None

    def setting(self, model: PreTrainedModel, path: str) -> int:
        """The number at a path in the configuration. Raises ConfigError where there is none."""
        try:
            return attrgetter(path)(model.config)
        except AttributeError:
            raise ConfigError(f"{type(model.config).__name__} has no {path!r}, which its layout names") from None


def _qwen2_5_omni_lengths(call: Mapping[str, Any]) -> Tensor:
    return ((call["feature_lens"] - 1) // 2 + 1 - 2) // 2 + 1


def _thirteen_a_second(mel_frames: Tensor) -> Tensor:
    """Three convolutions of stride 2 over each second alone (100 mel frames): 13 frames for a whole one."""
    rest = mel_frames % 100
    for _ in range(3):
        rest = (rest + 1) // 2
    return mel_frames // 100 * 13 + rest


def _qwen3_asr_lengths(call: Mapping[str, Any]) -> Tensor:
    return _thirteen_a_second(call["input_features_mask"].sum(-1))


def _qwen3_omni_lengths(call: Mapping[str, Any]) -> Tensor:
    return _thirteen_a_second(call["feature_lens"])


_PROJECTOR = "model.multi_modal_projector"
_IMAGES = ("model.vision_tower", "model.embed_vision")


def _standard(**settings: Any) -> AudioLayout:
    """The names most models share."""
    shared = {"tower": "model.audio_tower", "projector": _PROJECTOR, "width": "audio_config.hidden_size"}
    return AudioLayout(**{**shared, **settings})


def _thinker(linear: str, **settings: Any) -> AudioLayout:
    """Of Qwen-Omni: transformers 5.21 moved its towers into its `model`, beside the language model."""
    inside = "model." if Version(transformers.__version__) >= Version("5.21") else ""
    return AudioLayout(
        tower=f"{inside}audio_tower",
        projector="",
        width="audio_config.d_model",
        features=f"{inside}audio_tower.ln_post",
        linear=(f"{inside}audio_tower.{linear}",),
        language_model="model.language_model" if inside else "model",
        others=(f"{inside}visual",),
        **settings,
    )


_FLAMINGO = _standard(hop=640, offset=160, linear=(f"{_PROJECTOR}.linear_1",))
_GRANITE = _standard(
    tower="model.encoder",
    projector="model.projector",
    width="projector_config.encoder_hidden_size",  # the plus model's tower gives several of its layers side by side
    hop=320,
    offset=80,
)
_MERALION = _standard(
    width="speech_config.d_model",
    hop=320,
    rows="windows",
    linear=(f"{_PROJECTOR}.adapter.mlp_adapter.0",),
    stack="speech_mlp_scale_factor",
)

LAYOUTS: dict[str, AudioLayout] = {
    "qwen2_audio": _standard(hop=640, offset=160, linear=(f"{_PROJECTOR}.linear",)),
    "audioflamingo3": _FLAMINGO,
    # Between its tower and its projector the features are rotated by their time; the mixture's are not.
    "musicflamingo": _FLAMINGO,
    "voxtral": _standard(hop=320, rows="windows", linear=(f"{_PROJECTOR}.linear_1",), stack=4),
    "glmasr": _standard(hop=320, linear=(f"{_PROJECTOR}.linear_1",), stack=4),
    "granite_speech": _GRANITE,
    "granite_speech_plus": _GRANITE,
    "qwen3_asr": _standard(
        hop=Fraction(16_000, 13),
        rows=_qwen3_asr_lengths,
        linear=(f"{_PROJECTOR}.linear_1",),
    ),
    "qwen2_5_omni_thinker": _thinker("proj", hop=640, offset=160, rows=_qwen2_5_omni_lengths),
    "qwen3_omni_moe_thinker": _thinker("proj1", hop=Fraction(16_000, 13), rows=_qwen3_omni_lengths),
    "phi4_multimodal": AudioLayout(
        tower="model.embed_tokens_extend.audio_embed.encoder",
        projector="model.embed_tokens_extend.audio_embed",
        width="audio_config.hidden_size",
        hop=1280,
        offset=200,
        linear=(
            "model.embed_tokens_extend.audio_embed.up_proj_for_speech",
            "model.embed_tokens_extend.audio_embed.up_proj_for_vision_speech",
        ),
        language_model="model.layers",
        inputs="audio_input_features",
        others=("model.embed_tokens_extend.image_embed",),
    ),
    # Its projection also serves the embeddings of single tokens: no columns can be added to it.
    "gemma3n": _standard(projector="model.embed_audio", hop=2560, others=_IMAGES),
    "gemma4": _standard(
        projector="model.embed_audio",
        width="audio_config.output_proj_dims",
        hop=640,
        linear=("model.embed_audio.embedding_projection",),
        others=_IMAGES,
    ),
    "fun_asr_nano": _standard(hop=960, offset=200, linear=(f"{_PROJECTOR}.linear_1",)),
    # Two towers, run in pieces and without gradients: the mixture joins behind the first layer of the second.
    "vibevoice_asr": AudioLayout(
        tower="model.semantic_tokenizer_encoder",
        projector=_PROJECTOR,
        width="text_config.hidden_size",
        hop=Fraction(6_400, 3),
        offset=1_067,
        features=f"{_PROJECTOR}.semantic_linear_1",
        inputs="input_values",
        others=("model.acoustic_tokenizer_encoder",),
    ),
    **dict.fromkeys(("meralion", "meralion2", "meralion3", "meralion3_asr"), _MERALION),
}


def layout_of(model: PreTrainedModel) -> AudioLayout:
    """The layout of a model's type. Raises ConfigError for one that has none."""
    model_type = model.config.model_type
    if model_type not in LAYOUTS:
        part = " (attach to its `thinker`)" if f"{model_type}_thinker" in LAYOUTS else ""
        raise ConfigError(
            f"models of type {model_type!r} are not supported{part}; supported: {', '.join(LAYOUTS)}; for another one "
            "describe where its audio features are: layout=mowe.AudioLayout(tower=..., projector=..., width=..., "
            "hop=...)"
        )
    return LAYOUTS[model_type]


def skip_modules(model_type: str) -> list[str]:
    """What bitsandbytes should leave alone, so that the language model is quantised and its encoders are not.

    For `BitsAndBytesConfig(..., llm_int8_skip_modules=mowe.skip_modules("voxtral"))`. By default only the output layer
    is skipped, and a list that is given replaces that default: it is in this one too. Of a model that takes a mixture
    in its `thinker`, nothing else is quantised.
    Raises ConfigError for a model type without a layout.
    """
    if f"{model_type}_thinker" in LAYOUTS:
        return [r"(?!thinker\.).*", *(f"thinker.{path}" for path in skip_modules(f"{model_type}_thinker"))]
    if model_type not in LAYOUTS:
        raise ConfigError(f"models of type {model_type!r} are not supported; supported: {', '.join(LAYOUTS)}")
    layout = LAYOUTS[model_type]
    return [path for path in (layout.tower, layout.projector, *layout.others) if path] + ["lm_head"]
