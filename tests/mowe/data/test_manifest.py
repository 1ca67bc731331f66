"""Manifests of both kinds are read alike, and every bad line of one is told before anything runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch

from mowe.audio import load_audio
from mowe.data import Example, read_manifest
from mowe.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with clips/a.wav (1 s), clips/b.flac (0.5 s at 44.1 kHz) and short.wav (10 ms)."""
    (tmp_path / "clips").mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(22_050)
    soundfile.write(tmp_path / "clips" / "a.wav", noise[:16_000], 16_000)
    soundfile.write(tmp_path / "clips" / "b.flac", noise, 44_100)
    soundfile.write(tmp_path / "short.wav", noise[:160], 16_000)
    return tmp_path


ROWS: list[dict[str, Any]] = [
    {"audio": "clips/a.wav", "task": "asr", "prompt": "What is said?", "answer": "red", "voice": "v1"},
    {"audio": "clips/b.flac", "task": "language", "prompt": "Which language?", "answer": "Türkçe", "voice": "v2"},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"\n".join(s if isinstance(s, bytes) else json.dumps(s).encode() for s in lines) + b"\n")
    return path


def fails(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_manifest(path, **settings)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_lines_become_examples(folder: Path) -> None:
    manifest = read_manifest(write(folder / "m.jsonl", [ROWS[0], b"", ROWS[1]]))
    assert [e.line for e in manifest] == [1, 3] and len(manifest) == 2 and not manifest.skipped
    assert [e.samples for e in manifest] == [16_000, 8_000]
    second = manifest[1]
    assert (second.task, second.prompt, second.answer) == ("language", "Which language?", "Türkçe")
    assert second.more == {"voice": "v2"}
    assert torch.equal(second.waveform(), load_audio(folder / "clips" / "b.flac"))


def test_absolute_paths(folder: Path) -> None:
    path = write(folder / "clips" / "m.jsonl", [{**ROWS[0], "audio": str(folder / "clips" / "a.wav")}])
    assert read_manifest(path)[0].samples == 16_000


def test_a_byte_order_mark_is_no_part_of_the_first_line(folder: Path) -> None:
    path = write(folder / "m.jsonl", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [example.answer for example in read_manifest(path)] == ["red", "Türkçe"]


def test_a_short_clip_counts_as_it_is_encoded(folder: Path) -> None:
    with pytest.warns(UserWarning, match="under 25 ms"):
        assert read_manifest(write(folder / "m.jsonl", [{**ROWS[0], "audio": "short.wav"}]))[0].samples == 16_000


@pytest.mark.parametrize("stored", ["paths", "bytes", "paths in an Audio feature"])
def test_datasets_on_disk(folder: Path, stored: str) -> None:
    rows = [dict(row) for row in ROWS]
    if stored == "bytes":
        for row in rows:
            row["audio"] = {"bytes": (folder / row["audio"]).read_bytes(), "path": None}
    elif stored != "paths":
        for row in rows:
            row["audio"] = {"bytes": None, "path": str(folder / row["audio"])}
    table = datasets.Dataset.from_list(rows)
    if stored != "paths":
        table = table.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())
    else:
        table = table.map(lambda row: {"audio": "../" + row["audio"]})
    table.save_to_disk(folder / "set")
    got = read_manifest(folder / "set", tasks={"asr", "language"})
    expected = read_manifest(write(folder / "m.jsonl", ROWS))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.waveform(), other.waveform())
        assert (one.task, one.prompt, one.answer, one.line, one.samples, one.more) == (
            other.task, other.prompt, other.answer, other.line, other.samples, other.more,
        )  # fmt: skip


@pytest.fixture
def bad(folder: Path) -> list[Any]:
    (folder / "fake.wav").write_bytes(b"no audio at all" * 20)
    (folder / "cut.flac").write_bytes((folder / "clips" / "b.flac").read_bytes()[:9_000])
    (folder / "empty.wav").touch()
    good = ROWS[0]
    return [
        good,
        {**good, "audio": "clips/none.wav"},
        {**good, "audio": "fake.wav"},
        {**good, "audio": "cut.flac"},
        {**good, "audio": "empty.wav"},
        {**good, "answer": " \n"},
        {**good, "task": "asrr"},
        {"audio": "clips/a.wav", "task": "asr"},
        {**good, "prompt": 3},
        {**good, "audio": None},
        {**good, "audio": "clips"},
        b"{not json",
        b"\xff\xfe",
        ["a", "list"],
        {**good, "answer": "half \ud83d"},
        {**good, "audio": "\ud83d.wav"},
    ]


