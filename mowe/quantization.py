"""Models in 4 bits: the language model by bitsandbytes, base encoder and pool in grouped NF4, the rest as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mowe.configuration_mowe import MoweConfig
from mowe.errors import CheckpointError, ConfigError, naming
from mowe.families.nf4 import Nf4StackedLinear, quantize_linear
from mowe.families.stacked import StackedLinear
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.pool import EncoderPool
from mowe_kernels import nf4_quantize
from mowe_kernels.nf4 import NESTED_BLOCKSIZE

METHOD = "mowe_nf4"
PARTS = ("language_model", "audio_tower", "pool", "lm_head")
DEFAULT_PARTS = PARTS[:3]
_PATHS = {
    "language_model": "model.language_model",
    "audio_tower": "model.audio_tower",
    "pool": "model.mixture.pool",
}
_COMPUTES_IN = {torch.float32, torch.float16, torch.bfloat16}

Quantizable = TypeVar("Quantizable", EncoderPool, MoweForConditionalGeneration)


@register_quantization_config(METHOD)
class MoweQuantizationConfig(QuantizationConfigMixin):
    """Which parts of a model are in 4 bits, and how.

    parts: of `PARTS`. Routers, norms, convolutions and the projector stay as they are; the head of the language model
    too, unless "lm_head" is named. double_quant: whether the scales are quantised as well. quant_type: "nf4" or "fp4"
    for the language model; the encoders are always in nf4. compute_dtype: that of the language model's products, the
    model's own by default. skip_modules: further modules of the language model to leave alone, beside these rules.
    """

    def __init__(
        self,
        parts: Sequence[str] = DEFAULT_PARTS,
        double_quant: bool = True,
        quant_type: str = "nf4",
        compute_dtype: str | None = None,
        skip_modules: Sequence[str] = (),
        quant_method: str = METHOD,
    ):
        unknown = sorted(set(parts) - set(PARTS))
        if unknown or not parts:
            raise ConfigError(f"parts to quantise must be among {', '.join(PARTS)}, got {unknown or 'none'}")
        if quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
        self.quant_method = quant_method
        self.parts, self.skip_modules = list(parts), list(skip_modules)
        self.double_quant, self.quant_type, self.compute_dtype = double_quant, quant_type, compute_dtype

    @classmethod
    def from_bits_and_bytes(cls, config: BitsAndBytesConfig) -> MoweQuantizationConfig:
        """What a BitsAndBytesConfig asks for. Its list of modules to skip adds to our rules instead of replacing them.

        A part that it names stays as it is. Raises ConfigError for 8 bits, and for another storage than bytes.
        """
        if not config.load_in_4bit:
            raise ConfigError("quantization_config: expected load_in_4bit=True, 8-bit models are not supported")
        if config.bnb_4bit_quant_storage != torch.uint8:
            storage = config.bnb_4bit_quant_storage
            raise ConfigError(f"quantization_config: expected bnb_4bit_quant_storage torch.uint8, got {storage}")
        named, skipped = config.bnb_4bit_compute_dtype, config.llm_int8_skip_modules or ()
        return cls(
            [part for part in DEFAULT_PARTS if not any(f".{name}." in f".{_PATHS[part]}." for name in skipped)],
            double_quant=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            compute_dtype=None if named == torch.float32 else str(named).removeprefix("torch."),
            skip_modules=skipped,
        )

    def bits_and_bytes(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """The part of it that is bitsandbytes'."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=self.compute_dtype or dtype,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
        )


@register_quantizer(METHOD)
class MoweQuantizer(Bnb4BitHfQuantizer):
    """How transformers loads and saves a model that is described by a MoweQuantizationConfig.

    A model in full precision is quantised while it is read, tensor by tensor.
    """

    @property
    def is_qat_trainable(self) -> bool:
        """Routers, projector and whatever is not in 4 bits learn, with adapters or without."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Everything needed is a dependency."""

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        tied = getattr(model.language_model.config, "tie_word_embeddings", False)
        if "lm_head" in config.parts and tied and not self.pre_quantized:
            raise ConfigError(
                "lm_head has the weights of the embeddings, which stay as they are; load the model without it, then "
                "mowe.quantize(model, parts=['lm_head'])"
            )
        _replace_linears(model, config, pre_quantized=self.pre_quantized)
        if self.pre_quantized:
            _quantize_audio(model, config)
        # transformers takes any shape where there is a quantizer.
        self._expected = {name: value for name, value in model.state_dict().items() if not _packed(model, name)}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, kind = param_name.rpartition(".")
        if kind == "weight" and isinstance(model.get_submodule(path), StackedLinear):
            return any(path.startswith(f"{prefix}.") for prefix in _audio_parts(self.quantization_config))
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self.quantization_config.double_quant)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _check_loaded(model, self._expected, self.quantization_config)
        # What transformers would undo before saving, and cannot: the layers write what they were read from.
        model._weight_conversions = [c for c in model._weight_conversions if not isinstance(c, WeightConverter)]
        return _finish(super()._process_model_after_weight_loading(model, **kwargs))


