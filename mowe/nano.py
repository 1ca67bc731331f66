"""The model that ships with the package: every part of an AudioLLM, small, trained by `recipes/nano` on made clips."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mowe.modeling_mowe import MoweForConditionalGeneration
from mowe.processing_mowe import MoweProcessor

_FOLDER = files("mowe") / "assets" / "nano"


def nano_folder() -> AbstractContextManager[Path]:
    """The folder that the model is saved in, for as long as the context lasts."""
    return as_file(_FOLDER)


def nano_model() -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """The model, in float32 and evaluation mode, and its processor.

    A Whisper encoder smaller than Whisper-tiny as base; a pool of two HuBERT and two Whisper encoders; one slot of each
    router; the paper's `conv` projector; a Llama of three layers. What it was trained on and how right it is:
    mowe/assets/nano/README.md.
    """
    with nano_folder() as folder:
        model = MoweForConditionalGeneration.from_pretrained(folder, dtype="float32", local_files_only=True)
        return model.eval(), MoweProcessor.from_pretrained(folder, local_files_only=True)


def nano_scores() -> dict[str, dict[str, Any]]:
    """How right the model is on the test split of its recipe: of each task its metric, value and number of clips."""
    return json.loads((_FOLDER / "scores.json").read_text(encoding="utf-8"))
