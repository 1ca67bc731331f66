"""Prompts and audio to model inputs: token counts, placeholders, chat templates, labels, and what is refused."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import mowe
from mowe.errors import AudioError, CheckpointError, ConfigError, MoweError
from mowe.projector import projected_lengths
from tests.mowe.audio_llm import processor_of, tiny_model, tiny_pool
from tests.mowe.encoders import clip, hubert, whisper
from tests.mowe.tokenizer import CHAT_TEMPLATE, byte_tokenizer

AUDIO = 259


@cache
def tower(kind: str, context: str, projector: str) -> tuple[Any, mowe.MoweFeatureExtractor]:
    base = {"whisper": whisper, "hubert": hubert}[kind](0)
    settings = {"conv": {}, "stack": {"projector_type": "stack", "projector_stride": 5}}[projector]
    model = tiny_model(base=base, pool=tiny_pool(context), context=context, **settings)
    return model, mowe.MoweFeatureExtractor.from_config(model.config)


@pytest.fixture(scope="module")
def processor() -> mowe.MoweProcessor:
    model, _ = tower("whisper", "valid", "conv")
    return processor_of(model)


@pytest.fixture(scope="module")
def chat_processor() -> mowe.MoweProcessor:
    model, _ = tower("whisper", "valid", "conv")
    return processor_of(model, chat_template=CHAT_TEMPLATE)


def count_by_model(model: Any, lengths: tuple[int, ...]) -> tuple[int, ...]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        return model.get_audio_features(torch.zeros(mask.shape), mask).mixture.lengths


@pytest.mark.parametrize("projector", ["conv", "stack"])
@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_processor_counts_the_tokens_that_the_model_gives(kind: str, projector: str) -> None:
    model, extractor = tower(kind, "valid", projector)
    chosen = random.Random(kind + projector)
    lengths = (400, 401, 479, 480, 559, 560, 719, 720, 721, 1_039, 1_040, 5_200)
    lengths += tuple(chosen.randrange(400, 40_000) for _ in range(4))
    assert count_by_model(model, lengths) == tuple(map(extractor.num_tokens, lengths))


@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_processor_counts_the_tokens_of_padded_windows(kind: str) -> None:
    model, extractor = tower(kind, "window", "conv")
    lengths = (400, 30_123, 480_000)
    assert count_by_model(model, lengths) == tuple(map(extractor.num_tokens, lengths))


@pytest.mark.parametrize("projector", ["conv", "stack"])
@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_token_counts_over_a_grid_too_fine_to_run_the_model_on(kind: str, projector: str) -> None:
    model, extractor = tower(kind, "valid", projector)
    grid = [*range(400, 6_000), *range(6_000, 480_001, 97)]
    frames = [model.audio_tower.level_lengths(samples, "valid")[-1] for samples in grid]
    assert [extractor.num_tokens(n) for n in grid] == projected_lengths(frames, model.multi_modal_projector.strides)


def test_paper_rate() -> None:
    """6.25 tokens a second: 188 for a window of 30 s."""
    _, extractor = tower("whisper", "valid", "conv")
    assert extractor.num_tokens(480_000) == 188


def test_long_audio_becomes_windows_and_nothing_is_dropped(processor: mowe.MoweProcessor) -> None:
    long = clip(480_000 * 2 + 100)
    features = processor.feature_extractor([long, clip(16_000)])
    assert features["num_windows"] == [3, 1]
    assert features["input_features_mask"].sum(1).tolist() == [480_000, 480_000, 400, 16_000]
    rows = features["input_features"]
    assert torch.equal(torch.cat((rows[0], rows[1], rows[2, :100])), long)
    assert not rows[2, 100:].any() and not rows[3, 16_000:].any()
    assert features["num_audio_tokens"] == [188 * 2 + 1, 7]


def test_each_placeholder_becomes_the_tokens_of_its_clip(processor: mowe.MoweProcessor) -> None:
    inputs = processor(["a<|audio|>b<|audio|>", "c"], audio=[clip(16_000), clip(40_000)])
    first, second = inputs["input_ids"]
    a, b = processor.tokenizer("ab").input_ids
    assert first.tolist() == [a, *[AUDIO] * 7, b, *[AUDIO] * 16]
    assert second.tolist()[-1:] == processor.tokenizer("c").input_ids
    assert inputs["attention_mask"].tolist() == [[1] * 25, [0] * 24 + [1]]
    assert inputs["input_features"].shape == (2, 40_000)


def test_padding_on_the_right(processor: mowe.MoweProcessor) -> None:
    inputs = processor(["abc", "d"], padding_side="right", padding=True, return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["input_ids"][1, 1:].tolist() == [258, 258]
    assert "input_features" not in inputs


def test_forms_of_audio_that_mean_the_same(processor: mowe.MoweProcessor, tmp_path: Path) -> None:
    wave = clip(16_000)
    path = tmp_path / "clip.wav"
    soundfile.write(path, wave.numpy(), 16_000, subtype="FLOAT")
    expected = processor("<|audio|>", audio=wave)
    forms = [wave, wave.numpy(), wave.tolist(), [np.float32(x) for x in wave], path, str(path)]
    forms += [{"array": wave.numpy(), "sampling_rate": 16_000}, torch.stack((wave, wave))]
    for form in [*forms, *([form] for form in forms), *([[form]] for form in forms)]:
        got = processor("<|audio|>", audio=form)
        assert torch.equal(got["input_features"], expected["input_features"])
        assert torch.equal(got["input_ids"], expected["input_ids"])


def test_another_sampling_rate_is_resampled(processor: mowe.MoweProcessor) -> None:
    inputs = processor("<|audio|>", audio=clip(48_000), sampling_rate=48_000)
    assert inputs["input_features"].shape == (1, 16_000)


def test_extractor_gives_numpy() -> None:
    _, extractor = tower("whisper", "valid", "conv")
    features = extractor(clip(16_000), return_tensors="np")
    assert isinstance(features["input_features"], np.ndarray) and isinstance(
        features["input_features_mask"], np.ndarray
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_answers_alone(processor: mowe.MoweProcessor, side: str) -> None:
    inputs = processor(["a<|audio|>", "question"], audio=[[clip(8_000)], []], answers=["yes", "no"], padding_side=side)
    end = processor.tokenizer.eos_token_id
    for row, answer in enumerate(("yes", "no")):
        labels, ids, mask = inputs["labels"][row], inputs["input_ids"][row], inputs["attention_mask"][row].bool()
        expected = [*processor.tokenizer(answer).input_ids, end]
        assert labels[labels != -100].tolist() == expected
        assert ids[labels != -100].tolist() == expected
        assert ids[mask][-len(expected) :].tolist() == expected
        assert (labels[~mask] == -100).all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"text": "a<|audio|>"}, "1 <|audio|> but 0 audios"),
        ({"text": "a", "audio": [clip(800)]}, "0 <|audio|> but 1 audios"),
        ({"text": ["<|audio|>", "<|audio|>"], "audio": [clip(800)]}, "2 <|audio|> but 1 audios"),
        ({"text": ["<|audio|>", "b"], "audio": [[], [clip(800)]]}, "prompt 0 has 1 <|audio|> but 0 audios"),
        ({"text": ["<|audio|>"], "audio": [[clip(800)], [clip(800)]]}, "1 prompts but audio for 2"),
        ({"text": "<|audio|>", "audio": [torch.tensor([0.0, float("nan")] * 400)]}, "audio 0: holds NaN"),
        ({"text": "<|audio|>", "audio": torch.full((800,), float("inf"))}, "audio 0: holds NaN or infinite"),
        ({"text": "<|audio|>", "audio": torch.zeros(2, 3, 800)}, "audio 0: expected 1-D samples or 2-D"),
        ({"text": "<|audio|>", "audio": torch.zeros(0)}, "audio 0: expected samples, got an empty"),
        ({"text": "<|audio|>", "audio": "missing.wav"}, "missing.wav: no such file"),
        ({"text": "<|audio|>", "audio": clip(800), "sampling_rate": 0}, "sampling rate"),
        ({"text": "<|audio|>", "audio": clip(800), "answers": "<|audio|>"}, "answer 0 has <|audio|>"),
        ({"text": "<|audio|>", "audio": clip(16_000), "truncation": True, "max_length": 3}, "takes 7 tokens"),
    ],
)
def test_audio_that_does_not_fit_is_refused(processor: mowe.MoweProcessor, call: dict[str, Any], told: str) -> None:
    with pytest.raises(AudioError) as error:
        processor(**call)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        {"text": ["a", "b"], "answers": ["c"]},
        {"text": "a", "return_tensors": "tf"},
        {"text": "a", "padding": "max_length"},
        {"text": "a", "padding_side": "top"},
        {"text": []},
        {"text": None},
        {"text": ["a", "bc"], "padding": False},
    ],
)
def test_settings_that_are_not_supported_are_refused(processor: mowe.MoweProcessor, call: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        processor(**call)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"text": 3}, "prompt 0 must be a text, got int"),
        ({"text": ["a", 3]}, "prompt 1 must be a text, got int"),
        ({"text": "a", "answers": 3}, "answer 0 must be a text, got int"),
        ({"text": "a", "answers": [None]}, "answer 0 must be a text, got NoneType"),
        ({"text": "a", "answer": "b"}, "unknown settings ['answer']"),
    ],
)
def test_mistakes_in_a_call_are_told(processor: mowe.MoweProcessor, call: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        processor(**call)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("conversation", [None, {"role": "user", "content": "Hi"}, "Hi", [None], [{"role"}]])
def test_conversations_are_lists(chat_processor: mowe.MoweProcessor, conversation: Any) -> None:
    with pytest.raises(ConfigError, match="expected a list of messages"):
        chat_processor.apply_chat_template(conversation)


def test_settings_of_the_tokenizer_reach_it(processor: mowe.MoweProcessor) -> None:
    ids = processor("abc", truncation=True, max_length=2, split_special_tokens=False)["input_ids"]
    assert ids.tolist() == [processor.tokenizer("ab").input_ids]


def test_waveforms_stay_in_float32(processor: mowe.MoweProcessor) -> None:
    inputs = processor("<|audio|>", audio=clip(16_000))
    for given in (inputs, processor.feature_extractor(clip(16_000))):
        moved = given.to("cpu", torch.bfloat16)
        assert moved["input_features"].dtype == torch.float32
        assert torch.equal(moved["input_features"], inputs["input_features"])
    assert processor("a").to("cpu", torch.bfloat16).keys() == {"input_ids", "attention_mask"}


def test_prompts_are_padded_on_the_left_and_with_answers_on_the_right(processor: mowe.MoweProcessor) -> None:
    assert processor(["abc", "d"])["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    answered = processor(["abc", "d"], answers=["x", "y"])
    assert answered["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert answered["labels"][1, 3:].tolist() == [-100, -100]


def test_special_tokens_are_there_once(processor: mowe.MoweProcessor) -> None:
    """A template writes the begin token itself; without one it is the tokenizer's to add."""
    template = "{{ bos_token }}" + CHAT_TEMPLATE
    for begins, chat_template in ((True, template), (False, template), (True, None)):
        tokenizer = byte_tokenizer(chat_template, begins)
        inputs = mowe.MoweProcessor(processor.feature_extractor, tokenizer).apply_chat_template(QUESTION, tokenize=True)
        assert inputs["input_ids"][0].tolist().count(256) == 1 and inputs["input_ids"][0, 0] == 256


