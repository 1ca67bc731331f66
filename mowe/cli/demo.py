"""`mowe demo`: the whole way from bundled clips to answers, and what packing saves on it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import torch
from rich.console import Group
from rich.text import Text

from mowe.cli._answers import answers
from mowe.cli._inputs import Clip, LoadedModel, load_model, read_clips
from mowe.cli._routing import draw, route, routing_table
from mowe.cli._screen import Screen, model_heading, printable
from mowe.demo import Comparison, compare
from mowe.files import check_folder, make_folder

PROMPT = "What do you hear?"
_NEW_TOKENS = 16
_RUNS = 3
_BAR = 16  # characters


def run(out: Path, screen: Screen) -> None:
    check_folder(out, "--out")
    clips, expected = bundled_clips(screen), bundled_answers()
    loaded = load_model(None, screen)
    with screen.step("routing"):
        routes = route(loaded, clips)
    with screen.step("answering"):
        texts = answers(loaded, clips, PROMPT, _NEW_TOKENS)
    comparison = compare(
        loaded.model.model.mixture.pool,
        [clip.wave for clip in clips],
        [window.encoders for window in routes],
        _RUNS,
        lambda rounds: screen.track(rounds, "timing"),
    )
    with screen.step("drawing"):
        picture = make_folder(out, "--out") / "routing.png"
        draw(loaded, routes, picture)
    screen.result(
        {
            "device": loaded.device.type,
            "clips": [
                {
                    "file": clip.file,
                    "seconds": clip.seconds,
                    "encoders": window.encoders,
                    "weights": window.weights,
                    "text": text,
                    "expected": answer,
                    "right": text == answer,
                }
                for clip, window, text, answer in zip(clips, routes, texts, expected, strict=True)
            ],
            "right": sum(text == answer for text, answer in zip(texts, expected, strict=True)),
            "seconds_packed": comparison.seconds_packed,
            "seconds_per_clip": comparison.seconds_per_clip,
            "speedup": comparison.speedup,
            "max_abs_diff": comparison.max_abs_diff,
            "trained": loaded.trained,
        },
        _heading(loaded, clips),
        model_heading(None),
        Text(),
        routing_table(loaded, routes, [_marked(*pair) for pair in zip(texts, expected, strict=True)]),
        Text(),
        _timing(comparison),
        Text(),
        Text(printable(f"picture of the routing: {picture}")),
    )


def bundled_clips(screen: Screen) -> list[Clip]:
    """The clips of the package, one window each."""
    with as_file(files("mowe") / "assets" / "clips") as folder:
        listed = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
        clips = read_clips([folder / clip["file"] for clip in listed], screen)
    return [replace(clip, file=Path(clip.file).name) for clip in clips]


def bundled_answers() -> list[str]:
    """What is right to say about each of them."""
    listed = (files("mowe") / "assets" / "clips" / "clips.json").read_text(encoding="utf-8")
    return [clip["answer"] for clip in json.loads(listed)]


def _marked(text: str, expected: str) -> Text:
    """An answer with the mark it gets, and the right one where it is wrong."""
    if text == expected:
        return Text.assemble(("✓ ", "green"), (printable(text), "italic"))
    return Text.assemble(("✗ ", "red"), (printable(text), "italic"), (f" (is: {expected})", "dim"))


def _heading(loaded: LoadedModel, clips: list[Clip]) -> Text:
    seconds = sum(clip.seconds for clip in clips)
    threads = torch.get_num_threads()
    where = f"{threads} CPU thread{'s' * (threads > 1)}" if loaded.device.type == "cpu" else "the GPU"
    return Text(f"{len(clips)} clips, {seconds:.1f} s of sound, on {where}", style="bold")


def _timing(comparison: Comparison) -> Group:
    """Two bars and the difference, each saying what was compared."""
    jobs = (
        ("packed", comparison.seconds_packed, "green", "every clip at its own length"),
        ("clip by clip", comparison.seconds_per_clip, "red", "transformers, Whisper padded to 30 s"),
    )
    longest = max(seconds for _, seconds, _, _ in jobs)
    bars = []
    for job, seconds, color, how in jobs:
        bar = "━" * max(1, round(_BAR * seconds / longest))
        bars.append(Text.assemble(f"  {job:<12} {seconds:6.2f} s  ", (f"{bar:<{_BAR}}", color), f"  {how}"))
    speed = f"  {comparison.speedup:.1f} times as fast"
    same = f"  the same features to {comparison.max_abs_diff:.0e} where both pad Whisper to 30 s (largest difference)"
    return Group(
        Text(f"features of the chosen encoders, from waveforms (median of {_RUNS} runs)", style="bold"),
        *bars,
        Text(speed, style="bold green"),
        Text(same),
    )