class _QuantizeOnLoad(ConversionOps):
    """Puts a layer in 4 bits as soon as its weight has been read."""

    def __init__(self, double_quant: bool):
        self.double_quant = double_quant

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **kwargs: Any) -> Any:
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        path = name.rpartition(".")[0]
        layer = model.get_submodule(path)
        if not isinstance(layer, StackedLinear):
            layer._is_hf_initialized = True
            return {name: _four_bit(layer, value.T if issubclass(layer.source_cls, Conv1D) else value)}
        if value.shape != layer.weight.shape:
            return input_dict  # refused when everything has been read
        layer.weight = nn.Parameter(value, requires_grad=False)
        quantize_linear(model, path, layer, self.double_quant)
        missing_keys.discard(name)
        return {}


def quantize(
    model: Quantizable,
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    double_quant: bool = True,
    skip_modules: Sequence[str] = (),
) -> Quantizable:
    """Put a pool, or the parts of a model, in 4 bits, in place; returns it.

    model: an EncoderPool or a MoweForConditionalGeneration, of which other parts may be in 4 bits already. parts,
    double_quant, skip_modules: see MoweQuantizationConfig; a pool has no parts, and `from_parts` takes none in 4 bits.
    Raises ConfigError for another module, for what is already quantised, has adapters, or is of a type that cannot be.
    """
    if not isinstance(model, EncoderPool | MoweForConditionalGeneration):
        raise ConfigError(
            f"expected an EncoderPool or a MoweForConditionalGeneration, got {type(model).__name__}; another model is "
            "loaded in 4 bits, by its quantization_config, before a mixture is attached"
        )
    before = getattr(model.config, "quantization_config", None)
    pool = model if isinstance(model, EncoderPool) else model.model.mixture.pool
    if (pool.quantized and before is None) or (before and set(parts) & set(before.parts)):
        raise ConfigError(f"the {type(model).__name__} is already quantised")
    if before and before.double_quant != double_quant:
        raise ConfigError(f"double_quant is {before.double_quant} in the parts already quantised, got {double_quant}")
    unknown = {p.dtype for p in model.parameters() if p.is_floating_point()} - _COMPUTES_IN
    if unknown:
        raise ConfigError(f"expected parameters in float32, float16 or bfloat16, got {', '.join(map(str, unknown))}")
    if isinstance(model, EncoderPool):
        _quantize_stacks(model, double_quant)
        return model
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError("the model has adapters; quantise it before they are added")
    language = {"quant_type": before.quant_type, "compute_dtype": before.compute_dtype} if before else {}
    config = MoweQuantizationConfig(parts, double_quant, **language, skip_modules=skip_modules)
    _fill(model.language_model, _replace_linears(model, config, pre_quantized=False))
    _quantize_audio(model, config)
    if before:
        before.parts += config.parts
        before.skip_modules += config.skip_modules
        return _finish(model)
    model.hf_quantizer = MoweQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.quantization_method, model.is_loaded_in_4bit, model.is_4bit_serializable = METHOD, True, True
    return _finish(model)


