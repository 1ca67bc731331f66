"""What the tests of training share: a tiny saved model, manifests of tones, and runs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mowe.training import TrainConfig
from mowe.training.fields import as_config
from tests.mowe.training.tones import make_tones


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture
def settings(tones: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A small run, with other fields where they are given."""

    def settings(**fields: Any) -> TrainConfig:
        data = {
            "train": [{"manifest": str(tones / "train.jsonl")}],
            "batch_clips": 4,
            "workers": 0,
            **fields.pop("data", {}),
        }
        run = {
            "model": str(tones / "model"),
            "output": str(tmp_path / "run"),
            "stages": [{"steps": 2, "learning_rate": 1e-2}],
            "log_every": 1,
            **fields,
            "data": data,
        }
        return as_config(TrainConfig, run)

    return settings
