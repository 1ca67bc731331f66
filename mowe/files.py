"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mowe.errors import ConfigError


@contextmanager
def whole_file(path: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` if nothing fails. what: what errors call the file.

    Where `path` is a link, the file that it points to is replaced.
    Raises ConfigError where the system refuses to write or something else than a file is there; what was there before
    stays as it was.
    """
    check_file(path, what)
    file = Path(os.path.realpath(path))
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors lets nobody else read what it writes
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, what: str) -> None:
    """Write a text in UTF-8, whole or not at all; see `whole_file`."""
    with whole_file(path, what) as partial:
        partial.write_text(text, encoding="utf-8")


def check_file(path: str | os.PathLike[str], what: str) -> None:
    """Raise ConfigError for a path no file can be written to, before anything is computed."""
    file = Path(os.path.realpath(path))
    if file.exists() and not file.is_file():
        kind = "a directory" if file.is_dir() else "a special file"
        raise ConfigError(f"{path}: expected a file to write {what} to, got {kind}")
    if not file.parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist")
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{path}: its folder cannot be written to")


def make_folder(path: str | os.PathLike[str], option: str) -> Path:
    """The folder, made if it was not there. Raises ConfigError, naming the option, where it cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path}: the folder cannot be made ({error.strerror})") from None
    return path


def check_folder(path: str | os.PathLike[str], option: str) -> None:
    """Raise ConfigError for a path that is not a folder and cannot become one, before anything is computed."""
    path = Path(path)
    there = next(found for found in (path, *path.absolute().parents) if found.exists())
    if not there.is_dir():
        raise ConfigError(f"{option} {path}: not a folder, nor can it become one")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{option} {path}: {there} cannot be written to")
