"""What the tests of the command line share: a way to run it, sound files and a saved model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

from mowe.cli import app
from mowe.nano import nano_model

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `mowe` with the arguments in this process."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="mowe")
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with noise.wav (1.5 s), hum.flac (0.7 s, stereo, 44.1 kHz) and long.wav (31 s)."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal(31 * 16_000)
    hum = 0.3 * np.sin(2 * np.pi * 110 * np.arange(30_870) / 44_100)
    soundfile.write(folder / "noise.wav", noise[:24_000], 16_000)
    soundfile.write(folder / "hum.flac", np.stack((hum, hum), axis=1), 44_100)
    soundfile.write(folder / "long.wav", noise, 16_000)
    return folder


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, processor = nano_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
