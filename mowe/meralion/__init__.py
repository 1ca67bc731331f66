"""The MERaLiON family (A*STAR I2R): a Whisper encoder and a Gemma2 decoder, without remote code.

Imported when first used, like everything in `mowe`; the checkpoints are not part of this library and have licences of
their own.
"""

from mowe.meralion.configuration_meralion import (
    Meralion2Config,
    Meralion3AsrConfig,
    Meralion3Config,
    MeralionConfig,
)
from mowe.meralion.modeling_meralion import MeralionForConditionalGeneration, MeralionModel
from mowe.meralion.processing_meralion import MeralionFeatureExtractor, MeralionProcessor

__all__ = [
    "Meralion2Config",
    "Meralion3AsrConfig",
    "Meralion3Config",
    "MeralionConfig",
    "MeralionFeatureExtractor",
    "MeralionForConditionalGeneration",
    "MeralionModel",
    "MeralionProcessor",
]
