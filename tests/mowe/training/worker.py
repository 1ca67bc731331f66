"""A process that trains by a configuration in a JSON file, for each of some changes of its fields.

Two changes are no fields: `killed_in_save`, the process kills itself while it saves the checkpoint of that number, and
`resume`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mowe.training import TrainConfig, train
from mowe.training.fields import as_config


def main(config: str, *changes: str) -> None:
    for change in changes:
        fields = json.loads(Path(config).read_text()) | json.loads(change)
        if number := fields.pop("killed_in_save", None):
            kill_in_save(number)
        resume = fields.pop("resume", False)
        train(as_config(TrainConfig, fields), resume)


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
