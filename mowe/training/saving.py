"""Folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mowe.errors import CheckpointError


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` once it is complete.

    Raises CheckpointError where writing fails (a full disk); what was there before stays as it was.
    """
    unfinished = unfinished_name(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with writing(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unfinished_name(folder: Path) -> Path:
    return folder.with_name(f"unfinished-{folder.name}")


def replace(new: Path, folder: Path) -> None:
    """Put a complete folder in the place of another one. A kill in between leaves the old one under `replaced-`."""
    old = folder.with_name(f"replaced-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make one line of whatever torch, safetensors and the system raise when a file cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: cannot be saved: {told}; what was saved before is whole") from error
