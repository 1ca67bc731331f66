"""Jobs of the lab in processes of their own, several at once. On a GPU too: one small model does not fill it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

_GPU_BYTES = 4 << 30  # of its memory for a process, most of it what CUDA and its libraries take


def do(what: str, job: Callable[..., None], arguments: Sequence[tuple[Any, ...]], workers: int, device: str) -> None:
    """Call the job with each of the arguments, the first of which is not shown.

    device: auto, cpu or cuda. Raises BadParameter for another, and for cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be auto, cpu or cuda, got {device}")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: there is no GPU")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if torch.cuda.is_available():
        workers = max(1, min(workers, torch.cuda.get_device_properties(0).total_memory // _GPU_BYTES))
    context = multiprocessing.get_context("spawn")
    screen = Console(stderr=True)
    with ProcessPoolExecutor(workers, context, _be_quiet) as pool:
        started = time.perf_counter()
        names = {pool.submit(job, *given): " ".join(map(str, given[1:])) for given in arguments}
        for done in track(as_completed(names), f"{what}s", len(names), console=screen):
            done.result()
            screen.print(f"{what} {names[done]}: done after {time.perf_counter() - started:.0f} s")


def _be_quiet() -> None:
    """What happens inside of a job is not shown: it would be many bars at once."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
