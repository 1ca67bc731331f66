"""Signals that come to every process of a run."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from torch.utils.data import DataLoader

from mowe.training.stopping import worker_settings


def test_workers_leave_signals_to_their_parent_until_it_ends() -> None:
    settings: Any = worker_settings()
    loader = iter(DataLoader(range(1_000), num_workers=1, worker_init_fn=settings))
    assert next(loader) == 0
    (worker,) = loader._workers
    for signal in ("TERM", "INT"):
        subprocess.run(["kill", f"-{signal}", str(worker.pid)], check=True)
    time.sleep(0.2)
    assert worker.is_alive() and [next(loader).item() for _ in range(9)] == [*range(1, 10)]
    (ending,) = settings.args
    ending.value = 1
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
