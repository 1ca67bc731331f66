"""Recordings of people, from packages of Debian, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile

from tests.mowe.cli.conftest import Run

ALSA = Path("/usr/share/sounds/alsa")  # 48 kHz
ASTERISK = Path("/usr/share/asterisk/sounds/en")  # 8 kHz
FOLDERS = {"alsa-utils": ALSA, "asterisk-core-sounds-en-wav": ASTERISK}


def recordings(package: str) -> list[Path]:
    files = sorted(FOLDERS[package].glob("*.wav"), key=lambda file: (-file.stat().st_size, file.name))
    if not files:
        pytest.skip(f"the package {package} is not installed")
    return files[:: max(1, len(files) // 6)][:6]  # from the longest to the shortest


@pytest.mark.parametrize("package", FOLDERS)
def test_routes(run: Run, package: str) -> None:
    files = recordings(package)
    result = run("routes", *files, "--json")
    assert result.exit_code == 0
    assert not result.stderr or all(line.startswith("note: ") for line in result.stderr.splitlines())
    clips = json.loads(result.stdout)["clips"]
    for file in files:
        windows = [clip for clip in clips if clip["file"] == str(file)]
        told = soundfile.info(file)
        assert sum(window["seconds"] for window in windows) == pytest.approx(told.frames / told.samplerate, abs=2e-3)
        for window in windows:
            assert len(window["encoders"]) == len(window["weights"]) == 2
            assert all(0 <= encoder < 4 for encoder in window["encoders"])
            assert all(0.25 <= weight <= 1 for weight in window["weights"])  # the largest of four shares
    assert len({clip["encoders"][0] for clip in clips}) == 1
    assert len({clip["weights"][1] for clip in clips}) == len(clips)


@pytest.mark.parametrize("package", FOLDERS)
def test_generate(run: Run, package: str) -> None:
    files = recordings(package)[:3]
    result = run("generate", *files, "--prompt", "What is said?", "--max-new-tokens", 6, "--json")
    assert result.exit_code == 0
    clips = json.loads(result.stdout)["clips"]
    assert [clip["file"] for clip in clips] == [str(file) for file in files]
    assert all(0 < len(clip["text"].split()) <= 6 for clip in clips)
