"""Adapter folders: pool, routers, fusion and configuration of a mixture, without the model they are attached to."""

from __future__ import annotations

import json
import re
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mowe.attach.configuration import AdapterConfig
from mowe.attach.layouts import AudioLayout
from mowe.attach.mixture import AttachedMixture
from mowe.attach.model import Model, attached_of, check_attachable, join, measure
from mowe.checkpoint import check_keys, read_model, reading
from mowe.errors import CheckpointError, ConfigError, naming
from mowe.files import make_folder, whole_file, write_text
from mowe.pool import EncoderPool

CONFIG_FILE = "mowe_config.json"
WEIGHTS_FILE = "mowe_model.safetensors"
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
_PREFIX = "mowe."


def save_adapter(model: nn.Module, save_directory: str | PathLike[str]) -> None:
    """Write the mixture of a model, which may be wrapped (peft, DistributedDataParallel), into a folder.

    Each file is there as a whole or not at all. Raises ConfigError for a model without a mixture, for one
    whose pool is in 4 bits, and where the system refuses to write.
    """
    mixture = attached_of(model).mowe
    check_full_precision(mixture)
    folder = make_folder(save_directory, "the adapter's folder")
    tensors = {name: tensor.detach().contiguous() for name, tensor in mixture.state_dict().items()}
    with whole_file(folder / WEIGHTS_FILE, "the adapter") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_config(mixture.config, folder)


def save_beside_model(model: PreTrainedModel, save_directory: str | PathLike[str]) -> None:
    """Write what transformers left out when it saved a model with a mixture into a folder."""
    if model._hf_peft_config_loaded:  # then it saved the adapters of peft alone
        save_adapter(model, save_directory)
    else:
        # That of an earlier mixture would be read in place of the one among the model's parameters.
        Path(save_directory, WEIGHTS_FILE).unlink(missing_ok=True)
        write_config(model.mowe.config, save_directory)


def check_full_precision(mixture: AttachedMixture) -> None:
    """Raise ConfigError for a mixture whose pool is in 4 bits, which no file of it could give back."""
    if mixture.pool.quantized:
        raise ConfigError("the mixture's pool is in 4 bits; save it in full precision, and quantise what is loaded")


def write_config(config: AdapterConfig, save_directory: str | PathLike[str]) -> None:
    """Write the configuration of an adapter."""
    write_text(Path(save_directory) / CONFIG_FILE, config.to_json_string(), "the adapter")


def attach_from(model: Model, source: str | PathLike[str], *, layout: AudioLayout | None = None) -> Model:
    """Attach the mixture of an adapter folder, or of a folder that a whole model with a mixture was saved in.

    model: an AudioLLM of the kind the mixture was made for; changed in place, given back. layout: the one it was
    attached with, if that was not the library's own.
    Raises CheckpointError for a folder that cannot be read or does not fit the model, which is then left as it was, and
    ConfigError for a model that cannot take a mixture.
    """
    layout = check_attachable(model, layout)
    folder = Path(source)
    with naming(str(source)):
        config = _read_config(folder)
        _check_fit(config, model, layout)
        mixture = AttachedMixture(config, EncoderPool(config.pool_config), layout)
        _load(mixture, _read_weights(folder))
    return join(model, mixture)


def load_attached(source: str | PathLike[str], *, layout: AudioLayout | None = None, **kwargs: Any) -> PreTrainedModel:
    """A whole model that was saved with its mixture (`model.save_pretrained(folder)`).

    kwargs: for transformers' from_pretrained (dtype, device_map, quantization_config, ...), which loads the model that
    the mixture is then attached to. Raises CheckpointError for a folder that cannot be read.
    """
    with naming(str(source)):
        _read_config(Path(source))
        with reading("config.json"):
            names = json.loads(Path(source, "config.json").read_text()).get("architectures") or [""]
        model_class = _model_class(names[0])
        model, info = read_model(model_class.from_pretrained, source, **kwargs)
        check_keys(info, "model")
        model.__class__ = model_class.__mro__[1]
    return attach_from(model, source, layout=layout)


def _model_class(name: str) -> type[PreTrainedModel]:
    """A class by its name, in transformers or here, that reads past the parameters of the mixture."""
    found = getattr(transformers, name, None) or getattr(import_module("mowe.meralion"), name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"config.json names the architecture {name!r}, which is no model of transformers")
    ignored = [*(found._keys_to_ignore_on_load_unexpected or ()), rf"^{re.escape(_PREFIX)}"]
    return type(name, (found,), {"_keys_to_ignore_on_load_unexpected": ignored, "__module__": found.__module__})


def _read_config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"no folder of an adapter: there is no {CONFIG_FILE}")
    with reading(CONFIG_FILE):
        entries = json.loads(path.read_text())
        if not isinstance(entries, dict) or entries.get("model_type") != AdapterConfig.model_type:
            raise CheckpointError(f"{CONFIG_FILE} is not the configuration of an adapter")
        return AdapterConfig(**{key: value for key, value in entries.items() if key != "model_type"})


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Parameters of the mixture by their names in it, from an adapter's file or from among those of a whole model."""
    if (folder / WEIGHTS_FILE).is_file():
        with reading(WEIGHTS_FILE):
            return load_file(folder / WEIGHTS_FILE)
    whole, index = (folder / name for name in _MODEL_FILES)
    with reading("the parameters"):
        if whole.is_file():
            files = {whole.name}
        elif index.is_file():
            weights = json.loads(index.read_text())["weight_map"]
            files = {file for key, file in weights.items() if key.startswith(_PREFIX)}
        else:
            raise CheckpointError(f"there is neither a {WEIGHTS_FILE} nor a {whole.name}")
        tensors = {}
        for file in sorted(files):
            with safe_open(folder / file, framework="pt") as opened:
                keys = [key for key in opened.keys() if key.startswith(_PREFIX)]  # noqa: SIM118
                tensors.update({key.removeprefix(_PREFIX): opened.get_tensor(key) for key in keys})
    return tensors


def _check_fit(config: AdapterConfig, model: PreTrainedModel, layout: AudioLayout) -> None:
    if config.fusion not in layout.fusions:
        raise CheckpointError(f"made with fusion {config.fusion!r}, which this model does not allow")
    words = {
        "base_model_type": "a model of type",
        "base_width": "audio features of width",
        "fusion_width": "a fusion of width",
        "fusion_stack": "frames stacked by",
    }
    for name, value in measure(model, layout, config.fusion).items():
        made_for = getattr(config, name)
        if made_for != value:
            raise CheckpointError(f"made for {words[name]} {made_for!r}, this model has {value!r}")


@torch.no_grad()
def _load(mixture: AttachedMixture, tensors: dict[str, Tensor]) -> None:
    own = mixture.state_dict()
    info = {
        "missing_keys": own.keys() - tensors.keys(),
        "unexpected_keys": tensors.keys() - own.keys(),
        "mismatched_keys": [(key,) for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape],
    }
    check_keys(info, "mixture")
    # The dtype of the file, until the model's is known.
    mixture.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