EXPECTED = {
    2: "none.wav: no such file",
    3: "fake.wav: not audio",
    4: "cut.flac: truncated",
    5: "empty.wav: an empty file",
    6: "the answer is empty",
    7: "unknown task 'asrr'; known: asr, language",
    8: "no prompt and no answer",
    9: "prompt must be a text, got 3",
    10: "audio must be a path, got None",
    11: "expected an audio file, got a directory",
    12: "not JSON",
    13: "not JSON in UTF-8",
    14: "expected an object, got list",
    15: "answer holds half of a character, '\\ud83d'",
    16: "audio holds half of a character, '\\ud83d'",
}


def test_bad_lines_are_told_together(folder: Path, bad: list[Any]) -> None:
    message = fails(write(folder / "m.jsonl", bad), tasks=("language", "asr"))
    assert message.startswith("15 bad of 16 lines: line 2: ")
    assert all(f"line {line}: " in message for line in range(2, 7)) and "line 7" not in message
    assert message.endswith("; and 10 more")


def test_skipped_lines_are_counted_and_told(folder: Path, bad: list[Any]) -> None:
    manifest = read_manifest(write(folder / "m.jsonl", bad), tasks=["asr", "language"], skip_bad=True)
    assert [e.line for e in manifest] == [1]
    assert len(manifest.skipped) == len(EXPECTED)
    for told, (line, expected) in zip(manifest.skipped, EXPECTED.items(), strict=True):
        assert told.startswith(f"line {line}: ") and expected in told


def test_damage_in_the_middle_is_found_by_decoding(folder: Path) -> None:
    samples = np.zeros(8_000, np.float32)
    samples[4_000] = np.nan
    soundfile.write(folder / "nan.wav", samples, 16_000, subtype="FLOAT")
    flac = bytearray((folder / "clips" / "b.flac").read_bytes())
    middle = len(flac) // 2
    flac[middle : middle + 2_000] = bytes(2_000)
    (folder / "damaged.flac").write_bytes(flac)
    path = write(folder / "m.jsonl", [ROWS[0], *({**ROWS[0], "audio": name} for name in ("nan.wav", "damaged.flac"))])
    assert len(read_manifest(path)) == 3
    assert fails(path, decode=True).startswith("2 bad of 3 lines: line 2: ")
    assert [e.line for e in read_manifest(path, skip_bad=True, decode=True)] == [1]


def test_a_manifest_that_cannot_be_used_at_all(folder: Path, bad: list[Any]) -> None:
    assert fails(folder / "none.jsonl") == "the manifest cannot be read (No such file or directory)"
    assert fails(write(folder / "m.jsonl", [b"", b" "])) == "no line that can be used, it is empty"
    assert "no line that can be used: line 1: " in fails(write(folder / "m.jsonl", bad[1:3]), skip_bad=True)
    assert "not a dataset that was saved to disk" in fails(folder / "clips")


def test_datasets_that_cannot_be_used(folder: Path) -> None:
    table = datasets.Dataset.from_list([dict(row) for row in ROWS])
    datasets.DatasetDict(train=table, test=table).save_to_disk(folder / "splits")
    assert "holds the splits train, test; name the folder of one, as " in fails(folder / "splits")
    table.remove_columns(["task", "answer"]).save_to_disk(folder / "columns")
    assert fails(folder / "columns").startswith("no column task and answer; there are audio, prompt, voice")
    assert fails(folder / "splits" / "train").startswith("2 bad of 2 rows: row 1: ")


def test_progress_counts_the_clips(folder: Path) -> None:
    lengths: list[int] = []
    read_manifest(write(folder / "m.jsonl", ROWS), track=lambda jobs: lengths.append(len(jobs)) or jobs)
    assert lengths == [2]


def test_a_line_that_is_a_text_is_no_error_message(folder: Path) -> None:
    assert fails(write(folder / "m.jsonl", ["just words"])) == "1 bad of 1 lines: line 1: expected an object, got str"


def test_ctrl_c_does_not_wait_for_all_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []

    def look(example: Example) -> int:
        time.sleep(0.05)
        looked_at.append(example)
        return 1

    def interrupted(jobs: Sequence[Any]) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Example, "count_samples", look)
    with pytest.raises(KeyboardInterrupt):
        read_manifest(write(folder / "m.jsonl", 100 * [ROWS[0]]), track=interrupted)
    assert len(looked_at) < 50
