"""A process that trains by a configuration in a JSON file, for each of some changes of its fields.

Three changes are no fields: `killed_in_save`, the process kills itself while it saves the checkpoint of that number,
`terminated`, the process of that rank gets SIGTERM in the first step, and `resume`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mowe.errors import Terminated
from mowe.training import TrainConfig, train
from mowe.training.fields import as_config


def main(config: str, *changes: str) -> None:
    for change in changes:
        fields = json.loads(Path(config).read_text()) | json.loads(change)
        if number := fields.pop("killed_in_save", None):
            kill_in_save(number)
        resume, rank = fields.pop("resume", False), fields.pop("terminated", None)
        settings = as_config(TrainConfig, fields)
        if rank is None:
            train(settings, resume)
        else:
            with suppress(Terminated):
                train(settings, resume, [SigtermTo(rank)])
                raise AssertionError("the run went on")


class SigtermTo(TrainerCallback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and args.process_index == self.rank:
            signal.raise_signal(signal.SIGTERM)


def kill_in_save(number: int) -> None:
    """At the end of writing the optimiser's state of that checkpoint."""
    save, saved = torch.save, []

    def save_or_die(state: Any, file: Any, *arguments: Any, **settings: Any) -> None:
        save(state, file, *arguments, **settings)
        if Path(file).name == "optimizer.pt":
            saved.append(file)
            if len(saved) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_or_die


if __name__ == "__main__":
    main(*sys.argv[1:])
