"""transformers' Trainer for mixtures: batches of frames, frozen encoders, what the routers do, checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from mowe.data import Example
from mowe.errors import ConfigError, MoweError
from mowe.families.stacked import StackedNorm
from mowe.training.data import FrameBatches
from mowe.training.parts import Parts
from mowe.training.routing import RoutingMeter
from mowe.training.saving import read_trained, reading_checkpoint, replace, unfinished_name, writing
from mowe.training.stopping import Stop, worker_settings

_MEANINGLESS = ("train_samples_per_second", "total_flos")
"""What the Trainer logs from a number of clips in a batch and of tokens, which here are not what it takes them for."""


@contextmanager
def trainer_settings() -> Iterator[None]:
    """Make one line of what transformers and torch raise for settings under `trainer` that they cannot use."""
    try:
        yield
    except MoweError:
        raise
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None


class MoweTrainer(Trainer):
    """batches: of training. eval_batches: of each validation set. parts: what learns. saved: names of the parameters
    that a checkpoint holds. meter: sums up what the routers do between two entries of the log. stop: ends training
    early.
    """

    def __init__(
        self,
        *args: Any,
        batches: FrameBatches,
        eval_batches: dict[str, FrameBatches],
        parts: Parts,
        saved: Sequence[str],
        meter: RoutingMeter,
        stop: Stop,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.batches, self.eval_batches = batches, eval_batches
        self.parts, self.saved, self.meter, self.stop = parts, saved, meter, stop
        self.add_callback(stop)
        self._saving_to: str | None = None
        self._worker_settings = worker_settings()
        if self.is_fsdp_enabled:  # as in a single process, autocast decides what is computed in bfloat16
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._loader(self.eval_dataset[eval_dataset], self.eval_batches[eval_dataset])

    def _loader(self, examples: Sequence[Example], batches: FrameBatches) -> DataLoader:
        loader: DataLoader = DataLoader(
            examples,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=self._worker_settings,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in transformers, which tells norms by their names, those of HuBERT's convolutions too."""
        norms = [f"{name}." for name, module in model.named_modules() if isinstance(module, StackedNorm)]
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(tuple(norms))]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with trainer_settings():
            optimizer = super().create_optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: self.parts.before_step())
        optimizer.register_step_post_hook(lambda *_: self.parts.after_step())
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        windows = sum(len(batch["task_ids"]) for batch in batches)
        sums = self.accelerator.reduce(torch.tensor([windows, self.stop.asked], device=device), "sum")
        self._num_windows = sums[0]
        if self.accelerator.num_processes > 1:
            self.stop.agreed = bool(sums[1])
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tasks = inputs.pop("task_ids")
        if model.training:
            for family in self.parts.frozen:
                family.eval()
            inputs["num_windows_in_batch"] = self._num_windows
        self.meter.task_ids = tasks if model.training else None
        with self.accelerator.autocast():  # which accelerate leaves out where parameters are sharded
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training and outputs.aux_loss is not None:
            loss = loss - outputs.aux_loss  # what models of other routers can be compared by
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over the predicted tokens of a set, however it is cut; the Trainer's is one over batches."""
        examples, processes = len(dataloader.dataset), self.accelerator.num_processes  # type: ignore[arg-type]
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for number, batch in enumerate(dataloader):
            tokens = (batch["labels"][:, 1:] != -100).sum()
            loss = self.compute_loss(self.model, self._prepare_inputs(batch))
            # Only where each batch is of one clip do some come again, after all the others; they count once.
            if number * processes + self.accelerator.process_index < examples:
                sums += torch.stack([loss * tokens, tokens])
        total, predicted = self.accelerator.reduce(sums, "sum").tolist()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": total / predicted}, examples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, value in logs.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise self._diverged(f"{name} is {value}")
        if "loss" in logs:
            logs |= self.meter.read(self.accelerator)
        for name in _MEANINGLESS:
            logs.pop(name, None)
        share = self.state.epoch  # of the run, which to the Trainer is a single epoch
        self.state.epoch = round(share * self.batches.passes, 4)
        super().log(logs, start_time)
        self.state.epoch = share

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Into another folder first: a kill or a full disk on the way leaves the checkpoints before as they were."""
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        unfinished = unfinished_name(final)
        self._saving_to = str(unfinished)
        try:
            with writing(final):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    replace(unfinished / final.name, final)
                    rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)
                self.accelerator.wait_for_everyone()
        finally:
            self._saving_to = None
            if self.is_world_process_zero():
                shutil.rmtree(unfinished, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Without the second copy of the model that the Trainer writes beside the optimiser of FSDP."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """By way of the CPU: the Trainer loads onto its device, which is "cpu:0" for one of several processes."""
        with reading_checkpoint(checkpoint):
            if checkpoint is None or self.is_fsdp_enabled:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
                part.load_state_dict(torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            trained: dict[str, Any] = read_trained(resume_from_checkpoint, self.saved)
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(model or self.model, trained, options=options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What has been trained, and nothing else: the rest comes from the model that training began with."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = state_dict or self.model.state_dict()
        trained = {name: state_dict[name].contiguous() for name in self.saved}
        for name, value in trained.items():
            if not value.isfinite().all():
                raise self._diverged(f"{name} holds NaN or infinite values")
        save_file(trained, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _diverged(self, told: str) -> ConfigError:
        stage = Path(self.args.output_dir).name
        return ConfigError(f"{stage}, step {self.state.global_step}: {told}, training diverged; lower learning_rate")
