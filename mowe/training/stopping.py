"""SIGTERM, which says that a job has to end soon: the step is finished and saved first."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers import TrainerCallback

from mowe.errors import Terminated


class Stop(TrainerCallback):
    """Ends training after a step once SIGTERM has come; RunLog then has it saved.

    asked: it has come to this process. agreed: every process knows that it has come to one, so that all end together.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM meanwhile. Raises Terminated at the end of it, not amid a step or a checkpoint."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # where alone signals can be handled
        before = signal.signal(signal.SIGTERM, self._ask) if in_main_thread else None
        try:
            yield
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, before)
        if self.asked or self.agreed:
            raise Terminated

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.agreed or (self.asked and args.world_size == 1)

    def _ask(self, *_: Any) -> None:
        self.asked = True


def worker_settings() -> Callable[[int], None]:
    """What a worker that decodes audio begins with: it leaves Ctrl-C and SIGTERM to its parent until that one ends."""
    ending = multiprocessing.RawValue("b", 0)
    atexit.register(setattr, ending, "value", 1)  # before multiprocessing sends SIGTERM to workers and waits for them
    return partial(_leave_signals, ending)


def _leave_signals(ending: Any, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)
