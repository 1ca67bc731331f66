"""`mowe train`: a training run from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.utils import logging

from mowe.cli._screen import Counter, Screen, printable
from mowe.training import TrainResult, read_config, train
from mowe.training.run import connect
from mowe.training.start import CONFIG_NAME


def run(config: Path, overrides: Sequence[str], resume: bool, screen: Screen) -> None:
    settings = read_config(config, overrides)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    first = connect(settings).is_main_process
    if not first:
        screen = Screen(as_json=True)  # of several processes one speaks
    report = _Report(screen)
    try:
        result = train(settings, resume, [report], screen.track)
    except KeyboardInterrupt as stopped:
        if Path(settings.output, CONFIG_NAME).exists():
            stopped.add_note(f"mowe train --resume goes on with {settings.output}")
        raise
    finally:
        report.close()
    if not first:
        return
    screen.left_out(result.skipped)
    data = {"model": str(result.model), "stages": result.stages, "skipped": len(result.skipped)}
    screen.result(data, _table(result), Text(), Text(printable(f"saved in {result.model}")))


class _Report(TrainerCallback):
    """Shows how far training is."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self.counter: Counter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.counter = self.screen.counter(Path(args.output_dir).name, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.counter is not None:
            self.counter.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        losses = [f"{name} {value:.4f}" for name, value in (logs or {}).items() if _is_loss(name)]
        if self.counter is not None and losses:
            self.counter.update(state.global_step, "  ".join(losses))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.counter is not None:
            self.counter.close()
            self.counter = None


def _is_loss(name: str) -> bool:
    return name == "loss" or (name.startswith("eval_") and name.endswith("_loss"))


def _table(result: TrainResult) -> Table:
    """A row a stage: its last losses."""
    names = dict.fromkeys(name for stage in result.stages for name in stage if _is_loss(name))
    table = Table("stage", "step", *names)
    for number, stage in enumerate(result.stages):
        losses = [f"{stage[name]:.4f}" if name in stage else "" for name in names]
        table.add_row(str(number), str(stage.get("step", "")), *losses)
    return table
