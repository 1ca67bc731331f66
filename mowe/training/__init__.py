"""Training through transformers' Trainer: `mowe train` and what it is made of."""

from mowe.training.config import TrainConfig, read_config
from mowe.training.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "read_config", "train"]
