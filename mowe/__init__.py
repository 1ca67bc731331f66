"""Mixtures of weak encoders for AudioLLMs.

Names are imported when first used, so that `import mowe` costs nothing.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "AudioError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "EncoderPool": "pool",
    "MixtureOfWeakEncoders": "mixture",
    "MixtureOutput": "mixture",
    "MoweConfig": "configuration_mowe",
    "MoweError": "errors",
    "MoweFeatureExtractor": "processing_mowe",
    "MoweForConditionalGeneration": "modeling_mowe",
    "MowePoolConfig": "configuration_mowe",
    "MoweProcessor": "processing_mowe",
    "PoolOutput": "pool",
    "load_audio": "audio",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mowe' has no attribute {name!r}")
    return getattr(import_module(f"mowe.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
