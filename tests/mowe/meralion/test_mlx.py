"""MLX checkpoints: the documented layout, checked without and against the real package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mowe.errors import CheckpointError
from mowe.meralion import MeralionForConditionalGeneration
from mowe.meralion.mlx import dequantize, read_mlx
from tests.mowe.encoders import assert_same
from tests.mowe.meralion.family import SPEECH_TOKEN, config_dict, logits, state_dict

GROUP = 32
Quantizer = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def quantize8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed values, scales and biases of 8 bits, written from the documented layout."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - low) / 255).half().float()
    values = ((groups - low) / step).round().clamp(0, 255).flatten(1).long().unflatten(1, (-1, 4))
    packed = values[..., 0] | values[..., 1] << 8 | values[..., 2] << 16 | values[..., 3] << 24
    return packed.to(torch.uint32), step[..., 0].half(), low[..., 0].half()


def convert(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], quantize: Quantizer | None = None, **told: Any
) -> Path:
    """Write an MLX folder: fp16, the decoder's linear layers quantised where a quantiser is given."""
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "adaptor": {}, "decoder": {}}
    for name, value in state.items():
        value = value.half()
        if name.startswith("speech_encoder."):
            name = name.removeprefix("speech_encoder.")
            name = "embed_positions" if name == "embed_positions.weight" else name
            value = value.permute(0, 2, 1) if name in ("conv1.weight", "conv2.weight") else value
            parts["encoder"][name] = value.contiguous()
        elif name.startswith("text_decoder."):
            name = name.removeprefix("text_decoder.")
            if quantize and name.endswith("_proj.weight"):
                module = name.removesuffix(".weight")
                packed = dict(zip(("weight", "scales", "biases"), quantize(value), strict=True))
                parts["decoder"] |= {f"{module}.{kind}": tensor for kind, tensor in packed.items()}
            else:
                parts["decoder"][name] = value
        else:
            name = name.removeprefix("speech_audio_adapter.")
            name = name.replace("mlp_adapter.", "mlp_adapter.layers.")
            name = name.replace("speech_llm_proj.0", "speech_llm_proj.layers.0")
            parts["adaptor"][name.replace("speech_llm_proj.3", "speech_llm_proj.layers.2")] = value
    decoder = dict(config["text_config"])
    if quantize:
        decoder["quantization"] = {"bits": 8, "group_size": GROUP, **told}
    adaptor = {"scale_factor": config["speech_mlp_scale_factor"], "speech_hidden_size": 16, "text_hidden_size": 32}
    configs = {"encoder": config["speech_config"], "adaptor": adaptor, "decoder": decoder}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for part, tensors in parts.items():
        save_file(tensors, folder / f"{part}.safetensors")
        (folder / f"{part}_config.json").write_text(json.dumps(configs[part]))
    return folder


def load(folder: Path, **settings: Any) -> MeralionForConditionalGeneration:
    return MeralionForConditionalGeneration.from_pretrained(folder, **settings).eval()


def written(folder: Path, model_type: str = "meralion2", quantize: Quantizer | None = None, **told: Any) -> Path:
    config = config_dict(model_type)
    return convert(folder, config, state_dict(config), quantize, **told)


@pytest.mark.parametrize("model_type", ["meralion", "meralion2", "meralion3_asr"])
def test_half_precision_folders(tmp_path: Path, model_type: str) -> None:
    config = config_dict(model_type)
    state = {name: value.half().float() for name, value in state_dict(config).items()}
    convert(tmp_path, config, state)
    _, read = read_mlx(str(tmp_path))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name].float(), state[name]) for name in state)
    model, info = MeralionForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()) and model.config.model_type == model_type
    ids, features = torch.tensor([[256, *[SPEECH_TOKEN] * 4, 5, 6]]), torch.randn(1, 80, 120)
    with torch.no_grad():
        assert_same(model.eval()(ids, features).logits, logits(state, ids, features))
    assert model.generation_config.no_repeat_ngram_size == 6


@pytest.mark.parametrize("model_type", ["meralion", "meralion2"])
def test_the_parts_configurations_are_enough(tmp_path: Path, model_type: str) -> None:
    (written(tmp_path, model_type, quantize8) / "config.json").unlink()
    settings, _ = read_mlx(str(tmp_path))
    config = config_dict(model_type)
    names = ("model_type", "speech_config", "text_config", "speech_mlp_scale_factor")
    assert settings == {name: config[name] for name in names}


