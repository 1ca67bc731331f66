"""`mowe quantize`, `mowe generate --load-in-4bit` and the memory that `mowe info` foretells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mowe.cli._quality import Heard, Quality, compare
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


def test_folder_answers(run: Run, quantized, sounds: Path):
    _, out = quantized
    result = run("generate", sounds / "noise.wav", "--prompt", "hm?", "--model", out, "--max-new-tokens", 3, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["clips"][0]["text"]


def test_generate_in_4_bits(run: Run, sounds: Path):
    command = ["generate", sounds / "noise.wav", "--prompt", "hm?", "--max-new-tokens", 3, "--load-in-4bit"]
    said = json.loads(run(*command, "--json").stdout)
    assert said["clips"][0]["text"]
    assert said["quantization"].keys() == {"bytes_before", "bytes_4bit", "quality"}
    table = run(*command).stdout
    assert "in 4 bits" in table and "cosine" in table and "routed alike" in table


def test_info_foretells_the_memory_of_the_encoders(run: Run, quantized):
    parts = {part["name"]: part for part in json.loads(run("info", "--json").stdout)["parts"]}
    assert all(part["bytes_4bit"] <= part["bytes_bf16"] for part in parts.values())
    after = json.loads(quantized[0].stdout)["bytes_4bit"]
    # The file is of a model in float32: what is not in 4 bits has twice the bytes of bf16 there.
    assert parts["base encoder"]["bytes_4bit"] < after["base encoder"] < 2 * parts["base encoder"]["bytes_4bit"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda model, out: [model, out, "--part", "router"], "parts to quantise must be among"),
        (lambda model, out: [model, model], "expected a new or empty folder"),
        (lambda model, out: [out, out / "x"], "no such folder"),
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
