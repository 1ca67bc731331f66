"""The demo: what it tells scripts and people, and that its two timings are of the same features."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text

from mowe.cli._routing import WindowRoute, routing_table
from mowe.demo import Comparison, PerClipDispatch, compare, max_abs_diff
from mowe.nano import nano_model
from mowe.pool import EncoderPool
from tests.mowe.babbler import babbler
from tests.mowe.cli.conftest import Run

CLIPS = json.loads((Path(__file__).parents[3] / "mowe" / "assets" / "clips" / "clips.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pool() -> EncoderPool:
    return babbler()[0].model.mixture.pool


@pytest.fixture(scope="module")
def waveforms() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(samples, generator=generator) for samples in (20_000, 9_000)]


def test_json(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mowe.cli.demo._RUNS", 1)
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    said = json.loads(result.stdout)
    assert list(said) == [
        "device", "clips", "right", "seconds_packed", "seconds_per_clip", "speedup", "max_abs_diff", "trained"
    ]  # fmt: skip
    assert said["trained"] is True
    assert [(clip["file"], clip["seconds"]) for clip in said["clips"]] == [(c["file"], c["seconds"]) for c in CLIPS]
    for clip in said["clips"]:
        assert list(clip) == ["file", "seconds", "encoders", "weights", "text", "expected", "right"]
        assert len(clip["encoders"]) == len(clip["weights"]) == 2
        assert all(0.25 <= weight <= 1 for weight in clip["weights"])
        assert clip["right"] is (clip["text"] == clip["expected"])
    assert [clip["expected"] for clip in said["clips"]] == [clip["answer"] for clip in CLIPS]
    assert said["right"] == sum(clip["right"] for clip in said["clips"]) > len(CLIPS) / 2
    assert len({tuple(clip["encoders"]) for clip in said["clips"]}) > 1
    assert said["speedup"] == pytest.approx(said["seconds_per_clip"] / said["seconds_packed"])
    assert 0 < said["max_abs_diff"] < 1e-4
    assert (tmp_path / "mowe-demo" / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "mowe-demo").iterdir()] == ["routing.png"]


def test_for_people(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mowe.cli.demo.compare", lambda *arguments: Comparison(0.25, 2.0, 3e-6))
    result = run("demo", "--out", tmp_path / "here" / "pictures")
    assert result.exit_code == 0 and result.stderr == ""
    assert all(clip["file"] in result.stdout for clip in CLIPS)
    for told in ("test split", "✓", "0.25 s", "2.00 s", "8.0 times", "3e-06", "padded to 30 s"):
        assert told in result.stdout
    assert str(tmp_path / "here" / "pictures" / "routing.png") in result.stdout
    assert (tmp_path / "here" / "pictures" / "routing.png").is_file()


def test_both_sides_compute_the_same_features(pool: EncoderPool, waveforms: list[torch.Tensor]) -> None:
    indices = [[0, 3], [2, 1]]
    dispatch = PerClipDispatch(pool)
    with torch.inference_mode():
        assert max_abs_diff(pool, dispatch, waveforms, indices) < 1e-5
        features = dispatch(waveforms, indices)
        assert {pair: list(rows.shape) for pair, rows in features.items()} == {
            (0, 0): [1500, 128], (0, 3): [62, 128], (1, 2): [27, 128], (1, 1): [1500, 128]
        }  # fmt: skip
        dispatch.encoders[3] = dispatch.encoders[2]
        assert max_abs_diff(pool, dispatch, waveforms, indices) > 0.1


def test_an_encoder_two_slots_chose_runs_once(pool: EncoderPool, waveforms: list[torch.Tensor]) -> None:
    dispatch = PerClipDispatch(pool)
    calls = []
    dispatch.encoders[2].register_forward_hook(lambda *_: calls.append(2))
    dispatch(waveforms, [[2, 2], [0, 2]])
    assert calls == [2, 2]


def test_compare_takes_the_median_of_the_rounds(
    pool: EncoderPool, waveforms: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # start and stop of packed and per clip, three rounds: packed 1, 2, 9; per clip 10, 30, 20 seconds
    clock = iter([0, 1, 1, 11, 20, 22, 22, 52, 60, 69, 69, 89])
    monkeypatch.setattr("mowe.demo.time.perf_counter", lambda: next(clock))
    rounds: list[int] = []

    def track(items: Iterable[int]) -> Iterable[int]:
        for item in items:
            rounds.append(item)
            yield item

    comparison = compare(pool, waveforms, [[0, 3], [2, 1]], runs=3, track=track)
    assert (comparison.seconds_packed, comparison.seconds_per_clip, comparison.speedup) == (2, 20, 10)
    assert len(rounds) == 4
    assert comparison.max_abs_diff < 1e-5


@pytest.mark.parametrize("width", [72, 80, 81, 100])
def test_the_table_keeps_every_character(width: int) -> None:
    loaded: Any = SimpleNamespace(
        model=nano_model()[0], encoder_names=["HuBERT 0", "HuBERT 1", "Whisper 2", "Whisper 3"]
    )
    routes = [WindowRoute("english_short.flac", 0.0, 1.69, [2, 3], [0.38, 0.65])]
    console = Console(file=io.StringIO(), width=width)
    answer = "a woman speaking English (is: a man speaking English)"
    console.print(routing_table(loaded, routes, [Text(answer)]))
    said = console.file.getvalue()
    assert sorted(answer.replace(" ", "")) == sorted(
        "".join(line[64:] for line in said.splitlines()[2:]).replace(" ", "")
    )
