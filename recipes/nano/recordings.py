"""Real recordings as a test from another world: the prompts of Debian's asterisk-core-sounds packages (CC BY-SA).

Five professional speakers on the telephone (8 kHz), with the texts they read. Nothing of it is ever trained on.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from random import Random

from mowe.audio import load_audio
from mowe.errors import MoweError
from recipes.nano.data import PROMPTS

SOUNDS = Path("/usr/share/asterisk/sounds")
TEXTS = Path("/usr/share/doc")

# folder of sounds, language, who speaks
SPEAKERS = {
    "en": ("en_US_f_Allison", "English", "a woman"),
    "es": ("es_MX_f_Allison", "Spanish", "a woman"),
    "fr": ("fr_CA_f_June", "French", "a woman"),
    "it": ("it_IT_m_Carlo", "Italian", "a man"),
    "ru": ("ru_RU_f_IvrvoiceRU", "Russian", "a woman"),
}
SECONDS = 1.2, 4.0
CLIPS = 60  # of each speaker


def build(out: Path, seed: int) -> bool:
    """Write `out`/recordings.jsonl, which names the files where they are; returns whether the packages are there."""
    if not all((SOUNDS / folder).is_dir() for folder, _, _ in SPEAKERS.values()):
        return False
    rows = []
    for code, (folder, language, speaker) in SPEAKERS.items():
        clips = []
        for name, text in _texts(code):
            file = SOUNDS / folder / f"{name}.wav"
            try:
                seconds = len(load_audio(file)) / 16_000
            except MoweError:
                continue
            if SECONDS[0] <= seconds <= SECONDS[1]:
                clips.append((file, text))
        for file, text in Random(f"{seed} {code}").sample(clips, min(CLIPS, len(clips))):
            answers = {"language": language, "voice": speaker, **({"asr": text} if code == "en" else {})}
            for task, answer in answers.items():
                rows.append({"audio": str(file), "task": task, "prompt": PROMPTS[task][0], "answer": answer})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "recordings.jsonl").write_text("".join(lines), encoding="utf-8")
    return True


def _texts(code: str) -> list[tuple[str, str]]:
    """Name and text of each prompt; texts in brackets say what is heard, not what is said."""
    file = TEXTS / f"asterisk-core-sounds-{code}" / f"core-sounds-{code}.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace").splitlines()
    found = (re.fullmatch(r"([\w/-]+):\s*(\w.*)", line.strip()) for line in lines)
    return [(match[1], " ".join(re.sub(r"[^\w' ]", " ", match[2].lower()).split())) for match in found if match]
