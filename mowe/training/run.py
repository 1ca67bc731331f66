"""A training run from its configuration to the saved model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from mowe.checkpoint import reading
from mowe.data import Example, Manifest, read_manifest
from mowe.errors import ConfigError, MoweError, naming
from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.training.augment import add_spec_augment
from mowe.training.config import TrainConfig
from mowe.training.data import Collator, FrameBatches, base_frames
from mowe.training.log import RunLog, read_lines
from mowe.training.optimizer import check_optimizer
from mowe.training.parts import Parts
from mowe.training.picture import training_picture
from mowe.training.routing import RoutingMeter
from mowe.training.saving import read_trained, reading_checkpoint, whole
from mowe.training.start import check_answers, check_output, check_random_states, check_template, load, write_config
from mowe.training.stopping import Stop
from mowe.training.trainer import MoweTrainer, trainer_settings

_CHECKPOINTING = "activation_checkpointing"  # of TrainingArguments, since transformers 5.23
if not hasattr(TrainingArguments, _CHECKPOINTING):
    _CHECKPOINTING = "gradient_checkpointing"

Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class TrainResult:
    """model: the folder of the trained model. stages: the last log entries of each, training and validation.
    skipped: lines of manifests that could not be used.
    """

    model: Path
    stages: list[dict[str, float]]
    skipped: list[str]


def train(
    config: TrainConfig,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    track: Track = lambda items, text: items,
) -> TrainResult:
    """Train, and save the model under `output`/model.

    resume: go on from the last checkpoint under `output`. callbacks: told of every step, as in transformers. track:
    wraps a list while it is worked through, for a progress bar.
    Raises MoweError for a configuration, model or manifest that cannot be used, before anything is trained, and where
    training diverges, before anything of it is saved. Raises Terminated once SIGTERM has come while it trained, with
    what has been trained in a checkpoint.
    """
    return _Run(config, resume, callbacks, track).train()


def connect(config: TrainConfig) -> PartialState:
    """The processes of this run, which from here on wait for each other; those that do already stay as they are.

    Raises ConfigError for what they cannot do.
    """
    timeout = config.trainer.get("ddp_timeout")
    settings = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    world = PartialState(cpu=not torch.cuda.is_available(), **settings)
    if config.tensorboard and not is_tensorboard_available():
        raise ConfigError("tensorboard: the package is not installed; pip install tensorboard")
    if config.fsdp and world.num_processes == 1:
        raise ConfigError("fsdp: needs several processes, as torchrun starts them")
    return world


class _Run:
    def __init__(self, config: TrainConfig, resume: bool, callbacks: Sequence[TrainerCallback], track: Track):
        self.config, self.resume, self.callbacks = config, resume, callbacks
        self.output = Path(config.output)
        self.trainable = [stage.trainable or config.trainable for stage in config.stages]
        self.world = connect(config)
        check_output(config, resume)
        manifests = [self._read(source.manifest, track) for source in config.data.train]
        validation = [self._read(path, track) for path in config.data.validation]
        self.skipped = [f"{m.path}: {told}" for m in (*manifests, *validation) for told in m.skipped]
        self.examples = [example for manifest in manifests for example in manifest]
        self.validation = _by_task(example for manifest in validation for example in manifest)
        self.tasks = sorted({example.task for example in self.examples} | self.validation.keys())
        unknown = sorted(config.data.task_weights.keys() - set(self.tasks))
        if unknown:
            raise ConfigError(f"data.task_weights: no example is of the task {', '.join(unknown)}")
        self.weights = [
            source.weight * config.data.task_weights.get(example.task, 1.0)
            for source, manifest in zip(config.data.train, manifests, strict=True)
            for example in manifest
        ]
        self._load(config.load_in_4bit)
        check_template(self.processor)
        for manifest in (*manifests, *validation):
            manifest.check_prompts(self.processor.audio_token)
            check_answers(manifest, self.processor.audio_token)
        if config.fsdp and self.parts.in_4_bits:
            raise ConfigError("fsdp: a model in 4 bits is not sharded, train it without fsdp")
        for trainable in self.trainable:
            self.parts.choose(trainable)
        self.world.wait_for_everyone()  # every process has seen what was there before one of them writes

    def train(self) -> TrainResult:
        start, checkpoint = self._place_to_resume() if self.resume else (0, None)
        for number in range(start, len(self.config.stages)):
            self._train_stage(number, checkpoint)
            checkpoint = None
        model = self.output / "model"
        if self.world.is_main_process:
            self._save(model)
            self._draw()
        self.world.wait_for_everyone()
        entries = read_lines(self.output / "log.jsonl")
        stages = range(len(self.config.stages))
        return TrainResult(model, [_last_entries(entries, stage) for stage in stages], self.skipped)

    def _read(self, path: str, track: Track) -> Manifest:
        """One process looks at the clips, all have the manifest, or the error."""
        data = self.config.data
        found: Any = None
        if self.world.is_main_process:
            try:
                found = read_manifest(
                    path,
                    data.tasks,
                    data.skip_bad,
                    data.decode_first,
                    lambda clips: track(clips, f"checking {Path(path).name}"),
                )
            except MoweError as error:
                found = error
        (found,) = broadcast_object_list([found])
        if isinstance(found, MoweError):
            raise found
        return found

    def _load(self, in_4_bits: bool = False) -> None:
        """The model that training begins with. in_4_bits: its language model, if it is not already."""
        self.model, self.processor = load(self.config, in_4_bits)
        lora = any(stage.language_model == "lora" for stage in self.trainable)
        self.parts = Parts(self.model, self.config.lora if lora else None)
        if self.config.spec_augment is not None:
            add_spec_augment(self.model, self.config.spec_augment)

    def _train_stage(self, number: int, checkpoint: str | None) -> None:
        if isinstance(self.model, FSDPModule):  # what learns cannot change once it is sharded
            self._load()
            self._load_trained(number - 1)
        if self.config.bf16:
            self.parts.store_in_bf16(self.trainable)
        saved = self._choose(number)
        meter = RoutingMeter(self.model, self.tasks)
        arguments, batches = self._arguments(number)
        eval_batches = {
            task: FrameBatches(
                self._frames(examples),
                self.config.data.batch_frames,
                batch_clips=self.config.data.batch_clips,
                multiple_of=self.world.num_processes,
                name_of=_names_of(examples),
            )
            for task, examples in self.validation.items()
        }
        if self.world.is_main_process:
            write_config(self.config)
            for left in self._folder(number).glob("unfinished-*"):  # by a kill
                shutil.rmtree(left)
        stop = Stop()
        with trainer_settings():
            trainer = MoweTrainer(
                model=self.model,
                args=arguments,
                train_dataset=self.examples,
                eval_dataset=self.validation or None,
                data_collator=Collator(self.processor, self.tasks),
                processing_class=self.processor,
                callbacks=[*self.callbacks, RunLog(self.output, number, meter)],
                batches=batches,
                eval_batches=eval_batches,
                parts=self.parts,
                saved=saved,
                meter=meter,
                stop=stop,
            )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        try:
            with stop.listening():
                trainer.train(resume_from_checkpoint=checkpoint)
        except MoweError as error:  # of a clip damaged in its middle; from a worker it comes with a traceback
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"stage-{number}, step {trainer.state.global_step + 1}: needs more memory than the GPU has; "
                f"lower data.batch_frames, which is {self.config.data.batch_frames}"
            ) from None
        except TorchDynamoException as error:  # of a compiler that is not installed
            told = " ".join(str(error).partition("\n\n")[0].split())
            raise ConfigError(f"trainer.torch_compile: the model cannot be compiled: {told}") from None
        meter.remove()

    def _arguments(self, number: int) -> tuple[TrainingArguments, FrameBatches]:
        config, stage = self.config, self.config.stages[number]
        per_step = config.accumulate * self.world.num_processes
        make_batches = partial(
            FrameBatches,
            self._frames(self.examples),
            config.data.batch_frames,
            batch_clips=config.data.batch_clips,
            weights=self.weights,
            seed=config.seed + number,
            name_of=_names_of(self.examples),
        )
        steps = stage.steps or max(1, round(make_batches().batches_in(stage.epochs or 0) / per_step))
        batches = make_batches(num_batches=steps * per_step)
        with trainer_settings():
            arguments = self._training_arguments(number, steps)
            check_optimizer(arguments, self.model)
        return arguments, batches

    def _training_arguments(self, number: int, steps: int) -> TrainingArguments:
        config, stage = self.config, self.config.stages[number]
        arguments = TrainingArguments(
            output_dir=str(self._folder(number)),
            max_steps=steps,
            learning_rate=stage.learning_rate,
            warmup_steps=stage.warmup if steps > 1 else 0,  # which begins with a rate of 0
            lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            gradient_accumulation_steps=config.accumulate,
            **{_CHECKPOINTING: config.gradient_checkpointing},
            bf16=config.bf16,
            seed=config.seed,
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.save_every,
            save_total_limit=config.keep,
            eval_strategy="steps" if self.validation else "no",
            eval_steps=config.evaluate_every,
            prediction_loss_only=True,
            remove_unused_columns=False,
            dataloader_num_workers=config.data.workers,
            accelerator_config={"even_batches": False},
            report_to=["tensorboard"] if config.tensorboard else "none",
            disable_tqdm=True,
            **_parallel_settings(config, self.model),
            **config.trainer,
        )
        if config.fsdp and arguments.use_cpu:  # accelerate would not shard; torch does, on GPUs or not
            arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
        arguments._n_gpu = min(arguments.n_gpu, 1)  # or DataParallel cuts batches over all there are, row by row
        return arguments

    def _frames(self, examples: Sequence[Example]) -> list[int]:
        extractor = self.processor.feature_extractor
        return [base_frames(self.model, extractor, example.samples) for example in examples]

    def _folder(self, stage: int) -> Path:
        return self.output / f"stage-{stage}"

    def _place_to_resume(self) -> tuple[int, str | None]:
        """The stage to go on with, and the checkpoint to go on from, if it has begun."""
        for number in reversed(range(len(self.config.stages))):
            checkpoint = get_last_checkpoint(self._folder(number)) if self._folder(number).is_dir() else None
            if checkpoint is not None:
                with reading_checkpoint(checkpoint):
                    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
                    done = state.global_step >= state.max_steps
                if not done:
                    check_random_states(checkpoint, self.world.num_processes)
                    return number, checkpoint
                self._load_trained(number)
                return number + 1, None
        return 0, None

    def _choose(self, stage: int) -> list[str]:
        """Let the parts of a stage learn. Returns the names of what has learned when it ends."""
        names: dict[str, None] = {}
        for trainable in self.trainable[: stage + 1]:
            self.parts.choose(trainable)
            names |= dict.fromkeys(self.parts.names)
        return list(names)

    def _load_trained(self, stage: int) -> None:
        """What the last checkpoint of a stage holds."""
        checkpoint = get_last_checkpoint(self._folder(stage))
        with reading_checkpoint(checkpoint):
            self.model.load_state_dict(read_trained(checkpoint, self._choose(stage)), strict=False)

    def _save(self, folder: Path) -> None:
        """The model as it is stored, and in it what the last checkpoint holds."""
        self._load()
        self._load_trained(len(self.config.stages) - 1)
        for left in self.output.glob(f"unfinished-{folder.name}-*"):  # by a kill
            shutil.rmtree(left)
        with whole(folder) as unfinished:
            self.parts.save(unfinished)
            self.processor.save_pretrained(unfinished)

    def _draw(self) -> None:
        names = [
            f"{encoder.model_type} {i}" for i, encoder in enumerate(self.model.config.pool_config.encoder_configs())
        ]
        log = self.output / "routing.jsonl"
        if entries := read_lines(log):
            with naming(f"{log}"), reading("the routing"):
                training_picture(self.output / "routing.png", entries, names, "Who listened as training went on")


def _parallel_settings(config: TrainConfig, model: MoweForConditionalGeneration) -> dict[str, Any]:
    """Every parameter that learns gets a gradient in every process, chosen by a clip or not: nothing has to look."""
    settings: dict[str, Any] = {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
    if not torch.cuda.is_available():
        settings["use_cpu"] = True
    if config.fsdp:
        families = (model.audio_tower, *model.model.mixture.pool.families)
        # A family runs once in every process, its layers only in those whose clips chose one of its encoders.
        units = {type(family).__name__ for family in families} | set(model.language_model._no_split_modules)
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": sorted(units)}}
    return settings


def _by_task(examples: Iterable[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    return found


def _names_of(examples: Sequence[Example]) -> Callable[[int], str]:
    return lambda index: examples[index].name


def _last_entries(entries: Sequence[dict[str, float]], stage: int) -> dict[str, float]:
    """The last value of everything that a stage logged."""
    return {key: value for entry in entries if entry["stage"] == stage for key, value in entry.items()}
