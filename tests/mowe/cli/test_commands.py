"""What `generate`, `routes` and `info` answer, for people and for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mowe import MoweForConditionalGeneration, MoweProcessor, load_audio
from mowe.nano import nano_model
from tests.mowe.cli.conftest import Run


def answer(run: Run, *arguments: object) -> dict[str, Any]:
    """What a command prints with --json, and nothing else on either stream."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_routes(run: Run, sounds: Path) -> None:
    files = [sounds / name for name in ("noise.wav", "hum.flac", "long.wav")]
    said = answer(run, "routes", *files)
    assert said.keys() == {"device", "model", "trained", "encoders", "clips"}
    assert said["encoders"] == ["HuBERT 0", "HuBERT 1", "Whisper 2", "Whisper 3"]
    assert (said["model"], said["trained"]) == (None, True)
    windows = [(clip["file"], clip["start"], clip["seconds"]) for clip in said["clips"]]
    assert windows == [
        (str(files[0]), 0.0, 1.5), (str(files[1]), 0.0, 0.7), (str(files[2]), 0.0, 30.0), (str(files[2]), 30.0, 1.0)
    ]  # fmt: skip

    model, processor = nano_model()
    inputs = processor.feature_extractor([load_audio(file) for file in files])
    with torch.no_grad():
        mixture = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).mixture
    assert [clip["encoders"] for clip in said["clips"]] == mixture.indices.tolist()
    torch.testing.assert_close(torch.tensor([clip["weights"] for clip in said["clips"]]), mixture.weights.detach())


def test_routes_for_people(run: Run, sounds: Path, tmp_path: Path) -> None:
    picture = tmp_path / "routes.svg"
    result = run("routes", sounds / "noise.wav", sounds / "long.wav", "--picture", picture)
    assert result.exit_code == 0 and result.stderr == ""
    assert "test split" in result.stdout and str(picture) in result.stdout
    assert "data-independent" in result.stdout and "data-dependent" in result.stdout
    drawn = picture.read_text()
    assert "noise.wav" in drawn and "long.wav +30 s" in drawn
    assert list(tmp_path.iterdir()) == [picture]


def test_a_picture_is_no_excuse_for_noise_in_json(run: Run, sounds: Path, tmp_path: Path) -> None:
    answer(run, "routes", sounds / "noise.wav", "--picture", tmp_path / "routes.png")
    assert (tmp_path / "routes.png").read_bytes().startswith(b"\x89PNG")


def test_generate(run: Run, sounds: Path) -> None:
    said = answer(run, "generate", sounds / "hum.flac", "--prompt", "Wer spricht?", "--max-new-tokens", 5)
    assert said.keys() == {"device", "model", "trained", "clips"}
    (clip,) = said["clips"]
    assert (clip["file"], clip["seconds"]) == (str(sounds / "hum.flac"), 0.7)

    model, processor = nano_model()
    prompt = "<|audio|>Wer spricht?"
    inputs = processor(prompt, load_audio(sounds / "hum.flac"))
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert clip["text"] == processor.decode(tokens[0, inputs["input_ids"].shape[1] :]).strip()
    assert len(processor.tokenizer(clip["text"]).input_ids) <= 5


def test_generate_for_people(run: Run, sounds: Path) -> None:
    files = [sounds / "noise.wav", sounds / "hum.flac"]
    result = run("generate", *files, "--prompt", "What is it?", "--max-new-tokens", 5)
    assert result.exit_code == 0 and result.stderr == ""
    heading, *lines = result.stdout.splitlines()
    assert "the demo model" in heading
    texts = [
        clip["text"]
        for clip in answer(run, "generate", *files, "--prompt", "What is it?", "--max-new-tokens", 5)["clips"]
    ]
    assert lines == [f"{file}: {text}" for file, text in zip(files, texts, strict=True)]


