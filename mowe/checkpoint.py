"""Models and encoders from checkpoints, with nothing missing and nothing unread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import cached_file, logging

from mowe.audio import SAMPLING_RATE
from mowe.errors import CheckpointError, ConfigError, MoweError, naming
from mowe.families import family_class, find_encoder, hold_fixed
from mowe.features import HOP, N_FFT

_EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Only masks frames in self-supervised training; many fine-tuned checkpoints have lost it.
_UNUSED = "masked_spec_embed"


def load_pretrained_encoder(source: str | PathLike[str]) -> tuple[PreTrainedModel, Any]:
    """The encoder of a checkpoint folder or hub id, in float32, and its feature extractor (None where it has none).

    Any transformers model that holds a supported encoder will do; the rest of it is dropped.
    Raises CheckpointError for a folder that cannot be read, a corrupt file, or missing, surplus or misshapen encoder
    parameters; ConfigError for an encoder that no family can run.
    """
    source = str(source)
    with naming(source):
        check_source(source)
        with reading("config.json"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if quantization := getattr(config, "quantization_config", None):
            method = quantization.get("quant_method")
            raise CheckpointError(f"the encoder was quantised by {method!r}, expected full precision")
        family_class(config.model_type).signature(config, do_normalize=False)
        encoder, extractor = _load(source, config), _feature_extractor(source)
        normalizes(encoder, extractor)
    return encoder, extractor


def load_language_model(source: str) -> PreTrainedModel:
    """In the type it is stored in. Raises CheckpointError, naming the source."""
    with naming(source):
        check_source(source)
        model, info = read_model(AutoModelForCausalLM.from_pretrained, source)
        check_keys(info, "language model")
    return model


def normalizes(encoder: PreTrainedModel, extractor: Any) -> bool:
    """Whether a feature extractor (or a processor that has one) gives its encoder waves of unit variance.

    Raises ConfigError for an extractor that prepares something else than the encoder takes.
    """
    extractor = getattr(extractor, "feature_extractor", extractor)
    bins = getattr(encoder.config, "num_mel_bins", None)
    expected = {"sampling_rate": SAMPLING_RATE, "feature_size": bins or 1}
    if bins:
        expected |= {"hop_length": HOP, "n_fft": N_FFT}
    for name, value in expected.items():
        given = getattr(extractor, name, value)
        if given != value:
            raise ConfigError(f"the encoder takes features of {name} {value}, its feature extractor has {given!r}")
    return not bins and bool(getattr(extractor, "do_normalize", False))


def check_source(source: str, needed: str = "config.json") -> None:
    """Raise CheckpointError for what is neither a folder with the needed file nor the name of a hub repository."""
    if Path(source).is_dir():
        if not Path(source, needed).is_file():
            raise CheckpointError(f"the folder has no {needed}")
        return
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise CheckpointError("no such folder, and not the name of a hub repository") from None


def read_model(
    from_pretrained: Callable[..., Any], source: str | PathLike[str], *args: Any, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and what transformers says of its loading; raises CheckpointError where that fails."""
    with reading("the parameters"), _without_load_report():
        strict = {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, info = from_pretrained(source, *args, **{**kwargs, **strict})
    hold_fixed(model)
    return model, info


class StoredTensor:
    """A tensor of a safetensors file, read anew at every use and then held by nobody else.

    transformers maps its files: what has been read of them stays in memory as long as anything of the file is used.
    """

    def __init__(self, file: str, name: str):
        self.file, self.name = file, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as file:
            return file.get_slice(self.name)[index].clone()

    @staticmethod
    def all_of(files: Iterable[str]) -> dict[str, StoredTensor]:
        """Those of the files, by name."""
        tensors = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: StoredTensor(path, name) for name in file.keys()}  # noqa: SIM118
        return tensors


def check_keys(
    info: Mapping[str, Any], owner: str, prefixes: tuple[str, ...] = ("",), unused: str | None = None
) -> None:
    """Raise CheckpointError for parameters of the owner, under `prefixes`, that were missing, surplus or misshapen.

    unused: the end of a name that may be missing.
    """
    problems = {
        "missing": [key for key in info["missing_keys"] if unused is None or not key.endswith(unused)],
        "surplus": info["unexpected_keys"],
        "misshapen": [key for key, *_ in info["mismatched_keys"]],
    }
    for kind, keys in problems.items():
        keys = sorted(key for key in keys if key.startswith(prefixes))
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise CheckpointError(f"{kind} keys of the {owner}: {', '.join(keys[:4])}{more}")


def _load(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    model_class = _model_class(config)
    model, info = read_model(model_class.from_pretrained, source, config=config, dtype="float32")
    encoder = find_encoder(model)
    check_keys(info, "encoder", _prefixes(model, encoder, model_class), _UNUSED)
    return encoder.eval()


def _model_class(config: PreTrainedConfig) -> type:
    """The class that wrote a checkpoint, AutoModel where transformers does not have it."""
    name = (config.architectures or [""])[0]
    if name == "WhisperEncoder":  # not exported by transformers
        return WhisperEncoder
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
        return found
    return AutoModel


def _prefixes(model: PreTrainedModel, encoder: PreTrainedModel, model_class: type) -> tuple[str, ...]:
    """What the names of the encoder's parameters begin with in a checkpoint."""
    path = next(name for name, module in model.named_modules() if module is encoder)
    bases = ("", f"{model.base_model_prefix}.")
    if path:
        return tuple(f"{base}{path}." for base in bases)
    if model_class is not AutoModel:
        return ("",)
    # Beside the encoder lie the other parts of a class that transformers does not have.
    return tuple(f"{base}{part}." for base in bases for part, _ in encoder.named_children())


def _feature_extractor(source: str) -> Any:
    with reading(_EXTRACTOR_FILES[0]):
        files = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in _EXTRACTOR_FILES)
        return AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False) if any(files) else None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Make a CheckpointError of whatever transformers raises for a damaged file: anything, AttributeError included."""
    try:
        yield
    except (MoweError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot read {what}: {told}") from None


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from reporting what is raised here in one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
