"""Predictions in the form that AudioBench (https://github.com/AudioLLMs/AudioBench) keeps and scores.

Its `src/main_evaluate.py` keeps the predictions of a model on a dataset in `log_for_all_models/MODEL/DATASET.json`, and
scores that file without running the model where it is there: a list of samples in the order of the dataset, each with
`instruction`, `reference`, `task_type` and `model_prediction` (as of June 2025).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mowe.files import write_text

if TYPE_CHECKING:
    from mowe.data import Example

_TASK_TYPES = {"asr": "ASR", "accent": "AR", "emotion": "ER", "gender": "GR", "sound": "AC"}  # others keep their name


def write_predictions(folder: Path, dataset: str, answered: Sequence[tuple[Example, str]]) -> Path:
    """Write the examples of a dataset and their answers, in its order, to `folder`/`dataset`.json; returns the file."""
    samples = [
        {
            "instruction": example.prompt,
            "reference": example.answer,
            "task_type": _TASK_TYPES.get(example.task, example.task),
            "model_prediction": answer,
        }
        for example, answer in answered
    ]
    file = folder / f"{dataset}.json"
    write_text(file, json.dumps(samples, indent=4, ensure_ascii=False), "the predictions")
    return file
