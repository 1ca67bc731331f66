"""Result files: one JSON a part or a run, each with what it was made with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from recipes.nano.settings import SETTINGS


def write_result(path: Path, data: dict[str, Any]) -> None:
    """With the settings of the lab, the versions and the device; whole or not at all."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    data |= {"settings": asdict(SETTINGS), "versions": versions, "device": device}
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
