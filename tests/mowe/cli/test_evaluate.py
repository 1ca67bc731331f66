"""`mowe evaluate`: what it says and writes, and how bad input ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mowe.data import read_manifest
from mowe.evaluation import evaluate
from mowe.nano import nano_model
from tests.mowe.babbler import babbler
from tests.mowe.cli.conftest import Run

FEW = ("--max-new-tokens", 4)
ROWS = [
    {"audio": "hum.wav", "task": "asr", "prompt": "What is said?", "answer": "one two"},
    {"audio": "noise.wav", "task": "mood", "prompt": "What mood?", "answer": "sad"},
    {"audio": "hum.wav", "task": "mood", "prompt": "What mood?", "answer": "Sad"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two clips and good.jsonl, which has three examples of two tasks."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(tmp_path / "noise.wav", noise, 16_000)
    soundfile.write(tmp_path / "hum.wav", 0.1 * np.sin(np.arange(11_200) / 20), 16_000)
    write(tmp_path / "good.jsonl", ROWS)
    return tmp_path


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(run: Run, *arguments: object) -> str:
    result = run("evaluate", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_cut_answers_are_told(run: Run, folder: Path) -> None:
    model, processor = babbler()
    model.save_pretrained(folder / "babbler")
    processor.save_pretrained(folder / "babbler")
    result = run("evaluate", folder / "good.jsonl", *FEW, "--model", folder / "babbler", "--json")
    assert result.exit_code == 0
    assert result.stderr == "note: 3 answers were cut at 4 tokens (--max-new-tokens)\n"


def test_for_scripts(run: Run, folder: Path) -> None:
    good = folder / "good.jsonl"
    result = run("evaluate", good, "--max-new-tokens", 24, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    said = json.loads(result.stdout)
    assert said.keys() == {
        "device", "model", "trained", "load_in_4bit", "manifests", "skipped", "tasks", "overall", "unfinished"
    }  # fmt: skip
    report = evaluate(*nano_model(), read_manifest(good), max_new_tokens=24)
    assert {name: said[name] for name in ("tasks", "overall", "unfinished")} == report.as_data()
    assert (said["manifests"], said["skipped"], said["trained"]) == ([str(good)], 0, True)
    assert {name: task["metric"] for name, task in said["tasks"].items()} == {"asr": "wer", "mood": "accuracy"}


def test_for_people(run: Run, folder: Path) -> None:
    result = run("evaluate", folder / "good.jsonl", *FEW, "--metric", "asr=cer/none")
    assert result.exit_code == 0
    assert "the demo model" in result.stdout
    for word in ("asr", "mood", "all tasks", "CER", "accuracy", "macro-F1", "exact match", "score"):
        assert word in result.stdout, word


def test_files(run: Run, folder: Path, saved_model: Path) -> None:
    before = set(folder.iterdir())
    other = write(folder / "other.jsonl", ROWS[1:])
    out, bench, predictions = folder / "out", folder / "bench" / "nano", folder / "p.jsonl"
    options = ("--out", out, "--audiobench", bench, "--predictions", predictions, "--model", saved_model)
    result = run("evaluate", folder / "good.jsonl", other, "--tasks", "mood", *FEW, *options, "--json")
    assert result.exit_code == 0
    assert json.loads((out / "report.json").read_text()) == json.loads(result.stdout)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert predictions.read_text() == (out / "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [(line["manifest"], line["line"], line["answer"]) for line in lines] == [
        (str(folder / "good.jsonl"), 2, "sad"), (str(folder / "good.jsonl"), 3, "Sad"),
        (str(other), 1, "sad"), (str(other), 2, "Sad"),
    ]  # fmt: skip
    assert [line["audio"] for line in lines] == [str(folder / name) for name in ("noise.wav", "hum.wav")] * 2
    assert lines[0]["prediction"] == lines[2]["prediction"] != lines[1]["prediction"] == lines[3]["prediction"]
    kept = json.loads((bench / "other.json").read_text())
    assert [(sample["reference"], sample["model_prediction"]) for sample in kept] == [
        (line["answer"], line["prediction"]) for line in lines[2:]
    ]
    assert {path.name for path in bench.iterdir()} == {"good.json", "other.json"}
    assert set(folder.iterdir()) == before | {other, out, bench.parent, predictions}


def test_in_four_bits(run: Run, folder: Path) -> None:
    result = run("evaluate", folder / "good.jsonl", *FEW, "--load-in-4bit", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["load_in_4bit"] is True


def test_bad_lines_are_told_or_skipped(run: Run, folder: Path) -> None:
    (folder / "cut.wav").write_bytes((folder / "noise.wav").read_bytes()[:9000])
    samples = np.zeros(16_000, np.float32)
    samples[8_000] = np.nan
    soundfile.write(folder / "nan.wav", samples, 16_000, subtype="FLOAT")
    changes = [{"audio": "gone.wav"}, {"audio": "cut.wav"}, {"audio": "nan.wav"}, {"answer": " "}]
    bad = write(folder / "bad.jsonl", [*ROWS, *({**ROWS[0], **change} for change in changes)])
    line = refused(run, bad, "--out", folder / "out")
    reasons = (
        "4 bad of 7",
        "line 4: ",
        "gone.wav",
        "line 5: ",
        "truncated",
        "line 6: ",
        "NaN",
        "line 7: the answer is",
    )
    for told in reasons:
        assert told in line, told
    assert not (folder / "out").exists()
    result = run("evaluate", bad, "--skip-bad", *FEW, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["skipped"] == 4
    assert "left out: " in result.stderr and "lines of manifests left out: 4" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("gone.jsonl",), "gone.jsonl"),
        (("empty.jsonl",), "empty"),
        (("good.jsonl", "--metric", "asr=bleu"), "metric must be one of wer,"),
        (("good.jsonl", "--metric", "asr=wer/latin"), "normalisation must be one of words,"),
        (("good.jsonl", "--metric", "asr"), "TASK=METRIC"),
        (("good.jsonl", "--metric", "singing=wer"), "no example has the task 'singing'; there are asr, mood"),
        (("good.jsonl", "--tasks", "mood, singing"), "no example has the task 'singing'; there are asr, mood"),
        (("token.jsonl",), "token.jsonl: line 2: the audio is put before the prompt, leave <|audio|> out"),
        (("good.jsonl", "--model", "nowhere"), "nowhere: no such folder"),
        (("good.jsonl", "--predictions", "."), "directory"),
        (("good.jsonl", "--predictions", "nowhere/p.jsonl"), "its folder does not exist"),
        (("good.jsonl", "--out", "hum.wav"), "--out hum.wav"),
        (("good.jsonl", "--audiobench", "hum.wav/x"), "--audiobench hum.wav/x"),
        (("good.jsonl", "good.jsonl", "--audiobench", "x"), "more than one manifest is called good"),
        (("good.jsonl", "--batch-frames", "0"), "--batch-frames"),
        ((), "MANIFEST"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").touch()
    write(folder / "token.jsonl", [ROWS[0], {**ROWS[1], "prompt": "hi <|audio|>"}])
    before = sorted(folder.iterdir())
    assert told in refused(run, *arguments)
    assert sorted(folder.iterdir()) == before


def test_a_manifest_is_not_overwritten(run: Run, folder: Path) -> None:
    good, kept = folder / "good.jsonl", (folder / "good.jsonl").read_bytes()
    (folder / "predictions.jsonl").symlink_to(good)
    for options in (("--predictions", good), ("--out", folder)):
        assert "is one of the manifests, which would be overwritten" in refused(run, good, *FEW, *options)
    assert good.read_bytes() == kept


def test_a_task_has_one_metric(run: Run, folder: Path) -> None:
    told = refused(run, folder / "good.jsonl", "--metric", "asr=wer", "--metric", "asr=cer")
    assert told == "error: --metric asr=cer: asr has a metric already, one decides\n"