def test_a_batch_says_what_single_runs_say(run: Run, sounds: Path) -> None:
    files = [sounds / name for name in ("long.wav", *("noise.wav", "hum.flac") * 4)]
    together = answer(run, "routes", *files)["clips"]
    alone = {file: answer(run, "routes", file)["clips"] for file in set(files)}
    expected = [window for file in files for window in alone[file]]
    assert [{**window, "weights": None} for window in together] == [{**window, "weights": None} for window in expected]
    for window, single in zip(together, expected, strict=True):
        assert window["weights"] == pytest.approx(single["weights"], abs=1e-5)

    ask = ("--prompt", "What is it?", "--max-new-tokens", 6)
    texts = {file: answer(run, "generate", file, *ask)["clips"] for file in set(files)}
    assert answer(run, "generate", *files, *ask)["clips"] == [clip for file in files for clip in texts[file]]


def test_a_saved_model_answers_like_the_one_saved(run: Run, sounds: Path, saved_model: Path) -> None:
    said = answer(run, "routes", sounds / "noise.wav", "--model", saved_model)
    assert (said["model"], said["trained"]) == (str(saved_model), None)
    assert said["clips"] == answer(run, "routes", sounds / "noise.wav")["clips"]
    result = run("routes", sounds / "noise.wav", "--model", saved_model)
    assert "demo model" not in result.stdout and str(saved_model) in result.stdout.replace("\n", "")


def test_a_short_clip_is_padded_and_said(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "click.wav"
    soundfile.write(file, np.full(208, 0.1), 16_000)
    result = run("routes", file, "--json")
    assert result.exit_code == 0
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"note: {file}: ") and "padded" in result.stderr
    (clip,) = json.loads(result.stdout)["clips"]
    assert clip["seconds"] == 0.013
    padded = tmp_path / "padded.wav"
    soundfile.write(padded, np.concatenate((np.full(208, 0.1), np.zeros(15_792))), 16_000)
    assert clip["weights"] == answer(run, "routes", padded)["clips"][0]["weights"]


def test_output_cannot_steer_the_terminal(
    run: Run, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name alone: a long path would be cut
    file = Path("a\x1b[31m[bold]$x_1$\n.wav")
    file.write_bytes((sounds / "noise.wav").read_bytes())
    result = run("routes", file, "--picture", tmp_path / "routes.svg")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout and "[bold]" in result.stdout.replace("\n", "")
    assert "$x_1$" in (tmp_path / "routes.svg").read_text()
    assert answer(run, "routes", file)["clips"][0]["file"] == str(file)


@pytest.mark.parametrize("from_folder", [False, True])
def test_info(run: Run, saved_model: Path, from_folder: bool) -> None:
    said = answer(run, "info", *(["--model", saved_model] if from_folder else []))
    assert said.keys() == {"model", "trained", "context", "parts", "parameters", "device", "backend", "versions"}
    assert said["trained"] is (None if from_folder else True)
    assert said["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert said["backend"] in ("reference", "triton")
    assert said["versions"]["torch"] == torch.__version__
    model, _ = nano_model()
    parts = {part["name"]: part for part in said["parts"]}
    assert list(parts) == [
        "base encoder",
        *(f"encoder {i}" for i in range(4)),
        "routers",
        "projector",
        "language model",
    ]
    assert said["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for i in range(4):
        encoder = model.model.mixture.pool.to_transformers(i)
        assert parts[f"encoder {i}"]["type"] == encoder.config.model_type
    assert parts["language model"]["parameters"] == model.language_model.num_parameters()
    for part in parts.values():
        assert (part["bytes_fp32"], part["bytes_bf16"]) == (4 * part["parameters"], 2 * part["parameters"])


def test_info_reads_no_weights(run: Run, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoweForConditionalGeneration, "from_pretrained", None)
    (tmp_path / "config.json").write_bytes((saved_model / "config.json").read_bytes())
    assert answer(run, "info", "--model", tmp_path)["parts"] == answer(run, "info")["parts"]


def test_info_for_people(run: Run) -> None:
    result = run("info")
    assert result.exit_code == 0 and result.stderr == ""
    assert "the demo model" in result.stdout and f"{nano_model()[0].num_parameters():,}" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout


def test_nano_model_is_the_same_at_every_call_and_leaves_the_seed_alone(saved_model: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model, processor = nano_model()
    assert torch.equal(torch.rand(1), expected)
    again = MoweForConditionalGeneration.from_pretrained(saved_model).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name]), name
    text = "Ünïcode, आज, 音 <|audio|>"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
    assert isinstance(processor, MoweProcessor)
