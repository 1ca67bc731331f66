"""The clock of every measurement."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds on a clock, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
