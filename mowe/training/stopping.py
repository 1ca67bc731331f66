"""SIGTERM, which says that a job has to end soon: the step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


def heed_the_parent(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the process that a worker decodes audio for, to which they come as well; SIGTERM from
    that one itself ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_by, args=(os.getppid(),), daemon=True).start()


def _end_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
