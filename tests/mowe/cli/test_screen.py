"""Results go to stdout, everything else to stderr, and nothing steers the terminal."""

from __future__ import annotations

import errno
import io
import json

import pytest
import torch
from rich.text import Text
from typer.testing import CliRunner

from mowe.cli import app
from mowe.cli._screen import Screen, printable
from mowe.errors import ConfigError, Terminated


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Ünïcode आज 音", "Ünïcode आज 音"),
        ("two\nlines\tand\rmore", "two lines and more"),
        ("\x1b[2Jgone\x07", "\ufffd[2Jgone\ufffd"),
        ("right\u202eleft", "right\ufffdleft"),
        ("\udc80", "\ufffd"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_result(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=True).result({"file": "\udc80ü"}, Text("for people"))
    assert json.loads(capsys.readouterr().out) == {"file": "\udc80ü"}
    Screen(as_json=False).result({"file": "x"}, Text("for [bold]people " * 20))
    said = capsys.readouterr()
    assert said.out == "for [bold]people " * 20 + "\n"
    assert said.err == ""


def test_json_never_holds_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=True).result({"weights": [float("nan"), 1.0], "of": {"all": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"weights": [None, 1.0], "of": {"all": None}}


class Unwritable(io.StringIO):
    """A stream that keeps what it is given until it is flushed, and then fails."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_under_stdout_is_told(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr("sys.stdout", Unwritable(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ConfigError, match=r"^stdout: the result cannot be written \(No space left on device\)$"):
        Screen(as_json).result({}, Text("for people"))


def test_a_reader_that_has_gone_is_left_to_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Unwritable(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with pytest.raises(BrokenPipeError):
        Screen(as_json=True).result({})


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_is_off_away_from_a_terminal(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    screen = Screen(as_json)
    with screen.step("thinking"):
        assert list(screen.track(range(3), "counting")) == [0, 1, 2]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_progress_shows_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(as_json=False)
    assert list(screen.track(range(3), "counting")) == [0, 1, 2]
    screen.note("careful")
    said = capsys.readouterr()
    assert said.out == ""
    assert "counting" in said.err and "note: careful" in said.err


@pytest.mark.parametrize(
    ("stopped", "code", "told"),
    [(KeyboardInterrupt(), 130, "Ctrl-C; go on"), (Terminated(), 143, "SIGTERM; go on")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, stopped: KeyboardInterrupt, code: int, told: str
) -> None:
    def run(*args: object) -> None:
        stopped.add_note("go on")
        raise stopped

    monkeypatch.setattr("mowe.cli.info.run", run)
    done = CliRunner().invoke(app, ["info"])
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"error: stopped by {told}\n")


def test_a_gpu_without_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. ...")

    monkeypatch.setattr("mowe.cli.info.run", run)
    done = CliRunner().invoke(app, ["info"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: this needs more memory than the GPU has: give it fewer or shorter clips at a time\n"
