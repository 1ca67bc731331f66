"""Manifests of tones whose pitch is the answer, and a tiny model that can learn it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from tests.mowe.audio_llm import processor_of, tiny_model

TONES = {"low": 220, "mid": 440, "high": 880}


def write_manifest(folder: Path, name: str, clips: int, seed: int) -> Path:
    """A manifest of tones of 0.1 to 0.4 s: their pitch is the answer, and every other clip is of the task `any`."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(clips):
        word, hz = list(TONES.items())[i % 3]
        samples = int(16_000 * rng.uniform(0.1, 0.4))
        wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(samples) / 16_000) + 0.01 * rng.standard_normal(samples)
        soundfile.write(folder / f"{name}{i}.wav", wave, 16_000)
        task = "any" if i % 2 else word
        lines.append(json.dumps({"audio": f"{name}{i}.wav", "task": task, "prompt": "?", "answer": word}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def make_tones(folder: Path) -> Path:
    """Put train.jsonl (12 clips), valid.jsonl (4 clips) and model/, with its processor, into the folder."""
    write_manifest(folder, "train", 12, seed=0)
    write_manifest(folder, "valid", 4, seed=1)
    model = tiny_model()
    model.save_pretrained(folder / "model")
    processor_of(model).save_pretrained(folder / "model")
    return folder