def test_special_tokens_that_were_there_stay(processor: mowe.MoweProcessor) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    mowe.MoweProcessor(processor.feature_extractor, tokenizer)
    assert {"<tool>", "<|audio|>"} <= set(tokenizer.all_special_tokens)


def test_short_audio_is_padded_and_said(processor: mowe.MoweProcessor) -> None:
    with pytest.warns(UserWarning, match="audio 0: 100 samples are under 25 ms"):
        inputs = processor("<|audio|>", audio=clip(100))
    assert inputs["input_features"].shape == (1, 16_000)


QUESTION = [{"role": "user", "content": [{"type": "audio", "audio": clip(16_000)}, {"type": "text", "text": "Who?"}]}]


def test_prompt_of_the_paper(processor: mowe.MoweProcessor) -> None:
    """PAPER_PROMPT is the authors'; the audio goes between the speech marks wherever it stood in the message."""
    prompt = processor.apply_chat_template(QUESTION)
    assert prompt == "Given the following speech tokens: \n<speech><|audio|></speech>\n\nWho?"
    swapped = [{"role": "user", "content": QUESTION[0]["content"][::-1]}]
    assert processor.apply_chat_template(swapped) == prompt
    assert processor.apply_chat_template([{"role": "user", "content": "Hello."}]) == "Hello."


