"""Signals that come to every process of a run."""

from __future__ import annotations

import subprocess
import time

from torch.utils.data import DataLoader

from mowe.training.stopping import heed_the_parent


def test_a_worker_ends_by_its_parent_alone() -> None:
    loader = iter(DataLoader(range(1_000), num_workers=1, worker_init_fn=heed_the_parent))
    assert next(loader) == 0
    (worker,) = loader._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    time.sleep(0.2)
    assert worker.is_alive() and [next(loader).item() for _ in range(9)] == [*range(1, 10)]
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
