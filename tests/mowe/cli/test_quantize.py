"""`mowe quantize`, `mowe generate --load-in-4bit` and the memory that `mowe info` foretells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mowe.cli._inputs import skeleton
from mowe.cli._quality import Heard, Quality, compare, memory
from mowe.cli._tasks import Change
from mowe.data import Example
from mowe.evaluation import score
from mowe.evaluation.pictures import METRIC_NAMES
from mowe.nano import nano_model
from tests.mowe.cli.conftest import Run

PARTS = ["base encoder", "pool", "routers", "projector", "language model"]


@pytest.fixture(scope="module")
def quantized(run: Run, saved_model: Path, sounds: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("out") / "nf4"
    return run("quantize", saved_model, out, "--clip", sounds / "noise.wav", "--json"), out


def test_reports_memory_and_quality(quantized):
    result, out = quantized
    said = json.loads(result.stdout)
    assert said["out"] == str(out)
    before, after = said["bytes_before"], said["bytes_4bit"]
    assert list(before) == list(after) == PARTS
    for part in ("base encoder", "pool", "language model"):
        assert after[part] < before[part]
    for part in ("routers", "projector"):
        assert after[part] == before[part]
    assert 0 < said["quality"]["relative_error"] < 1 and 0.5 < said["quality"]["cosine"] < 1
    assert 0 <= said["quality"]["router_agreement"] <= 1


def test_memory_of_the_demo_model_is_told_without_its_weights():
    assert memory(skeleton(None)) == memory(nano_model()[0])


def test_folder_answers(run: Run, quantized, sounds: Path):
    _, out = quantized
    result = run("generate", sounds / "noise.wav", "--prompt", "hm?", "--model", out, "--max-new-tokens", 3, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["clips"][0]["text"]


def test_generate_in_4_bits(run: Run, sounds: Path):
    command = ["generate", sounds / "noise.wav", "--prompt", "hm?", "--max-new-tokens", 3, "--load-in-4bit"]
    said = json.loads(run(*command, "--json").stdout)
    assert said["clips"][0]["text"]
    assert said["quantization"].keys() == {"bytes_before", "bytes_4bit", "quality", "clips"}
    table = run(*command).stdout
    assert "in 4 bits" in table and "cosine" in table and "routed alike" in table


def test_info_foretells_the_memory(run: Run, sounds: Path, tmp_path: Path):
    model, processor = nano_model()
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    processor.save_pretrained(tmp_path / "bf16")
    parts = json.loads(run("info", "--model", tmp_path / "bf16", "--json").stdout)["parts"]
    said = json.loads(
        run("quantize", tmp_path / "bf16", tmp_path / "out", "--clip", sounds / "noise.wav", "--json").stdout
    )
    for sizes, kind in ((said["bytes_before"], "bytes_bf16"), (said["bytes_4bit"], "bytes_4bit")):
        foretold = dict.fromkeys(sizes, 0)
        for part in parts:
            foretold["pool" if part["name"].startswith("encoder") else part["name"]] += part[kind]
        for name, size in sizes.items():
            assert abs(foretold[name] - size) <= 0.01 * size, (kind, name, foretold[name], size)


def test_answers_are_judged_before_and_after(run: Run, saved_model: Path, sounds: Path, tmp_path: Path):
    rows = [
        {"audio": str(sounds / "noise.wav"), "task": "mood", "prompt": "What mood?", "answer": answer}
        for answer in ("sad", "glad")
    ]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--clip", sounds / "noise.wav", "--manifest", manifest, "--max-new-tokens", 3]
    result = run("quantize", saved_model, tmp_path / "out", *options, "--json")
    said = json.loads(result.stdout)["tasks"]
    judged = json.loads(run("evaluate", manifest, "--model", saved_model, "--max-new-tokens", 3, "--json").stdout)
    assert {name: said["before"][name] for name in ("tasks", "overall")} == {
        name: judged[name] for name in ("tasks", "overall")
    }
    after = run("evaluate", manifest, "--model", tmp_path / "out", "--max-new-tokens", 3, "--json")
    assert said["in_4bit"]["tasks"] == json.loads(after.stdout)["tasks"]
    table = run("quantize", saved_model, tmp_path / "other", *options).stdout
    for word in ("mood", METRIC_NAMES[judged["tasks"]["mood"]["metric"]], "all tasks"):
        assert word in table


def test_worse_answers_are_warned_of():
    examples = [Example("hum.wav", "mood", "?", answer, i) for i, answer in enumerate(("sad", "glad"))]
    right, wrong = score(examples, ["sad", "glad"]), score(examples, ["sad", "sad"])
    assert Change(right, wrong).warnings() == [
        "the score over all tasks fell from 100.0% to 50.0%; keep more parts in full precision"
    ]
    assert not Change(wrong, right).warnings()


def manifest_of(sample: float, prompt: str, folder: Path) -> Path:
    """A manifest of one clip, which has the sample in its middle: damage there shows only when all is decoded."""
    samples = np.zeros(16_000, np.float32)
    samples[8_000] = sample
    soundfile.write(folder / "clip.wav", samples, 16_000, subtype="FLOAT")
    manifest = folder / "clips.jsonl"
    manifest.write_text(json.dumps({"audio": "clip.wav", "task": "mood", "prompt": prompt, "answer": "sad"}))
    return manifest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda file: [file.parent / "out", "--part", "router"], "parts to quantise must be among"),
        (lambda file: [file / "out"], "not a folder, nor can it become one"),
    ],
)
def test_parts_and_folder_are_looked_at_first(run: Run, sounds: Path, tmp_path: Path, arguments, message):
    (tmp_path / "file").touch()
    result = run("quantize", tmp_path / "no model", *arguments(tmp_path / "file"), "--manifest", tmp_path / "none")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda model, out: [model, out, "--part", "router"], "parts to quantise must be among"),
        (lambda model, out: [model, model], "expected a new or empty folder"),
        (lambda model, out: [out, out / "x"], "no such folder"),
        (lambda model, out: [model, out, "--manifest", out / "x.jsonl"], "x.jsonl"),
        (lambda model, out: [model, out, "--manifest", manifest_of(np.nan, "?", out.parent)], "line 1: "),
        (lambda model, out: [model, out, "--manifest", manifest_of(0.5, "<|audio|>", out.parent)], "line 1: the audio"),
    ],
)
def test_bad_input_ends_with_one_line(run: Run, saved_model: Path, sounds: Path, tmp_path: Path, arguments, message):
    result = run("quantize", *arguments(saved_model, tmp_path / "out"), "--clip", sounds / "noise.wav")
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_quantised_folder_is_not_quantised_again(run: Run, quantized, sounds: Path, tmp_path: Path):
    result = run("quantize", quantized[1], tmp_path / "out", "--clip", sounds / "noise.wav")
    assert result.exit_code == 2 and "already quantised" in result.stderr


def test_quality_is_what_it_says_and_warns():
    before = Heard(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), [[0, 1], [2, 3]])
    after = Heard(torch.tensor([[3.0, 4.0], [5.0, 0.0]]), [[0, 1], [2, 2]])
    quality = compare(before, after)
    assert quality.relative_error == pytest.approx(1.0)
    assert quality.cosine == pytest.approx(0.5)
    assert quality.router_agreement == 0.5
    assert len(quality.warnings()) == 3
    assert not Quality(0.01, 0.999, 1.0).warnings()


def test_nan_is_warned_of_and_silence_is_not_an_error():
    heard = Heard(torch.ones(2, 2), [[0]])
    told = compare(heard, Heard(torch.full((2, 2), torch.nan), [[0]])).warnings()
    assert len(told) == 2 and all("is nan" in line for line in told)
    silence = Heard(torch.zeros(2, 2), [[0]])
    assert compare(silence, silence).relative_error == 0
    assert len(compare(silence, heard).warnings()) == 2
