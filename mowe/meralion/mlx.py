"""Checkpoints of the family as their MLX conversions have them, read without MLX.

A folder has `encoder.safetensors`, `adaptor.safetensors` and `decoder*.safetensors`, with a configuration each. Names
begin below the prefixes of the original checkpoint; convolutions are [out, kernel, in]; what lies in a Sequential is
under `.layers.`, without its Dropout; the position embedding is a bare array. A quantised weight is `weight`, uint32
with 32 / bits values each, the first in the lowest bits, beside `scales` and `biases`: in every group of `group_size`
inputs, value * scale + bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mowe.errors import CheckpointError

_BITS = (2, 4, 8)


def is_mlx(source: str) -> bool:
    """Whether a folder holds such a checkpoint, complete or not."""
    return Path(source, "encoder_config.json").is_file() or Path(source, "encoder.safetensors").is_file()


def read_mlx(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and parameters of an MLX folder, under the names of the family's original checkpoints.

    Quantised weights come out in the dtype of their scales; all parameters are in memory at once.
    Raises CheckpointError for parts that are missing or damaged and for a quantisation that is not known.
    """
    folder = Path(source)
    whole = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    whole.pop("quantization_config", None)  # a copy for mlx-lm, not one of transformers
    default = whole.pop("quantization", None)
    configs, state = {}, {}
    for part, rename in (("encoder", _encoder_item), ("adaptor", _adaptor_item), ("decoder", _decoder_item)):
        configs[part] = config = _json(folder / f"{part}_config.json")
        config.pop("quantization_config", None)
        tensors = _dequantized(_tensors(folder, part), config.pop("quantization", default))
        state |= dict(rename(name, value) for name, value in tensors.items())
    gated = any(".gate_proj." in name for name in state if name.startswith("speech_audio_adapter."))
    settings = {"model_type": "meralion2" if gated else "meralion", **whole}
    settings |= {"speech_config": configs["encoder"], "text_config": configs["decoder"]}
    if "scale_factor" in configs["adaptor"]:
        settings["speech_mlp_scale_factor"] = configs["adaptor"]["scale_factor"]
    return settings, state


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """An affine-quantised weight: [out, in] in the dtype of the scales.

    packed: uint32 [out, in * bits / 32]. scales, biases: [out, in / group size]. Computed in float32 and rounded once.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    values = (packed.view(torch.uint8)[..., None] >> shifts & (2**bits - 1)).flatten(1)
    grouped = values.unflatten(1, (scales.shape[1], -1)).float()
    return (grouped * scales.float()[..., None] + biases.float()[..., None]).flatten(1).to(scales.dtype)


def _dequantized(tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of a part, each packed weight replaced by the one it stands for."""
    result = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        quantized = f"{module}.scales" in tensors and f"{module}.biases" in tensors
        if value.dtype == torch.uint32:
            if not quantized:
                raise CheckpointError(f"{name} is packed but has no scales and biases: unknown quantisation")
            scales, biases = tensors[f"{module}.scales"], tensors[f"{module}.biases"]
            bits = _check(name, value, scales, biases, quantization)
            result[name] = dequantize(value, scales, biases, bits)
        elif not (quantized and kind in ("scales", "biases")):
            result[name] = value
    return result


def _check(name: str, packed: Tensor, scales: Tensor, biases: Tensor, quantization: dict[str, Any] | None) -> int:
    """Bits of a packed weight whose shapes are those its part's configuration tells of."""
    told = quantization if isinstance(quantization, dict) else {}
    bits, group_size, mode = told.get("bits"), told.get("group_size"), told.get("mode", "affine")
    if mode != "affine" or bits not in _BITS or not isinstance(group_size, int) or group_size < 1:
        known = f"affine with {', '.join(map(str, _BITS))} bits and a group_size"
        raise CheckpointError(f"{name} has unknown quantisation {quantization}; known: {known}")
    groups, rest = divmod(packed.shape[-1] * 32 // bits, group_size)
    expected = (*packed.shape[:-1], groups)
    if packed.dim() != 2 or rest or not expected == tuple(scales.shape) == tuple(biases.shape):
        raise CheckpointError(
            f"{name}: packed {list(packed.shape)} with scales {list(scales.shape)} and biases {list(biases.shape)} "
            f"is not {bits}-bit in groups of {group_size}"
        )
    return bits


def _encoder_item(name: str, value: Tensor) -> tuple[str, Tensor]:
    if name == "embed_positions":
        name = "embed_positions.weight"
    elif name in ("conv1.weight", "conv2.weight"):
        value = value.transpose(1, 2).contiguous()
    return f"speech_encoder.{name}", value


def _adaptor_item(name: str, value: Tensor) -> tuple[str, Tensor]:
    if name.startswith("ln_speech."):
        return name, value
    # Without the Dropout between them, the last Linear is one place further to the front.
    name = name.replace("speech_llm_proj.layers.2.", "speech_llm_proj.layers.3.")
    return f"speech_audio_adapter.{name.replace('.layers.', '.')}", value


def _decoder_item(name: str, value: Tensor) -> tuple[str, Tensor]:
    return f"text_decoder.{name}", value


def _tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a part, of one file or several."""
    index = folder / f"{part}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in folder.glob(f"{part}*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name in names or [f"{part}.safetensors"]:
        if not (folder / name).is_file():
            raise CheckpointError(f"the folder has no {name}")
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name}: {error}") from None
    return tensors


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"the folder has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"cannot read {path.name}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path.name}: expected an object, got {type(content).__name__}")
    return content
