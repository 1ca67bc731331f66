"""The clocks of every measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_SHORT = 100e-6  # seconds under which launching would be measured in the place of running
_WARM_UP = 3


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

    What takes less than 100 us is captured in a CUDA graph and replayed, where it can be captured.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties().L2_cache_size
        self._other = torch.empty(4 * size, dtype=torch.uint8, device="cuda")
        self._graphs: dict[Callable[[], Any], Callable[[], Any]] = {}

    def __call__(self, run: Callable[[], Any]) -> float:
        if run not in self._graphs:
            self._graphs[run] = _captured(run) if self._seconds(run) < _SHORT else run
        return self._seconds(self._graphs[run])

    def _seconds(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a graph; as it is where it waits for the device, which no graph can hold."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run
    return graph.replay
