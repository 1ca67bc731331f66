"""The clocks of every measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_SLEEP, _LONGEST_SLEEP = 10_000_000, 80_000_000  # cycles; ten million are 5 to 8 ms


def now() -> float:
    """Seconds on a clock, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def host_seconds(run: Callable[[], Any]) -> float:
    """What a run takes, from the call to the end of all that it asked of a GPU."""
    start = now()
    run()
    return now() - start


class DeviceClock:
    """Seconds of a run on the GPU alone, its L2 cache filled with something else before every run.

    The GPU sleeps first, while the host asks for what the run needs: not to launch is measured but to run. Where it
    woke before the host was done, the run is measured again after twice the sleep, up to a limit for runs that wait for
    the GPU themselves.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._sleep = _SLEEP
        self._other = torch.empty(4 * size, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> float:
        seconds, woke_early = self._time(run)
        while woke_early and self._sleep < _LONGEST_SLEEP:
            self._sleep *= 2
            seconds, woke_early = self._time(run)
        return seconds

    def _time(self, run: Callable[[], Any]) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._sleep)
        self._other.zero_()
        start.record()
        run()
        woke_early = start.query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, woke_early
