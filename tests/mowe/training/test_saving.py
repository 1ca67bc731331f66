"""Folders appear whole or not at all, and nothing else beside them is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from mowe.errors import CheckpointError
from mowe.training.saving import replace, whole


def test_folders_of_similar_names_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("unfinished-out", "replaced-out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    with whole(out) as unfinished:
        (unfinished / "new").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "out", "out/new", "replaced-out", "replaced-out/mine", "unfinished-out", "unfinished-out/mine"
    ]  # fmt: skip
    assert out.stat().st_mode == (tmp_path / "replaced-out").stat().st_mode


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with whole(Path(".")) as unfinished:
        (unfinished / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "new").exists()


def test_what_cannot_be_replaced_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError):
        replace(tmp_path / "none", tmp_path / "out")
    with pytest.raises(CheckpointError, match="cannot be saved: full"), whole(tmp_path / "out"):
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
