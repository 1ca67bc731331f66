"""What `trainer` may hold: fields of transformers' TrainingArguments that nothing else sets, and what they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

import torch

from mowe.errors import ConfigError
from mowe.training.fields import as_config, check_positive, suggest


@dataclass
class CheckpointingConfig:
    """Which layers of the language model and of encoders are computed again in the backward pass, and how: what
    `gradient_checkpointing_enable` and torch's `checkpoint` take.
    """

    use_reentrant: bool = False
    preserve_rng_state: bool = True
    determinism_check: Literal["default", "none"] = "default"
    debug: bool = False
    early_stop: bool = True
    every_n_layers: int = 1
    offload: bool = False

    def check(self) -> None:
        check_positive(self, "every_n_layers")
        if self.debug and self.use_reentrant:
            raise ConfigError("debug: goes without use_reentrant only")
        if self.offload and not torch.accelerator.is_available():
            raise ConfigError("offload: needs a GPU, there is none")


@dataclass
class CosineConfig:
    """num_cycles: of the learning rate in a stage, half a one by default."""

    num_cycles: float = 0.5

    def check(self) -> None:
        if not 0 <= self.num_cycles <= 1e6:
            raise ConfigError(f"num_cycles: must lie in 0..1000000, got {self.num_cycles}")


_OURS = {
    "output_dir": "output", "max_steps": "stages", "num_train_epochs": "stages", "learning_rate": "stages",
    "warmup_steps": "stages", "lr_scheduler_type": "stages", "seed": "seed", "bf16": "bf16", "fp16": "bf16",
    "gradient_accumulation_steps": "accumulate", "per_device_train_batch_size": "data.batch_frames",
    "per_device_eval_batch_size": "data.batch_frames", "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm", "logging_steps": "log_every",
    "save_steps": "save_every", "save_strategy": "save_every", "save_total_limit": "keep",
    "eval_steps": "evaluate_every", "eval_strategy": "evaluate_every", "report_to": "tensorboard", "fsdp": "fsdp",
    "dataloader_num_workers": "data.workers", "load_best_model_at_end": "keep", "metric_for_best_model": "keep",
    "greater_is_better": "keep", "push_to_hub": "output",
    **dict.fromkeys(
        ("prediction_loss_only", "remove_unused_columns", "accelerator_config", "disable_tqdm", "use_cpu",
         "fsdp_config", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "logging_nan_inf_filter",
         "save_only_model", "label_smoothing_factor", "average_tokens_across_devices", "use_liger_kernel",
         "parallelism_config", "deepspeed", "debug"),
        "training here",
    ),
}  # fmt: skip
"""What sets those fields of TrainingArguments that cannot be given under `trainer`."""

_WITHOUT_EFFECT = {
    "data_seed": "the order of the clips is that of seed",
    "auto_find_batch_size": "a batch has as much as data.batch_frames and data.batch_clips say",
    "resume_from_checkpoint": "mowe train --resume goes on with a run",
    "save_on_each_node": "all nodes see the folder of output",
    "liger_kernel_config": "liger kernels are not used",
    "use_cache": "nothing is generated in training",
    **dict.fromkeys(
        ("dataloader_drop_last", "train_sampling_strategy", "length_column_name"),
        "batches are filled up to data.batch_frames, with clips of like length",
    ),
    **dict.fromkeys(
        ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
         "dataloader_in_order"),
        "how clips are decoded is set by data.workers",
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "validation computes as training does, see bf16"),
    **dict.fromkeys(
        ("label_names", "include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps",
         "eval_do_concat_batches", "eval_use_gather_object"),
        "validation keeps the loss of each task alone; mowe evaluate has other metrics",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "stages say what is trained, data.validation what is validated"
    ),
    "enable_jit_checkpoint": "SIGTERM always ends a run with a checkpoint",
    **dict.fromkeys(("ddp_backend", "local_rank"), "whoever starts the processes, such as torchrun, says who is who"),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "nothing is pushed to a hub",
    ),
}  # fmt: skip
"""Why those fields of TrainingArguments that nothing here looks at cannot be given under `trainer` either."""


def check_arguments(settings: dict[str, Any], schedules: Collection[str]) -> None:
    """Put what `trainer` says into the types of its fields. Raises ConfigError for what cannot be set or has no effect.

    schedules: of the stages.
    """
    known = _types()
    for name, value in settings.items():
        at = f"trainer.{name}"
        if name in _OURS:
            raise ConfigError(f"{at}: is set by {_OURS[name]}")
        if name in _WITHOUT_EFFECT:
            raise ConfigError(f"{at}: has no effect here, {_WITHOUT_EFFECT[name]}")
        if name not in known:
            raise ConfigError(f"{at}: no field of TrainingArguments{suggest(name, known)}")
        settings[name] = _as_given(as_config(known[name], value, at), value)
    if settings.get("lr_scheduler_kwargs") and "linear" in schedules:
        raise ConfigError("trainer.lr_scheduler_kwargs: the schedule linear of a stage has none, only cosine has")
    if not 0 < settings.get("ddp_timeout", 1) < 2**31:
        raise ConfigError(
            f"trainer.ddp_timeout: expected seconds, positive and below 2**31, got {settings['ddp_timeout']}"
        )
    noise = settings.get("neftune_noise_alpha")
    if noise is not None and not 0 < noise < float("inf"):
        raise ConfigError(f"trainer.neftune_noise_alpha: must be positive, got {noise}")
    _check_compilation(settings.get("torch_compile_backend"), settings.get("torch_compile_mode"))
    if settings.get("optim_args") is not None:
        _check_optim_args(settings["optim_args"])


def _check_compilation(backend: str | None, mode: str | None) -> None:
    """What torch and accelerate both know; asked only where it is needed, since it takes a second to import."""
    if backend is not None:
        from accelerate.utils import DynamoBackend

        of_torch = torch.compiler.list_backends(())  # type: ignore[arg-type]
        as_config(
            Literal[tuple(b.value.lower() for b in DynamoBackend if b.value.lower() in of_torch)],
            backend,
            "trainer.torch_compile_backend",
        )
    if mode is not None:
        from torch._inductor import list_mode_options

        as_config(Literal[tuple(list_mode_options())], mode, "trainer.torch_compile_mode")
        if backend not in (None, "inductor"):
            raise ConfigError(f"trainer.torch_compile_mode: the backend {backend} has none, only inductor has")


def _check_optim_args(text: str) -> None:
    names = set()
    for setting in text.split(","):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not (name and equals and value) or "=" in value:
            raise ConfigError(f"trainer.optim_args: expected NAME=VALUE,NAME=VALUE, got {text!r}")
        if name in names:
            raise ConfigError(f"trainer.optim_args: {name} is there twice")
        names.add(name)


def _as_given(value: Any, given: Any) -> Any:
    """As transformers takes it: a dict of what was given, and of `use_reentrant`, without which torch warns."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: fields[name] for name in fields if name in given or name == "use_reentrant"}


@cache
def _types() -> dict[str, Any]:
    """Those of the fields, narrower where transformers takes anything and fails later."""
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames, trainer_log_levels

    hints = get_type_hints(TrainingArguments)
    hints |= dict.fromkeys(("log_level", "log_level_replica"), Literal[tuple(trainer_log_levels)])
    hints["include_num_input_tokens_seen"] = Literal[True, False, "all", "non_padding", "no"]
    hints["optim"] = Literal[tuple(optimizer.value for optimizer in OptimizerNames)]
    for kind in ("gradient", "activation"):  # the latter since transformers 5.23
        hints[f"{kind}_checkpointing_kwargs"] = CheckpointingConfig | None
    hints["lr_scheduler_kwargs"] = CosineConfig | None
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments)}
