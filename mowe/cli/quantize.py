"""`mowe quantize`: a model folder in 4 bits, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from mowe.cli._inputs import Clip, LoadedModel, load_model, naming, read_clips
from mowe.cli._quality import Quality, compare, hear, memory, report
from mowe.cli._screen import Screen, model_heading, printable
from mowe.errors import ConfigError


def run(
    folder: Path, out: Path, audio: Sequence[Path], parts: Sequence[str], double_quant: bool, screen: Screen
) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: expected a new or empty folder to write to")
    if audio:
        clips = read_clips(audio, screen)
    else:
        from mowe.cli.demo import bundled_clips

        clips = bundled_clips(screen)
    loaded = load_model(folder, screen)
    before, after, quality = quantize_and_compare(loaded, clips, screen, parts=parts, double_quant=double_quant)
    with screen.step("saving"), naming(out):
        loaded.model.save_pretrained(out)
        loaded.processor.save_pretrained(out)
    screen.result(
        {"model": str(folder), "out": str(out), **as_data(before, after, quality)},
        model_heading(folder),
        Text(),
        report(before, after, quality, len(clips)),
        Text(),
        Text(printable(f"saved in {out}")),
    )


def quantize_and_compare(
    loaded: LoadedModel, clips: Sequence[Clip], screen: Screen, **settings: Any
) -> tuple[dict[str, int], dict[str, int], Quality]:
    """Put a model in 4 bits in place; returns its memory before and after, and the quality, warned of where bad."""
    from mowe.quantization import quantize

    with screen.step("listening"):
        before, heard = memory(loaded.model), hear(loaded, clips)
    with screen.step("quantising"):
        quantize(loaded.model, **settings)
    with screen.step("listening again"):
        quality = compare(heard, hear(loaded, clips))
    for warning in quality.warnings():
        screen.note(warning)
    return before, memory(loaded.model), quality


def as_data(before: dict[str, int], after: dict[str, int], quality: Quality) -> dict[str, Any]:
    """The same for scripts."""
    return {"bytes_before": before, "bytes_4bit": after, "quality": asdict(quality)}
