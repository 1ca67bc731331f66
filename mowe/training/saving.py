"""Folders that appear whole or not at all, whatever happens while they are written; and how they are read again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from mowe.checkpoint import reading
from mowe.errors import CheckpointError, naming


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` once it is complete.

    Raises CheckpointError where writing fails (a full disk); what was there before stays as it was.
    """
    with writing(folder):
        target = folder.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f"{unfinished_name(target).name}-", dir=target.parent))
        try:
            new = place / target.name  # what mkdtemp made is closed to others
            new.mkdir()
            yield new
            replace(new, target)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def unfinished_name(folder: Path) -> Path:
    return folder.with_name(f"unfinished-{folder.name}")


def replace(new: Path, folder: Path) -> None:
    """Put a complete folder in the place of another one, which a kill in between leaves beside it as `replaced-`."""
    old = new.with_name(f"replaced-{folder.name}")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make one line of whatever torch, safetensors and the system raise when a file cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: cannot be saved: {told}; what was saved before is whole") from error


@contextmanager
def reading_checkpoint(folder: str | None) -> Iterator[None]:
    """Make one line that names the folder of whatever is raised for a file in it that is missing or damaged."""
    with naming(f"{folder}"), reading("the checkpoint"):
        yield


def read_trained(checkpoint: str, names: Collection[str]) -> dict[str, Tensor]:
    """What has been trained up to a checkpoint. Raises CheckpointError where that is not the parameters named."""
    trained = load_file(Path(checkpoint, SAFE_WEIGHTS_NAME))
    if odd := sorted(trained.keys() ^ set(names)):
        raise CheckpointError(
            f"{len(odd)} parameters of {SAFE_WEIGHTS_NAME} are missing or not of this run, such as {odd[0]}"
        )
    return trained
