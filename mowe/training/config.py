"""What a training run is: its fields, what they may be, and the file that they are read from."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mowe.errors import ConfigError
from mowe.training.arguments import check_arguments
from mowe.training.fields import (
    as_config,
    check_not_negative,
    check_path,
    check_positive,
    check_share,
    parse_yaml,
    set_field,
    suggest,
)


@dataclass
class PartsConfig:
    """A model built from parts, as `MoweForConditionalGeneration.from_parts` takes them: folders or hub ids.

    tokenizer: the language model's own by default. settings: other fields of MoweConfig.
    """

    audio_tower: str
    pool: list[str]
    language_model: str
    tokenizer: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        sources = {"audio_tower": self.audio_tower, "language_model": self.language_model, "tokenizer": self.tokenizer}
        for name, source in (sources | {f"pool.{i}": encoder for i, encoder in enumerate(self.pool)}).items():
            if source is not None:
                check_path(name, source)
        for name in self.settings:
            if name in _OF_PARTS:
                raise ConfigError(f"settings.{name}: is set by {_OF_PARTS[name]}")


_OF_PARTS = {
    **{name: name for name in ("audio_tower", "pool", "language_model")},
    "audio_config": "audio_tower", "pool_config": "pool", "text_config": "language_model",
    "audio_token_id": "tokenizer", "dtype": "bf16", "torch_dtype": "bf16", "quantization_config": "load_in_4bit",
}  # fmt: skip
"""What sets those fields of MoweConfig that cannot be given for a model built from parts."""


@dataclass
class ManifestConfig:
    """manifest: a JSONL file or a folder of `datasets`. weight: how often an epoch has each of its examples."""

    manifest: str
    weight: float = 1.0

    def check(self) -> None:
        check_path("manifest", self.manifest)
        check_positive(self, "weight")


@dataclass
class DataConfig:
    """train, validation: manifests. tasks: the ones that may occur, any by default. task_weights: how often an epoch
    has each example of a task, times the weight of its manifest; 1 by default, and a random half for 0.5.

    batch_frames: the most frames of the base encoder (50 a second, 1500 a window in context "window") that a batch of
    one process holds. batch_clips: the most clips. workers: processes that decode audio. skip_bad: go on without the
    lines that cannot be used. decode_first: look for these by decoding all of every clip, not its beginning and end.
    """

    train: list[ManifestConfig]
    validation: list[str] = field(default_factory=list)
    tasks: list[str] | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    batch_frames: int = 8000
    batch_clips: int | None = None
    workers: int = 2
    skip_bad: bool = False
    decode_first: bool = False

    def check(self) -> None:
        if not self.train:
            raise ConfigError("train: expected at least one manifest, got none")
        check_positive(self, "batch_frames", "batch_clips")
        check_not_negative(self, "workers")
        for number, path in enumerate(self.validation):
            check_path(f"validation.{number}", path)
        for task, weight in self.task_weights.items():
            if self.tasks is not None and task not in self.tasks:
                raise ConfigError(f"task_weights: {task!r} is not among tasks{suggest(task, self.tasks)}")
            if not 0 <= weight < math.inf:
                raise ConfigError(f"task_weights.{task}: must not be negative, got {weight}")


@dataclass
class TrainableConfig:
    """Which parts learn. pool: all of its encoders, or one entry for each. language_model: "lora" trains adapters on
    its linear layers, which are merged into them at the end, or saved beside them where they are in 4 bits.
    """

    audio_tower: bool = False
    pool: bool | list[bool] = False
    routers: bool = True
    projector: bool = True
    language_model: Literal["none", "lora", "full"] = "none"

    def check(self) -> None:
        pool = self.pool if isinstance(self.pool, bool) else any(self.pool)
        if not (self.audio_tower or pool or self.routers or self.projector or self.language_model != "none"):
            raise ConfigError("projector: nothing is trainable, neither this nor another part")


@dataclass
class LoraConfig:
    """New adapters on the language model: rank, alpha (scaled by alpha / rank) and dropout."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def check(self) -> None:
        check_positive(self, "rank", "alpha")
        check_share(self, "dropout")


@dataclass
class SpecAugmentConfig:
    """Stripes of the base encoder's log-mel input that are blanked, anew for every clip; the pool hears everything.

    A stripe is up to `time_frames` frames of 10 ms (but no more than a fifth of the clip) or `mel_bins` bins wide.
    """

    time_stripes: int = 2
    time_frames: int = 40
    mel_stripes: int = 2
    mel_bins: int = 10

    def check(self) -> None:
        check_not_negative(self, *(f.name for f in dataclasses.fields(self)))


@dataclass
class StageConfig:
    """One stretch of training, with an optimiser and a schedule of its own.

    steps or epochs: how long. warmup: share of the steps in which the rate rises. schedule: how it falls afterwards.
    trainable: for this stage, instead of the run's.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-4
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    trainable: TrainableConfig | None = None

    def check(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("steps: expected either this or epochs")
        check_positive(self, "steps", "epochs", "learning_rate")
        check_share(self, "warmup")


@dataclass
class TrainConfig:
    """A training run. model: the folder of a saved model, or its parts. output: where everything goes.

    accumulate: batches whose gradients make a step, in each process. bf16: what is frozen is stored in bfloat16, and
    computed in it; what is trained stays in float32 and is computed in bfloat16. load_in_4bit: the language model is in
    4 bits while training goes on. log_every, save_every, evaluate_every: steps; evaluation and saving also happen at
    the end of a stage. keep: checkpoints of a stage, the latest ones. fsdp: shard parameters, gradients and optimiser
    over the processes (FSDP2) instead of repeating them (DDP). trainer: further fields of transformers'
    TrainingArguments.
    """

    model: str | PartsConfig
    output: str
    data: DataConfig
    stages: list[StageConfig]
    seed: int = 0
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    spec_augment: SpecAugmentConfig | None = None
    accumulate: int = 1
    bf16: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    log_every: int = 10
    save_every: int = 500
    evaluate_every: int = 500
    keep: int = 2
    tensorboard: bool = False
    fsdp: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if not self.stages:
            raise ConfigError("stages: expected at least one, got none")
        check_path("output", self.output)
        if isinstance(self.model, str):
            check_path("model", self.model)
        check_positive(self, "accumulate", "log_every", "save_every", "evaluate_every", "keep")
        check_not_negative(self, "seed", "weight_decay", "max_grad_norm")
        if self.seed >= 2**32:
            raise ConfigError(f"seed: must be below 2**32, got {self.seed}")
        if self.fsdp and any(isinstance((stage.trainable or self.trainable).pool, list) for stage in self.stages):
            raise ConfigError(
                "fsdp: the encoders of the pool are sharded together, trainable.pool must be true or false"
            )
        check_arguments(self.trainer, {stage.schedule for stage in self.stages})
        if self.trainer.get("eval_on_start") and not self.data.validation:
            raise ConfigError("trainer.eval_on_start: needs manifests under data.validation, there are none")


def read_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a YAML file describes. overrides: "data.batch_frames=4000", "stages.0.learning_rate=1e-3".

    Raises ConfigError, naming the file and the field.
    """
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected fields and values, got {type(data).__name__}")
    for override in overrides:
        set_field(data, override)
    try:
        return as_config(TrainConfig, data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
