"""Models in 4 bits: the language model by bitsandbytes, base encoder and pool in grouped NF4, the rest as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mowe.errors import CheckpointError, ConfigError
from mowe.families.nf4 import Nf4StackedLinear, quantize_linears
from mowe.families.stacked import StackedLinear

METHOD = "mowe_nf4"
PARTS = ("language_model", "audio_tower", "pool", "lm_head")
DEFAULT_PARTS = PARTS[:3]

Quantizable = TypeVar("Quantizable", bound=nn.Module)


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

        Raises ConfigError for 8 bits.
        """
        if not config.load_in_4bit:
            raise ConfigError("quantization_config: expected load_in_4bit=True, 8-bit models are not supported")
        named = config.bnb_4bit_compute_dtype
        return cls(
            double_quant=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            compute_dtype=None if named == torch.float32 else str(named).removeprefix("torch."),
            skip_modules=config.llm_int8_skip_modules or (),
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
    """How transformers loads and saves a model that is described by a MoweQuantizationConfig."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Everything needed is a dependency."""

    def _process_model_before_weight_loading(self, model: nn.Module, device_map: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        _replace_linears(model, config, pre_quantized=self.pre_quantized)
        if self.pre_quantized:
            _quantize_audio(model, config)
        # transformers takes any shape where there is a quantizer.
        self._expected = {name: value.shape for name, value in model.state_dict().items() if not _packed(model, name)}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        _check_loaded(model, self._expected)
        if not self.pre_quantized:
            _quantize_audio(model, self.quantization_config)
        return _finish(super()._process_model_after_weight_loading(model, **kwargs))


def quantize(
    model: Quantizable,
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    double_quant: bool = True,
    skip_modules: Sequence[str] = (),
) -> Quantizable:
    """Put a pool, or the parts of a model, in 4 bits, in place; returns it.

    model: an EncoderPool or a MoweForConditionalGeneration. parts, double_quant, skip_modules: see
    MoweQuantizationConfig; a pool has no parts. Raises ConfigError for another module and for one already quantised.
    """
    kinds = {type(module) for module in model.modules()}
    if not kinds & {StackedLinear, Nf4StackedLinear}:
        raise ConfigError(f"expected an EncoderPool or a MoweForConditionalGeneration, got {type(model).__name__}")
    if Nf4StackedLinear in kinds or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(f"the {type(model).__name__} is already quantised")
    if not hasattr(model, "language_model"):
        quantize_linears(model, StackedLinear, double_quant)
        return model
    config = MoweQuantizationConfig(parts, double_quant, skip_modules=skip_modules)
    _fill(model.language_model, _replace_linears(model, config, pre_quantized=False))
    _quantize_audio(model, config)
    model.hf_quantizer = MoweQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.quantization_method, model.is_loaded_in_4bit, model.is_4bit_serializable = METHOD, True, True
    return _finish(model)


def check_method(quantization: Any) -> None:
    """Raise CheckpointError for a checkpoint that something else quantised."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method != METHOD:
        raise CheckpointError(f"the checkpoint was quantised by {method!r}, expected {METHOD!r}")


def _quantize_audio(model: nn.Module, config: MoweQuantizationConfig) -> None:
    for part, module in (("audio_tower", model.audio_tower), ("pool", model.model.mixture.pool)):
        if part in config.parts:
            quantize_linears(module, StackedLinear, config.double_quant)


def _replace_linears(model: nn.Module, config: MoweQuantizationConfig, pre_quantized: bool) -> dict[str, nn.Module]:
    """Put bitsandbytes' layers, still empty, in the language model; returns those that were there.

    Only names inside of the language model are looked at, so that a list of modules to skip cannot uncover the others.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # seconds to import

    language_model = model.language_model
    chosen = {"language_model": "language_model" in config.parts, "lm_head": "lm_head" in config.parts}
    head = language_model.get_output_embeddings()
    keep = [name for name in config.skip_modules]
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
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, old in before.items():
        new = language_model.get_submodule(name)
        if isinstance(new, Linear4bit):
            values = old.weight.data.T if isinstance(old, Conv1D) else old.weight.data
            new.weight = Params4bit(values, requires_grad=False, **new.weight.__dict__).to(values.device)
            new.bias = old.bias


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


def _check_loaded(model: nn.Module, expected: dict[str, torch.Size]) -> None:
    """Raise CheckpointError for tensors of another shape than the model's."""
    from bitsandbytes.nn import Linear4bit

    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, shape in expected.items():
        if name in loaded and loaded[name].shape != shape:
            raise CheckpointError(f"{name} must have sizes {list(shape)}, got {list(loaded[name].shape)}")
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        state, count = module.weight.quant_state, module.in_features * module.out_features
        if state is None:
            raise CheckpointError(f"{name} is not quantised in the checkpoint")
        if module.weight.numel() * module.weight.itemsize != (count + 1) // 2:
            raise CheckpointError(f"{name} must have {(count + 1) // 2} bytes of codes, got {module.weight.numel()}")
        if state.absmax.numel() != -(-count // state.blocksize):
            raise CheckpointError(
                f"{name} must have a scale every {state.blocksize} values, got {state.absmax.numel()}"
            )
