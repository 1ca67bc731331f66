"""Whatever is wrong, one line says so, the exit code is 2, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.mowe.cli.conftest import Run


def refused(run: Run, *arguments: object) -> str:
    """The one line with which a command fails."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def write(path: Path, samples: np.ndarray, rate: int = 16_000, **settings: str) -> None:
    soundfile.write(path, samples, rate, **settings)


def cut(path: Path) -> None:
    write(path, 0.1 * np.random.default_rng(0).standard_normal(32_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_sample(value: float) -> Callable[[Path], None]:
    samples = np.zeros(16_000, dtype=np.float32)
    samples[5] = value
    return lambda path: write(path, samples, subtype="FLOAT")


BAD_AUDIO: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("a.wav", lambda path: None, "no such file"),
    "folder": ("a.wav", Path.mkdir, "directory"),
    "too long a name": (300 * "a", lambda path: None, "cannot be read (File name too long)"),
    "empty": ("a.wav", Path.touch, "empty"),
    "without samples": ("a.wav", lambda path: write(path, np.zeros(0)), "no samples"),
    "text": ("a.wav", lambda path: path.write_text("not audio at all\n" * 99), "not audio"),
    "text as mp3": ("a.mp3", lambda path: path.write_text("not audio at all\n" * 99), "not audio"),
    "header alone": ("a.wav", lambda path: (cut(path), path.write_bytes(path.read_bytes()[:30])), "not audio"),
    "cut wav": ("a.wav", cut, "truncated"),
    "cut flac": ("a.flac", cut, "truncated"),
    "cut ogg": ("a.ogg", cut, "truncated"),
    "cut mp3": ("a.mp3", cut, "truncated"),
    "NaN": ("a.wav", with_sample(np.nan), "NaN or infinite"),
    "infinite": ("a.wav", with_sample(np.inf), "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD_AUDIO)
@pytest.mark.parametrize("command", [("routes",), ("generate", "--prompt", "What is it?")], ids=("routes", "generate"))
def test_bad_audio(
    run: Run, sounds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: tuple[str, ...], case: str
) -> None:
    name, make, reason = BAD_AUDIO[case]
    file = tmp_path / name
    make(file)
    before = sorted(tmp_path.iterdir())
    for form in ((), ("--json",)):
        line = refused(run, *command, sounds / "noise.wav", file, *form)
        assert str(file) in line and reason in line
    assert sorted(tmp_path.iterdir()) == before
    assert capfd.readouterr().err == ""  # what decoders write past Python


def test_bad_audio_leaves_the_last_picture(run: Run, sounds: Path, tmp_path: Path) -> None:
    picture = tmp_path / "routes.png"
    picture.write_bytes(b"the last one")
    assert "no such file" in refused(run, "routes", sounds / "missing.wav", "--picture", picture)
    assert picture.read_bytes() == b"the last one"
    assert list(tmp_path.iterdir()) == [picture]


def test_a_name_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    assert refused(run, "routes", tmp_path / "a\x1b[31m\nb.wav").endswith(
        "a\N{REPLACEMENT CHARACTER}[31m b.wav: no such file\n"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("routes",), "AUDIO"),
        (("routes", "noise.wav", "--bogus"), "--bogus"),
        (("routes", "noise.wav", "--picture"), "--picture"),
        (("routes", "noise.wav", "--picture", "x.docx"), "x.docx"),
        (("routes", "noise.wav", "--picture", "."), "directory"),
        (("routes", "noise.wav", "--picture", "nowhere/x.png"), "nowhere"),
        (("generate", "noise.wav"), "--prompt"),
        (("generate", "noise.wav", "--prompt", " "), "--prompt"),
        (("generate", "noise.wav", "--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "noise.wav", "--prompt", "x", "--max-new-tokens", "many"), "--max-new-tokens"),
        (
            ("generate", "noise.wav", "--prompt", "and <|audio|>?"),
            "--prompt: the audio is put before the prompt, leave <",
        ),
        (("demo", "surplus"), "surplus"),
        (("demo", "--out", "noise.wav"), "--out noise.wav"),
        (("demo", "--out", "noise.wav/folder"), "--out noise.wav/folder"),
        (("info", "--model"), "--model"),
        (("info", "--model", 300 * "x"), "File name too long"),
        (("routes", "noise.wav", "--picture", 300 * "x" + ".png"), "File name too long"),
        (("demo", "--out", 300 * "x"), "File name too long"),
        (("listen",), "listen"),
        (("--bogus",), "--bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options(
    run: Run, sounds: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(sounds)
    before = sorted(sounds.iterdir())
    assert named in refused(run, *arguments)
    assert sorted(sounds.iterdir()) == before


def edited(**settings: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return edit


def shortened(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:500])


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "no such folder"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), "not a folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "cut config": (shortened("config.json"), "config.json"),
    "not a config": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
    "other model": (edited(model_type="llama"), "'llama'"),
    "attached": (
        lambda folder: (edited(model_type="qwen2_audio")(folder), (folder / "mowe_config.json").touch()),
        "got 'qwen2_audio'; models with an attached mixture are for Python alone",
    ),
    "unknown key": (edited(router_temprature=1.0), "router_temprature"),
    "too many slots": (edited(num_dependent_slots=9), "num_dependent_slots"),
    "empty pool": (edited(pool_config={"encoders": []}), "pool"),
}
BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (shortened("model.safetensors"), ""),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ""),
    "cut tokenizer": (shortened("tokenizer.json"), ""),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json"),
}


@pytest.mark.parametrize(
    ("command", "case"),
    [("routes", case) for case in (*BAD_MODELS, *BAD_WEIGHTS)] + [("info", case) for case in BAD_MODELS],
)
def test_bad_model(run: Run, sounds: Path, saved_model: Path, tmp_path: Path, command: str, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_model, folder)
    spoil, named = (BAD_MODELS | BAD_WEIGHTS)[case]
    spoil(folder)
    files = [sounds / "noise.wav"] if command == "routes" else []
    line = refused(run, command, *files, "--model", folder)
    assert str(folder) in line and named in line
