"""The clips and their manifests: five tasks, three splits, unseen voices and phrases outside of training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import soundfile

from mowe.errors import DataError
from recipes.nano import sounds
from recipes.nano.speech import ACCENTS, ENGLISH, MANNERS, RATE, SPEAKERS, draw_voice, speak
from recipes.nano.texts import TEST, TRAIN, VALIDATION, command, sentence

PROMPTS = {
    "asr": ("What is said?", "Write down the speech."),
    "voice": ("Who is speaking?", "What voice is this?"),
    "emotion": ("How is it said?", "What mood is the speaker in?"),
    "language": ("Which language is spoken?", "What language is this?"),
    "sound": ("What do you hear?", "Describe the sound."),
}
TASKS = tuple(PROMPTS)

SIZES = {
    TRAIN: {"asr": 4000, "voice": 800, "emotion": 1200, "language": 1800, "sound": 1800},
    VALIDATION: {task: 60 for task in TASKS},
    TEST: {task: 150 for task in TASKS},
}

_JOINED = 0.08  # of the clips whose task allows it, this share is two or three sentences long


def build(out: Path, seed: int, workers: int, track: Callable[[Iterable[Any], int], Iterable[Any]]) -> None:
    """Write `out`/{train,validation,test}.jsonl and their clips; a finished split is left as it is.

    track: wraps the clips as they are done, given their number, for a progress bar. The same seed gives the same clips
    with the same espeak-ng. Raises DataError without espeak-ng.
    """
    if shutil.which("espeak-ng") is None:
        raise DataError("espeak-ng is not installed, which speaks the clips (Debian, Ubuntu: apt install espeak-ng)")
    for split, sizes in SIZES.items():
        manifest = out / f"{split}.jsonl"
        if manifest.exists():
            continue
        (out / split).mkdir(parents=True, exist_ok=True)
        jobs = [(out, seed, split, task, i) for task, size in sizes.items() for i in range(size)]
        with ProcessPoolExecutor(workers) as pool:
            rows = list(track(pool.map(make_clip, jobs, chunksize=16), len(jobs)))
        partial = manifest.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(manifest)


def make_clip(job: tuple[Path, int, str, str, int]) -> dict[str, str]:
    """Make clip `index` of a task, write it and return its line of the manifest."""
    out, seed, split, task, index = job
    random = Random(f"{seed} {split} {task} {index}")
    draw = np.random.default_rng(random.getrandbits(64))
    wave, answer, clean = _MAKERS[task](random, draw, split)
    file = f"{split}/{task}-{index:04}.flac"
    soundfile.write(out / file, _weathered(wave, random, draw, clean), RATE)
    prompt = PROMPTS[task][0 if split != TRAIN else random.randrange(len(PROMPTS[task]))]
    return {"audio": file, "task": task, "prompt": prompt, "answer": answer}


def _weathered(wave: np.ndarray, random: Random, draw: np.random.Generator, clean: bool) -> np.ndarray:
    """The clip as a microphone would have it. clean: what lies in the background is part of the answer already."""
    before, after = (np.zeros(int(random.uniform(0, 0.15) * RATE)) for _ in range(2))
    wave = np.concatenate((before, wave, after))
    if not clean and random.random() < 0.35:
        noise = sounds.NOISES[random.randrange(len(sounds.NOISES))](draw, len(wave))
        wave = sounds.mix(wave, noise, random.uniform(18, 35))
    if random.random() < 0.25:
        wave = sounds.telephone(wave)
    return sounds.level(wave, random.uniform(0.2, 0.8))


Made = tuple[np.ndarray, str, bool]


def _asr(random: Random, draw: np.random.Generator, split: str) -> Made:
    text = command(random, split)
    voice = draw_voice(random.choice(SPEAKERS[:3]), random, split)
    return speak(text, random.choice(ENGLISH), voice, random), text, False


def _voice(random: Random, draw: np.random.Generator, split: str) -> Made:
    speaker = random.choice(SPEAKERS)
    text = command(random, split)
    return speak(text, random.choice(ENGLISH), draw_voice(speaker, random, split), random), speaker, False


def _emotion(random: Random, draw: np.random.Generator, split: str) -> Made:
    mood = random.choice(tuple(MANNERS))
    voice = draw_voice(random.choice(SPEAKERS[:2]), random, split)
    voice = type(voice)(voice.variant, random.randint(46, 54), voice.size)  # the melody is what tells, not the voice
    return speak(command(random, split), random.choice(ENGLISH), voice, random, MANNERS[mood]), mood, False


def _language(random: Random, draw: np.random.Generator, split: str) -> Made:
    language, _, wave = _foreign(random, split)
    return wave, language, False


def _foreign(random: Random, split: str) -> tuple[str, str, np.ndarray]:
    """A language, who speaks it, and the speech."""
    language, speaker = random.choice(tuple(ACCENTS)), random.choice(SPEAKERS[:2])
    voice, accent = draw_voice(speaker, random, split), random.choice(ACCENTS[language])
    parts = random.randint(2, 3) if random.random() < _JOINED else 1
    said = [speak(sentence(language, random, split), accent, voice, random) for _ in range(parts)]
    return language, speaker, np.concatenate(said)


def _sound(random: Random, draw: np.random.Generator, split: str) -> Made:
    kind = random.random()
    samples = int(random.uniform(1.2, 3.0) * RATE)
    background = random.choice(tuple(sounds.BACKGROUNDS))
    if kind < 0.3:
        language, speaker, wave = _foreign(random, split)
        answer = f"{speaker} speaking {language}"
        if random.random() < 0.6:
            return wave, answer, False
        return _before(wave, background, random, draw), f"{answer} and {background}", True
    if kind < 0.5:
        event = random.choice(tuple(sounds.EVENTS))
        wave = sounds.EVENTS[event](draw, samples)
        return _before(wave, background, random, draw), f"{event} and {background}", True
    sound = random.choice((*sounds.EVENTS, *sounds.BACKGROUNDS))
    make = {**sounds.EVENTS, **sounds.BACKGROUNDS}[sound]
    return make(draw, samples), sound, sound in sounds.BACKGROUNDS


def _before(wave: np.ndarray, background: str, random: Random, draw: np.random.Generator) -> np.ndarray:
    """The wave before a background that can be heard well."""
    return sounds.mix(wave, sounds.BACKGROUNDS[background](draw, len(wave)), random.uniform(0, 8))


_MAKERS: dict[str, Callable[[Random, np.random.Generator, str], Made]] = {
    "asr": _asr,
    "voice": _voice,
    "emotion": _emotion,
    "language": _language,
    "sound": _sound,
}


def read(folder: Path, split: str, tasks: Iterable[str] = TASKS) -> list[dict[str, Any]]:
    """The lines of a split that belong to the tasks, their audio as paths."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row | {"audio": folder / row["audio"]} for row in rows if row["task"] in tasks]
