"""transformers' Trainer for mixtures: batches of frames, frozen encoders, what the routers do, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from mowe.data import Example
from mowe.training.data import FrameBatches
from mowe.training.parts import Parts
from mowe.training.routing import RoutingMeter
from mowe.training.saving import replace, unfinished_name, writing

_MEANINGLESS = ("train_samples_per_second", "total_flos")
"""What the Trainer logs from a number of clips in a batch and of tokens, which here are not what it takes them for."""


class MoweTrainer(Trainer):
    """batches: of training. eval_batches: of each validation set. parts: what learns. saved: names of the parameters
    that a checkpoint holds. meter: sums up what the routers do between two entries of the log.
    """

    def __init__(
        self,
        *args: Any,
        batches: FrameBatches,
        eval_batches: dict[str, FrameBatches],
        parts: Parts,
        saved: Sequence[str],
        meter: RoutingMeter,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.batches, self.eval_batches = batches, eval_batches
        self.parts, self.saved, self.meter = parts, saved, meter
        self._saving_to: str | None = None

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
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tasks = inputs.pop("task_ids")
        if model.training:
            for family in self.parts.frozen:
                family.eval()
        self.meter.task_ids = tasks if model.training else None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self.accelerator)
        for name in _MEANINGLESS:
            logs.pop(name, None)
        super().log(logs, start_time)

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
                    unfinished.rmdir()
                    rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)
                self.accelerator.wait_for_everyone()
        finally:
            self._saving_to = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What has been trained, and nothing else: the rest comes from the model that training began with."""
        state_dict = state_dict or self.model.state_dict()
        os.makedirs(output_dir, exist_ok=True)
        trained = {name: state_dict[name].contiguous() for name in self.saved}
        save_file(trained, os.path.join(output_dir, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
