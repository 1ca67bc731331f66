"""`mowe generate`: one answer a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from mowe.cli._answers import answers
from mowe.cli._inputs import load_model, read_clips
from mowe.cli._screen import Screen, model_heading, printable
from mowe.data import check_prompt
from mowe.errors import ConfigError, naming

_BATCH = 8  # clips answered together


def run(
    files: Sequence[Path],
    prompt: str,
    folder: Path | None,
    max_new_tokens: int,
    load_in_4bit: bool,
    screen: Screen,
) -> None:
    if not prompt.strip():
        raise ConfigError("--prompt: expected some text, got none")
    clips = read_clips(files, screen)
    data: dict[str, Any] = {}
    tables: list[RenderableType] = []
    if load_in_4bit:
        from mowe.cli.quantize import quantized

        loaded, comparison = quantized(folder, clips, screen)
        data, tables = {"quantization": comparison.as_data()}, [Text(), comparison.report()]
    else:
        loaded = load_model(folder, screen)
    with naming("--prompt"):
        check_prompt(prompt, loaded.processor.audio_token)
    texts = []
    for first in screen.track(range(0, len(clips), _BATCH), "answering"):
        texts += answers(loaded, clips[first : first + _BATCH], prompt, max_new_tokens)
    lines = [
        Text.assemble((f"{printable(clip.file)}:", "bold"), f" {printable(text)}")
        for clip, text in zip(clips, texts, strict=True)
    ]
    screen.result(
        {
            "device": loaded.device.type,
            "model": loaded.folder and str(loaded.folder),
            "trained": loaded.trained,
            "clips": [
                {"file": clip.file, "seconds": clip.seconds, "text": text}
                for clip, text in zip(clips, texts, strict=True)
            ],
            **data,
        },
        model_heading(folder),
        *lines,
        *tables,
    )
