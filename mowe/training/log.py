"""What a run leaves behind besides its model: log.jsonl, routing.jsonl and a picture of the routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mowe.checkpoint import reading
from mowe.errors import CheckpointError, naming
from mowe.files import write_text
from mowe.training.routing import KINDS, RoutingMeter


class RunLog(TrainerCallback):
    """Writes an entry a line as training goes; what a resumed run does again is written again.

    folder: of the run. stage: the number that every line begins with.
    """

    def __init__(self, folder: Path, stage: int, meter: RoutingMeter):
        self.folder, self.stage, self.meter = folder, stage, meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for name in ("log.jsonl", "routing.jsonl"):
                kept = [
                    line
                    for line in read_lines(self.folder / name)
                    if (line["stage"], line["step"]) <= (self.stage, state.global_step)
                ]
                write_text(self.folder / name, "".join(map(_as_line, kept)), "the log")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps  # a short stage has an entry too

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:  # another callback ends the stage, whose last step is then not saved
            control.should_log = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        at = {"stage": self.stage, "step": state.global_step}
        self._append("log.jsonl", {**at, **logs})
        if "loss" in logs:
            routes = {
                task: {kind: counts for kind, counts in zip(KINDS, of_task, strict=True) if any(counts)}
                for task, of_task in zip(self.meter.tasks, self.meter.counts, strict=True)
            }
            self._append("routing.jsonl", {**at, "windows": routes})

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(_as_line(entry))
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}: cannot be written ({error.strerror})") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; none where there is no file. A last line that a kill cut off is left out."""
    if not path.exists():
        return []
    with naming(f"{path}"), reading("the log"):
        return [_entry(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _entry(line: str) -> dict[str, Any]:
    entry = json.loads(line)
    if not (isinstance(entry, dict) and all(isinstance(entry.get(name), int) for name in ("stage", "step"))):
        raise ValueError(f"expected an entry with a stage and a step, got {line[:60]}")
    return entry


def _as_line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
