"""Speech from espeak-ng: voices of each split, accents, and five ways to say something."""

from __future__ import annotations

import io
import subprocess
from dataclasses import dataclass
from random import Random

import numpy as np
import soundfile
import soxr

from recipes.nano.texts import TEST, TRAIN, VALIDATION

RATE = 16_000

ENGLISH = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
ACCENTS = {
    "English": ENGLISH,
    "German": ("de",),
    "French": ("fr-fr", "fr-be", "fr-ch"),
    "Spanish": ("es", "es-419"),
    "Italian": ("it",),
    "Russian": ("ru",),
    "Hindi": ("hi",),
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# espeak-ng's variants of a voice. Those of the bundled clips are unseen: m1, m3, m7, f1, f3, f4, f5.
MEN = {
    TRAIN: _names(
        "adam Alex Andy antonio benjamin boris caleb david Denis Diogo edward Gene gustave Henrique Hugo iven john "
        "Lee marcelo Marco max michel Mike norbert pablo paul quincy rob robert sandro m2 m4 m5 m8"
    ),
    VALIDATION: _names("Jacky Mario victor iven2"),
    TEST: _names("m1 m3 m6 m7 Michael miguel travis pedro ed iven3"),
}
WOMEN = {
    TRAIN: _names("Alicia Andrea anika aunty belinda f2 linda steph grandma"),
    VALIDATION: _names("Annie steph2"),
    TEST: _names("f1 f3 f4 f5 steph3"),
}
WHISPERS = {TRAIN: ("whisper",), VALIDATION: ("whisper",), TEST: ("whisperf",)}
SPEAKERS = ("a man", "a woman", "a child", "a whisper")


@dataclass(frozen=True)
class Voice:
    """variant: of espeak-ng. pitch: 0 to 99, 50 is the variant's own. size: above 1 every formant lies higher."""

    variant: str
    pitch: int
    size: float


@dataclass(frozen=True)
class Manner:
    """How something is said. speed, pitch: against neutral speech, as a factor and in espeak-ng's steps. span: range of
    the melody in per cent. tremor: depth of a trembling at 6 Hz. harsh: how far the wave is driven into distortion.
    """

    speed: float = 1.0
    pitch: int = 0
    span: int = 100
    tremor: float = 0.0
    harsh: float = 0.0


MANNERS = {
    "calm": Manner(),
    "happy": Manner(speed=1.2, pitch=22, span=190),
    "sad": Manner(speed=0.75, pitch=-18, span=35),
    "angry": Manner(speed=1.15, pitch=4, span=130, harsh=6.0),
    "afraid": Manner(speed=1.05, pitch=12, tremor=0.7),
}


def draw_voice(speaker: str, random: Random, split: str) -> Voice:
    """A voice of one of SPEAKERS that belongs to the split."""
    if speaker == "a man":
        return Voice(random.choice(MEN[split]), random.randint(35, 65), random.uniform(0.93, 1.06))
    if speaker == "a whisper":
        return Voice(random.choice(WHISPERS[split]), 50, random.uniform(0.92, 1.15))
    variant = random.choice(WOMEN[split])
    if speaker == "a woman":
        return Voice(variant, random.randint(38, 60), random.uniform(0.95, 1.06))
    return Voice(variant, random.randint(70, 95), random.uniform(1.22, 1.38))


def speak(text: str, accent: str, voice: Voice, random: Random, manner: Manner = MANNERS["calm"]) -> np.ndarray:
    """[samples] float32 at 16 kHz."""
    words_a_minute = round(random.uniform(155, 190) * manner.speed / voice.size)
    pitch = min(99, max(0, voice.pitch + manner.pitch))
    marked = f'<speak><prosody range="{manner.span}%">{text}</prosody></speak>'
    command = ["espeak-ng", "-m", "-v", f"{accent}+{voice.variant}", "-s", str(words_a_minute), "-p", str(pitch)]
    said = subprocess.run([*command, "--stdout"], input=marked.encode(), capture_output=True, check=True).stdout
    wave, rate = soundfile.read(io.BytesIO(said), dtype="float32")
    # Played faster, a voice becomes that of a smaller body; it was told to speak slower by as much.
    wave = soxr.resample(_trimmed(wave), rate * voice.size, RATE)
    if manner.harsh:
        wave = np.tanh(manner.harsh * wave / (np.abs(wave).max() + 1e-6)) * 0.5
    if manner.tremor:
        phase = random.uniform(0, 2 * np.pi)
        wave = wave * (1 - manner.tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 6 * np.arange(len(wave)) / RATE + phase)))
    return wave.astype(np.float32)


def _trimmed(wave: np.ndarray) -> np.ndarray:
    """Without the silence before and after."""
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1]