def with_quantization(source: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of from_pretrained with transformers told of our quantisation, where the model has one."""
    where = ("subfolder", "revision", "cache_dir", "local_files_only", "token", "force_download")
    stored: dict[str, Any] = {}
    if source is not None:
        stored, _ = MoweConfig.get_config_dict(source, **{name: settings[name] for name in where if name in settings})
    stored, asked = stored.get("quantization_config"), settings.get("quantization_config")
    if stored is None and asked is None:
        return settings
    check_method(stored)
    if isinstance(asked, dict):
        asked = AutoQuantizationConfig.from_dict(asked)
    if isinstance(asked, BitsAndBytesConfig):
        asked = MoweQuantizationConfig.from_bits_and_bytes(asked)
    if asked is not None and not isinstance(asked, MoweQuantizationConfig):
        raise ConfigError(
            "quantization_config: expected a MoweQuantizationConfig or a BitsAndBytesConfig, got "
            f"{type(asked).__name__}"
        )
    return {**settings, "quantization_config": asked}


def check_method(quantization: Any) -> None:
    """Raise CheckpointError for a checkpoint that something else quantised."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method != METHOD:
        raise CheckpointError(f"the checkpoint was quantised by {method!r}, expected {METHOD!r}")


def _audio_parts(config: MoweQuantizationConfig) -> list[str]:
    """Names of the modules that hold the chosen encoders."""
    return [_PATHS[part] for part in ("audio_tower", "pool") if part in config.parts]


def _quantize_audio(model: nn.Module, config: MoweQuantizationConfig) -> None:
    for path in _audio_parts(config):
        _quantize_stacks(model.get_submodule(path), config.double_quant)


def _quantize_stacks(module: nn.Module, double_quant: bool) -> None:
    for name, linear in list(module.named_modules()):
        if isinstance(linear, StackedLinear):
            quantize_linear(module, name, linear, double_quant)


def _replace_linears(model: nn.Module, config: MoweQuantizationConfig, pre_quantized: bool) -> dict[str, nn.Module]:
    """Put bitsandbytes' layers, still empty, in the language model; returns those that were there.

    Only names inside of the language model are looked at, so that a list of modules to skip cannot uncover the others.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # seconds to import

    language_model = model.language_model
    chosen = {"language_model": "language_model" in config.parts, "lm_head": "lm_head" in config.parts}
    head = language_model.get_output_embeddings()
    keep = [name.removeprefix("model.").removeprefix("language_model.") for name in config.skip_modules]
    before = {}
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            before[name] = module
            if not chosen["lm_head" if module is head else "language_model"]:
                keep.append(name)
    if any(chosen.values()):
        settings = config.bits_and_bytes(model.dtype)
        replace_with_bnb_linear(language_model, keep, settings, pre_quantized=pre_quantized)
    return before


def _fill(language_model: nn.Module, before: dict[str, nn.Module]) -> None:
    from bitsandbytes.nn import Linear4bit

    for name, old in before.items():
        new = language_model.get_submodule(name)
        if isinstance(new, Linear4bit) and new is not old:
            new.weight = _four_bit(new, old.weight.data.T if isinstance(old, Conv1D) else old.weight.data)
            new.bias = old.bias


def _four_bit(layer: nn.Module, values: torch.Tensor) -> nn.Parameter:
    """The weight of a Linear4bit; on the CPU our own code makes the same bits, faster and without large temporaries."""
    from bitsandbytes.nn import Params4bit

    settings = layer.weight.__dict__
    if values.device.type != "cpu" or settings["quant_type"] != "nf4":
        return Params4bit(values, requires_grad=False, **settings).to(values.device)
    quantized = nf4_quantize(values[None], settings["blocksize"], settings["compress_statistics"])
    data, state = quantized.quant_state(0)
    return Params4bit.from_prequantized(data, state, device="cpu", module=layer)


def _finish(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes' CPU path from repacking weights at the first use: it rounds their scales to bfloat16."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def _packed(model: nn.Module, name: str) -> bool:
    """Whether a tensor is a weight of bitsandbytes, whose shape before loading says nothing."""
    from bitsandbytes.nn import Linear4bit

    path, _, kind = name.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(path), Linear4bit)


def _check_loaded(model: nn.Module, expected: dict[str, torch.Tensor], config: MoweQuantizationConfig) -> None:
    """Raise CheckpointError for tensors of another shape than the model's, and for another quantisation."""
    from bitsandbytes.nn import Linear4bit

    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in expected.items():
        if name not in loaded:
            continue
        if loaded[name].shape != value.shape:
            raise CheckpointError(f"{name} must have sizes {list(value.shape)}, got {list(loaded[name].shape)}")
        if loaded[name].dtype != value.dtype and not value.is_floating_point():
            raise CheckpointError(f"{name} must be {value.dtype}, got {loaded[name].dtype}")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            with naming(name):
                _check_linear(module, config)
        elif (
            isinstance(module, Nf4StackedLinear)
            and config.double_quant
            and not all(map(_is_dynamic, module.nested_code))
        ):
            raise CheckpointError(f"{name} has a code table of its scales that is not the dynamic one")


def _check_linear(layer: nn.Module, config: MoweQuantizationConfig) -> None:
    """Raise CheckpointError unless a loaded Linear4bit holds what its sizes and the configuration ask for."""
    from bitsandbytes.functional import get_4bit_type

    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise CheckpointError("it is not quantised in the checkpoint")
    kind, sizes = config.quant_type, (layer.out_features, layer.in_features)
    if state.quant_type != kind:
        raise CheckpointError(f"it is in {state.quant_type}, expected {kind} as the configuration says")
    if state.nested != config.double_quant:
        said = "has" if config.double_quant else "has no"
        raise CheckpointError(f"the configuration says that it {said} double quantisation, its tensors do not")
    if not torch.equal(state.code.cpu(), get_4bit_type(kind, device="cpu")):
        raise CheckpointError(f"its code table is not that of {kind}")
    if tuple(state.shape) != sizes:
        raise CheckpointError(f"it must be of sizes {list(sizes)}, got {list(state.shape)}")
    count = sizes[0] * sizes[1]
    if layer.weight.numel() * layer.weight.itemsize != (count + 1) // 2:
        raise CheckpointError(f"it must have {(count + 1) // 2} bytes of codes, got {layer.weight.numel()}")
    blocks, absmax = -(-count // state.blocksize), state.absmax
    if absmax.numel() != blocks or absmax.dtype != (torch.uint8 if state.nested else torch.float32):
        raise CheckpointError(f"it must have a scale every {state.blocksize} values, got {absmax.numel()}")
    if not state.nested:
        return
    nested = state.state2
    if nested.blocksize != NESTED_BLOCKSIZE or nested.absmax.numel() != -(-blocks // NESTED_BLOCKSIZE):
        raise CheckpointError(
            f"it must have a scale of the scales every {NESTED_BLOCKSIZE}, got {nested.absmax.numel()} of every "
            f"{nested.blocksize}"
        )
    if not _is_dynamic(nested.code):
        raise CheckpointError("the code table of its scales is not the dynamic one")


def _is_dynamic(code: torch.Tensor) -> bool:
    return torch.equal(code.cpu(), _dynamic_code())


@cache
def _dynamic_code() -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().cpu()