def test_template_of_the_tokenizer(chat_processor: mowe.MoweProcessor) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert chat_processor.apply_chat_template(conversation) == "[system]Be brief.[user]<|audio|>Who?[assistant]"
    prompt = chat_processor.apply_chat_template(conversation, add_generation_prompt=False)
    assert prompt == "[system]Be brief.[user]<|audio|>Who?"
    other = "{{ greeting }} {{ messages[-1]['content'] }}"
    assert chat_processor.apply_chat_template(QUESTION, chat_template=other, greeting="Hi") == "Hi <|audio|>Who?"


def test_chat_template_tokenizes(chat_processor: mowe.MoweProcessor, tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip(16_000).numpy(), 16_000, subtype="FLOAT")
    for entry in ({"audio": clip(16_000)}, {"path": path}, {"url": str(path)}):
        asked = [{"role": "user", "content": [{"type": "audio", **entry}, {"type": "text", "text": "Who?"}]}]
        plain = [{"role": "user", "content": "Hi"}]
        inputs = chat_processor.apply_chat_template(
            [asked, plain], tokenize=True, return_dict=True, return_tensors="pt", answers=["A", "B"]
        )
        expected = chat_processor(
            ["[user]<|audio|>Who?[assistant]", "[user]Hi[assistant]"], audio=clip(16_000), answers=["A", "B"]
        )
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        "hello",
        {"role": "user", "content": [{"type": "image", "image": "x.png"}]},
        {"role": "user", "content": [{"type": "audio"}]},
        {"role": "user", "content": [{"type": "sound", "audio": torch.zeros(100, 100)}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["hello"]},
        {"role": "user", "content": 3},
    ],
)
def test_messages_that_cannot_be_read_are_refused(chat_processor: mowe.MoweProcessor, message: Any) -> None:
    with pytest.raises(MoweError) as error:
        chat_processor.apply_chat_template([[message]])
    assert "\n" not in str(error.value)


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, extractor = tower("hubert", "valid", "stack")
    saved = mowe.MoweProcessor(extractor, byte_tokenizer(CHAT_TEMPLATE), audio_token="<sound>")
    saved.save_pretrained(tmp_path)
    loaded = mowe.MoweProcessor.from_pretrained(tmp_path)
    assert loaded.feature_extractor.to_dict() == extractor.to_dict()
    assert (loaded.audio_token, loaded.audio_token_id) == ("<sound>", saved.audio_token_id)
    assert set(loaded.model_input_names) >= {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    for processor in (saved, loaded):
        assert processor.apply_chat_template(QUESTION) == "[user]<sound>Who?[assistant]"
    a, b = (x.apply_chat_template(QUESTION, tokenize=True) for x in (saved, loaded))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert loaded.batch_decode(a["input_ids"], skip_special_tokens=True) == ["[user]Who?[assistant]"]


def test_loaded_from_a_subfolder(processor: mowe.MoweProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "inside")
    loaded = mowe.MoweProcessor.from_pretrained(tmp_path, subfolder="inside")
    assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()


def test_tokenizer_without_padding_token() -> None:
    _, extractor = tower("whisper", "valid", "conv")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert mowe.MoweProcessor(extractor, tokenizer)(["a", "bc"])["input_ids"][0, 0] == 257
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        mowe.MoweProcessor(extractor, tokenizer)


def damage(folder: Path, name: str, content: str | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor_config.json", None),
        ("processor_config.json", "{"),
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", ""),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, processor: mowe.MoweProcessor, name: str, content: str) -> None:
    processor.save_pretrained(tmp_path)
    damage(tmp_path, name, content)
    with pytest.raises(CheckpointError) as error:
        mowe.MoweProcessor.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ") and "\n" not in str(error.value)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        mowe.MoweProcessor.from_pretrained(tmp_path / "nothing")


def test_unknown_key_of_the_extractor_is_refused(tmp_path: Path, processor: mowe.MoweProcessor) -> None:
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    config["feature_extractor"]["window_seconds"] = 30
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"unknown keys \['window_seconds'\]"):
        mowe.MoweProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("window", [0, 399, 480_001])
def test_windows_no_encoder_can_take_are_refused(window: int) -> None:
    with pytest.raises(ConfigError, match="window_samples"):
        mowe.MoweFeatureExtractor([], window_samples=window)
    with pytest.raises(ConfigError, match=r"must lie in 400\.\.480000, in order, got \d+ and 800"):
        mowe.MoweFeatureExtractor([], window_samples=800, min_window_samples=window or 801)


EIGHT_CONVOLUTIONS = {"conv_dim": [8] * 8, "conv_kernel": [10, 3, 3, 3, 3, 2, 2, 2], "conv_stride": [5] + [2] * 7}


@pytest.mark.parametrize(
    ("parts", "samples", "windows"),
    [
        ({"base": whisper(0, max_source_positions=750)}, 320_000, [240_000, 80_000]),
        ({"pool": [hubert(1), whisper(2, max_source_positions=750)]}, 320_000, [240_000, 80_000]),
        ({"base": hubert(0, **EIGHT_CONVOLUTIONS)}, 480_450, [480_000, 720]),
        ({"pool": [hubert(0, **EIGHT_CONVOLUTIONS)]}, 450, [720]),
    ],
    ids=["base of 15 s", "pool of 15 s", "base of 45 ms", "pool of 45 ms"],
)
def test_windows_fit_all_encoders(parts: dict[str, Any], samples: int, windows: list[int], tmp_path: Path) -> None:
    if "pool" in parts:
        parts = {"pool": mowe.EncoderPool.from_encoders(parts["pool"], context="valid")}
    model = tiny_model(**parts)
    processor = processor_of(model)
    processor.save_pretrained(tmp_path)
    for either in (processor, mowe.MoweProcessor.from_pretrained(tmp_path)):
        inputs = either("<|audio|>", audio=clip(samples))
        assert inputs["input_features_mask"].sum(1).tolist() == windows
    with torch.no_grad():
        assert model(**inputs).router_indices.shape == (len(windows), 2)
