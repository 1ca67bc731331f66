"""The picture of the routing: whole or not there, and any name can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mowe.errors import ConfigError
from mowe.plots import Route, routing_picture

ENCODERS = ["Whisper 0", "HuBERT 1"]
ROUTES = [Route("speech.wav", [0, 1], [0.6, 0.4]), Route("rain.wav", [0, 0], [0.6, 0.9])]


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".pdf", b"%PDF"), (".jpg", b"\xff\xd8")]
)
def test_the_suffix_picks_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"routes{suffix}"
    routing_picture(path, ROUTES, ENCODERS, 1)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_named(tmp_path: Path) -> None:
    routing_picture(tmp_path / "routes.svg", ROUTES, ENCODERS, 1, title="Routes", subtitle="of $2$ clips")
    drawn = (tmp_path / "routes.svg").read_text(encoding="utf-8")
    for text in (
        "speech.wav",
        "rain.wav",
        "Whisper 0",
        "HuBERT 1",
        "Routes",
        "of $2$ clips",
        "0.40",
        "0.90",
        "84%",
        "16%",
    ):
        assert f"<!-- {text} -->" in drawn


@pytest.mark.parametrize("label", ["$x_1$", "आज.wav", "a" * 300, "", "-->"])
def test_any_label(tmp_path: Path, label: str, recwarn: pytest.WarningsRecorder) -> None:
    routing_picture(tmp_path / "routes.png", [Route(label, [1], [1.0])], ENCODERS, 0)
    assert (tmp_path / "routes.png").stat().st_size > 1000
    assert not recwarn.list


def test_many_clips_and_one_encoder(tmp_path: Path) -> None:
    routing_picture(tmp_path / "routes.png", [Route(f"{i}.wav", [0], [1.0]) for i in range(100)], ["Whisper 0"], 1)
    assert (tmp_path / "routes.png").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_last_picture_survives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "routes.png"
    path.write_bytes(b"the last one")

    def fail(self: Figure, target: Path, **settings: Any) -> None:
        target.write_bytes(b"half a pict")
        raise error

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises((ConfigError, KeyboardInterrupt)) as raised:
        routing_picture(path, ROUTES, ENCODERS, 1)
    if isinstance(error, OSError):
        assert str(raised.value) == f"{path}: the picture cannot be written (No space left on device)"
    assert path.read_bytes() == b"the last one"
    assert list(tmp_path.iterdir()) == [path]
