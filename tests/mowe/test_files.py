"""A file appears whole or not at all, and what was there before survives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mowe.errors import ConfigError
from mowe.files import check_file, check_folder, make_folder, whole_file, write_text


def test_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "å", "the text")
    assert (tmp_path / "a.txt").read_bytes() == "å".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_file_before(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught, whole_file(file, "the text") as partial:
        partial.write_text("half")
        assert file.read_text() == "before"
        raise error
    if expected is ConfigError:
        assert str(caught.value) == f"{file}: the text cannot be written (No space left on device)"
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("there.txt", "new.txt"):
        link, file = tmp_path / name, tmp_path / "folder" / name
        link.symlink_to(file)
        if name == "there.txt":
            file.write_text("before")
        write_text(link, "after", "the text")
        assert link.is_symlink() and file.read_text() == "after"
    assert len(list((tmp_path / "folder").iterdir())) == 2
    (tmp_path / "lost.txt").symlink_to(tmp_path / "none" / "a.txt")
    with pytest.raises(ConfigError, match=r"lost\.txt: its folder does not exist"):
        write_text(tmp_path / "lost.txt", "after", "the text")


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for refuse in (check_file, lambda path, what: write_text(path, "a", what)):
        with pytest.raises(ConfigError, match="pipe: expected a file to write the text to, got a special file"):
            refuse(pipe, "the text")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_checked_beforehand(tmp_path: Path) -> None:
    check_file(tmp_path / "new.txt", "the text")
    check_folder(tmp_path / "new" / "folder", "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for path, told in ((tmp_path, "directory"), (tmp_path / "no" / "a.txt", "folder does not exist")):
        with pytest.raises(ConfigError, match=told):
            check_file(path, "the text")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        for refuse in (check_folder, make_folder):
            with pytest.raises(ConfigError, match=f"--out {path}: "):
                refuse(path, "--out")


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the one who runs tests may be allowed everything
    for check, path, option in ((check_file, tmp_path / "a", "the text"), (check_folder, tmp_path / "b", "--out")):
        with pytest.raises(ConfigError, match="cannot be written to"):
            check(path, option)
