"""`mowe quantize`: a model folder in 4 bits, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from mowe.cli._inputs import Clip, LoadedModel, load_model, read_clips, skeleton
from mowe.cli._quality import Comparison, compare, hear, memory
from mowe.cli._screen import Screen, model_heading, printable
from mowe.errors import ConfigError
from mowe.files import check_folder
from mowe.quantization import DEFAULT_PARTS, MoweQuantizationConfig, quantize


def run(
    folder: Path,
    out: Path,
    audio: Sequence[Path],
    paths: Sequence[Path],
    max_new_tokens: int,
    parts: Sequence[str],
    double_quant: bool,
    screen: Screen,
) -> None:
    from mowe.cli import _tasks
    from mowe.training.saving import whole

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: expected a new or empty folder to write to")
    check_folder(out, "OUT")
    chosen = MoweQuantizationConfig(parts or DEFAULT_PARTS).parts  # refused before anything is loaded
    if audio:
        clips = read_clips(audio, screen)
    else:
        from mowe.cli.demo import bundled_clips

        clips = bundled_clips(screen)
    manifests = _tasks.read(paths, screen)
    before = _tasks.answered(load_model(folder, screen), manifests, max_new_tokens, screen) if manifests else None
    loaded, comparison = quantized(folder, clips, screen, chosen, double_quant)
    data = comparison.as_data()
    tables: list[RenderableType] = [comparison.report()]
    if before:
        tasks = _tasks.Change(before, _tasks.answered(loaded, manifests, max_new_tokens, screen))
        _tell(tasks.warnings(), screen)
        data, tables = {**data, "tasks": tasks.as_data()}, [*tables, Text(), tasks.report()]
    with screen.step("saving"), whole(out) as unfinished:
        loaded.model.save_pretrained(unfinished)
        loaded.processor.save_pretrained(unfinished)
    screen.result(
        {"model": str(folder), "out": str(out), **data},
        model_heading(folder),
        Text(),
        *tables,
        Text(),
        Text(printable(f"saved in {out}")),
    )


def quantized(
    folder: Path | None,
    clips: Sequence[Clip],
    screen: Screen,
    parts: Sequence[str] = DEFAULT_PARTS,
    double_quant: bool = True,
) -> tuple[LoadedModel, Comparison]:
    """A model in 4 bits, and what that does to its memory and its audio embeddings, warned of where bad.

    The language model, which the embeddings do not depend on, is quantised while it is read, the encoders after they
    have been listened to: at no time is more in memory than the language model in 4 bits and the encoders in full.
    """
    encoders = [part for part in parts if part in ("audio_tower", "pool")]
    texts = [part for part in parts if part not in encoders]
    before = memory(skeleton(folder))
    loaded = load_model(folder, screen, texts, double_quant)
    with screen.step("listening"):
        heard = hear(loaded, clips)
    if encoders:
        with screen.step("quantising"):
            quantize(loaded.model, parts=encoders, double_quant=double_quant)
    with screen.step("listening again"):
        quality = compare(heard, hear(loaded, clips))
    _tell(quality.warnings(), screen)
    return loaded, Comparison(before, memory(loaded.model), quality, len(clips))


def _tell(warnings: Sequence[str], screen: Screen) -> None:
    for warning in warnings:
        screen.note(warning)
