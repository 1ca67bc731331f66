"""Make the demo's clips in mowe/assets/clips with espeak-ng (speech) and SoX (tones and noise): mono, 16 kHz, FLAC.

Run from the repository root. The same versions of the two programs give the same samples again: SoX keeps its random
seed fixed under -R, and nothing is dithered.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CLIPS = Path("mowe/assets/clips")

# name: (espeak-ng voice, words a minute, language, description, text)
SPEECH = {
    "english_us": (
        "en-us+m3",
        165,
        "en",
        "American English, man",
        "The mixture picks a few small encoders for every "
        "clip it hears, and the large one listens to them all. Which ones would you have picked?",
    ),
    "english_gb": (
        "en-gb-x-rp+f1",
        155,
        "en",
        "British English, woman",
        "The next train to the coast leaves from platform four.",
    ),
    "german": ("de+m7", 160, "de", "German, man", "Heute scheint die Sonne, aber am Abend soll es regnen."),
    "french": ("fr-fr+f4", 160, "fr", "French, woman", "Je voudrais deux cafés et un verre d'eau, s'il vous plaît."),
    "spanish": ("es+m1", 170, "es", "Spanish, man", "¿Dónde está la biblioteca más cercana?"),
    "hindi": ("hi+f3", 165, "hi", "Hindi, woman", "आज मौसम बहुत अच्छा है।"),
    "english_short": ("en-gb-scotland+f5", 150, "en", "Scottish English, woman, one short answer", "Yes, of course!"),
}

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "hi": "Hindi"}

# name: (description, what a model should hear, SoX effects on silence; " : " starts the next sound after the last)
SOUNDS = {
    "melody": (
        "five plucked notes", "a melody",
        " : ".join(f"synth 0.45 pluck {note}" for note in ("C4", "E4", "G4", "A4", "G4")),
    ),
    "siren": (
        "a siren, up and down twice", "a siren",
        " : ".join(["synth 0.7 sine 500-1300", "synth 0.7 sine 1300-500"] * 2),
    ),
    "rain": (
        "rain-like noise", "rain", "synth 2.5 pinknoise highpass 400 lowpass 5000 tremolo 0.5 60 fade 0.2 2.5 0.4"
    ),
    "knocks": (
        "five knocks on wood", "knocks",
        "synth 0.12 brownnoise highpass 80 fade l 0.002 0.12 0.11 pad 0 0.28 repeat 4",
    ),
}  # fmt: skip


def sox(*arguments: str | Path) -> None:
    subprocess.run(["sox", "-R", "-D", "-V1", *map(str, arguments)], check=True)


def finish(source: Path, target: Path) -> float:
    """Write `source` as a mono 16 kHz FLAC with its peak at -6 dBFS; return its length in seconds."""
    sox(source, "-C", "8", "-b", "16", "--comment", "", target, "channels", "1", "rate", "16k", "norm", "-6")
    return round(float(subprocess.run(["soxi", "-D", target], check=True, capture_output=True).stdout), 3)


def main() -> None:
    missing = [program for program in ("espeak-ng", "sox") if shutil.which(program) is None]
    if missing:
        sys.exit(f"make_clips: {' and '.join(missing)} not found (Debian, Ubuntu: apt install {' '.join(missing)})")
    if not CLIPS.is_dir():
        sys.exit(f"make_clips: no folder {CLIPS} here; run it from the repository root")
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.wav"
        made = Path(folder) / "made"
        made.mkdir()

        def add(name: str, description: str, answer: str, text: str | None, language: str | None) -> None:
            file = f"{name}.flac"
            seconds = finish(raw, made / file)
            entry = {"file": file, "seconds": seconds, "description": description, "answer": answer}
            clips.append({**entry, "text": text, "language": language})
            print(f"{file:22} {seconds:6.2f} s  {description}")

        for name, (voice, rate, language, description, text) in SPEECH.items():
            subprocess.run(["espeak-ng", "-v", voice, "-s", str(rate), "-w", raw, text], check=True)
            speaker = "a woman" if "+f" in voice else "a man"
            add(name, description, f"{speaker} speaking {LANGUAGES[language]}", text, language)
        for name, (description, answer, effects) in SOUNDS.items():
            sox("-n", "-r", "16000", "-b", "32", raw, *effects.split())
            add(name, description, answer, None, None)
        for old in CLIPS.glob("*.flac"):
            old.unlink()
        shutil.copytree(made, CLIPS, dirs_exist_ok=True)
    (CLIPS / "clips.json").write_text(json.dumps(clips, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
