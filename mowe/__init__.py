"""Mixtures of weak encoders for AudioLLMs.

Names are imported when first used, so that `import mowe` costs nothing. The first use of MoweConfig or of a class that
belongs to it (`from mowe import MoweConfig`) also makes all of them known to transformers' Auto classes; `import mowe`
alone does not, since it would have to import torch and transformers.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "AudioError": "errors",
    "AudioLayout": "attach",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "EncoderPool": "pool",
    "Meralion2Config": "meralion",
    "Meralion3AsrConfig": "meralion",
    "Meralion3Config": "meralion",
    "MeralionConfig": "meralion",
    "MeralionFeatureExtractor": "meralion",
    "MeralionForConditionalGeneration": "meralion",
    "MeralionProcessor": "meralion",
    "MixtureOfWeakEncoders": "mixture",
    "MixtureOutput": "mixture",
    "MoweConfig": "configuration_mowe",
    "MoweError": "errors",
    "MoweFeatureExtractor": "processing_mowe",
    "MoweForConditionalGeneration": "modeling_mowe",
    "MowePoolConfig": "configuration_mowe",
    "MoweProcessor": "processing_mowe",
    "MoweQuantizationConfig": "quantization",
    "PoolOutput": "pool",
    "attach": "attach",
    "attach_from": "attach",
    "detach": "attach",
    "load_attached": "attach",
    "load_audio": "audio",
    "quantize": "quantization",
    "save_adapter": "attach",
    "skip_modules": "attach",
    "wrap_processor": "attach",
}

_KNOWN_TO_AUTO_CLASSES = ("configuration_mowe", "modeling_mowe", "processing_mowe")

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mowe' has no attribute {name!r}")
    module = _NAMES[name]
    for other in _KNOWN_TO_AUTO_CLASSES if module in _KNOWN_TO_AUTO_CLASSES else ():
        import_module(f"mowe.{other}")
    found = getattr(import_module(f"mowe.{module}"), name)
    return globals().get(name, found)  # `attach` is also the package that was just imported, and can be called itself


def __dir__() -> list[str]:
    return __all__