def test_quantised_folders(tmp_path: Path) -> None:
    _, read = read_mlx(str(written(tmp_path, quantize=quantize8)))
    state = state_dict(config_dict("meralion2"))
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == torch.float16
        step = (value.amax() - value.amin()) / 255
        limit = step if "_proj.weight" in name and name.startswith("text_decoder") else 1e-3
        assert (read[name].float() - value).abs().max() <= limit
    model = load(tmp_path)
    assert torch.equal(
        model.language_model.layers[1].mlp.down_proj.weight,
        read["text_decoder.model.layers.1.mlp.down_proj.weight"].to(model.dtype),
    )
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_sharded_decoders(tmp_path: Path) -> None:
    whole = read_mlx(str(written(tmp_path, quantize=quantize8)))[1]
    tensors = load_file(tmp_path / "decoder.safetensors")
    (tmp_path / "decoder.safetensors").unlink()
    names, index = sorted(tensors), {}
    for i in range(2):
        file = f"decoder-{i:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / file)
        index |= dict.fromkeys(names[i::2], file)
    for indexed in (False, True):
        if indexed:
            (tmp_path / "decoder.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        state = read_mlx(str(tmp_path))[1]
        assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    (tmp_path / "decoder-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the folder has no decoder-00001\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("bits", "words", "values"),
    [
        (8, [0x03020100, 0xFF00FE80], [0, 1, 2, 3, 0x80, 0xFE, 0, 0xFF]),
        (4, [0x76543210], [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, [0xE4E4], [0, 1, 2, 3] * 2 + [0] * 8),
    ],
)
def test_bits_of_a_word(bits: int, words: list[int], values: list[int]) -> None:
    packed = torch.tensor([words], dtype=torch.int64).to(torch.uint32)
    scales, biases = torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, 3.0]])
    half = len(values) // 2
    expected = [0.5 * v - 1 for v in values[:half]] + [2.0 * v + 3 for v in values[half:]]
    assert dequantize(packed, scales, biases, bits).tolist() == [expected]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_dequantises_as_mlx_does(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs the mlx package")
    weight = mx.random.normal((24, 256), key=mx.random.key(bits + group))
    for dtype, tolerance in ((mx.float32, 1e-6), (mx.float16, 2e-3)):
        packed, scales, biases = mx.quantize(weight.astype(dtype), group_size=group, bits=bits)
        theirs = mx.dequantize(packed, scales, biases, group_size=group, bits=bits)
        ours = dequantize(*(torch.from_numpy(_numpy(array)) for array in (packed, scales, biases)), bits)
        assert str(ours.dtype).removeprefix("torch.") == str(dtype).removeprefix("mlx.core.")
        assert_same(ours.float(), torch.from_numpy(_numpy(theirs)).float(), tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_reads_what_mlx_writes(tmp_path: Path, bits: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs the mlx package")
    nn = pytest.importorskip("mlx.nn", reason="needs the mlx package")

    def quantize(weight: Tensor) -> tuple[Tensor, ...]:
        arrays = mx.quantize(mx.array(weight.numpy()), group_size=GROUP, bits=bits)
        return tuple(torch.from_numpy(_numpy(array)) for array in arrays)

    written(tmp_path, quantize=quantize, bits=bits)
    for part in ("encoder", "adaptor", "decoder"):
        file = str(tmp_path / f"{part}.safetensors")
        arrays = mx.load(file)
        mx.eval(list(arrays.values()))
        mx.save_safetensors(file, arrays, {"format": "mlx"})
    _, state = read_mlx(str(tmp_path))

    # The same parameters in mlx's own modules.
    arrays = mx.load(str(tmp_path / "encoder.safetensors"))
    conv = nn.Conv1d(80, 16, 3, padding=1)
    conv.load_weights([(kind, arrays[f"conv1.{kind}"]) for kind in ("weight", "bias")])
    mel = torch.randn(1, 80, 40)
    theirs = torch.from_numpy(_numpy(conv(mx.array(mel.transpose(1, 2).contiguous().numpy())))).transpose(1, 2)
    weight, bias = (state[f"speech_encoder.conv1.{kind}"].float() for kind in ("weight", "bias"))
    assert_same(torch.nn.functional.conv1d(mel, weight, bias, padding=1), theirs.float(), 5e-3)

    arrays = mx.load(str(tmp_path / "decoder.safetensors"))
    module = "model.layers.0.mlp.up_proj"
    linear = nn.QuantizedLinear(32, 64, bias=False, group_size=GROUP, bits=bits)
    linear.load_weights([(kind, arrays[f"{module}.{kind}"]) for kind in ("weight", "scales", "biases")])
    h = torch.randn(5, 32)
    theirs = torch.from_numpy(_numpy(linear(mx.array(h.numpy())))).float()
    assert_same(h @ state[f"text_decoder.{module}.weight"].float().T, theirs, 5e-3)


def _numpy(array: Any) -> np.ndarray:
    return np.array(array)


@pytest.mark.parametrize(
    "name",
    ["encoder.safetensors", "adaptor.safetensors", "decoder.safetensors", "adaptor_config.json", "decoder_config.json"],
)
def test_missing_parts_are_named(tmp_path: Path, name: str) -> None:
    (written(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=f"the folder has no {name}") as error:
        load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["encoder.safetensors", "decoder.safetensors", "adaptor_config.json", "config.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    file = written(tmp_path) / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=f"cannot read {name}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"bits": 3}, "unknown quantisation .*'bits': 3.*; known: affine with 2, 4, 8 bits"),
        ({"mode": "mxfp4"}, "unknown quantisation .*mxfp4"),
        ({"group_size": None}, "unknown quantisation"),
        ({"group_size": 64}, r"_proj.weight: packed \[.*\] is not 8-bit in groups of 64"),
        ({"bits": 4}, "is not 4-bit in groups of 32"),
    ],
)
def test_unknown_quantisation_is_named(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    written(tmp_path, quantize=quantize8, **told)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_packed_weights_need_their_scales(tmp_path: Path) -> None:
    written(tmp_path, quantize=quantize8)
    tensors = load_file(tmp_path / "decoder.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.scales")
    save_file(tensors, tmp_path / "decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight is packed but has no scales and biases"):
        load(tmp_path)
    tensors = {name: value for name, value in tensors.items() if "up_proj" not in name}
    save_file(tensors, tmp_path / "decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"missing keys of the model: .*up_proj"):
        load(tmp_path)
