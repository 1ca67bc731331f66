"""The processor: prompt, placeholders, chunks, files as the authors write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor, WhisperFeatureExtractor

from mowe.errors import AudioError, CheckpointError, ConfigError
from mowe.meralion import MeralionFeatureExtractor, MeralionForConditionalGeneration, MeralionProcessor
from tests.mowe.encoders import clip
from tests.mowe.meralion.family import SPEECH_TOKEN, config_dict, write
from tests.mowe.tokenizer import byte_tokenizer

SECOND = 16_000
TOKENS = 10  # a chunk of one second has 50 frames, five a token
ASKED = "Instruction: What is said? \nFollow the text instruction based on the following audio: "
TURN = "<s><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


def checkpoint(folder: Path, told: dict[str, Any] | None = None, **tokenizer: Any) -> Path:
    """A folder of the authors, but with chunks of one second."""
    write(folder, "meralion2", frames=50, speech_mlp_scale_factor=5)
    vocabulary = byte_tokenizer(**tokenizer)
    vocabulary.add_special_tokens({"additional_special_tokens": ["<SpeechHere>"]})
    vocabulary.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(folder)
    if told is not None:
        told = {"processor_class": "MERaLiON2Processor", "auto_map": {"AutoProcessor": "processing.P"}, **told}
        (folder / "processor_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def processor(tmp_path: Path) -> MeralionProcessor:
    told = {"fixed_speech_embeds_length": TOKENS, "speech_token_index": SPEECH_TOKEN, "time_duration_limit": 300}
    return MeralionProcessor.from_pretrained(checkpoint(tmp_path, told))


def asked(*audio: Any, text: str = "What is said?") -> list[dict[str, Any]]:
    parts = [*({"type": "audio", "audio": a} for a in audio), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_prompt_and_placeholders(processor: MeralionProcessor) -> None:
    conversation = asked(clip(SECOND + 1))
    assert processor.apply_chat_template(conversation) == TURN.format(ASKED + "<SpeechHere>")
    inputs = processor.apply_chat_template(conversation, tokenize=True)
    expected = TURN.format(ASKED + "<SpeechHere>" * (2 * TOKENS))
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == expected
    assert (inputs["input_ids"][0] == SPEECH_TOKEN).sum() == 2 * TOKENS
    assert inputs["input_features"].shape == (2, 80, 100) and inputs["attention_mask"].all()
    assert set(inputs) == {"input_ids", "attention_mask", "input_features"}


def test_the_language_models_own_template_comes_first(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}({{ m['content'] }}){% endfor %}"
    processor = MeralionProcessor.from_pretrained(checkpoint(tmp_path, chat_template=template))
    assert processor.apply_chat_template(asked(clip(SECOND))) == f"<s>({ASKED}<SpeechHere>)"


def test_text_is_taken_as_it_is(processor: MeralionProcessor) -> None:
    own = [{"role": "user", "content": "Listen: <SpeechHere> Well?"}]
    assert processor.apply_chat_template(own) == TURN.format("Listen: <SpeechHere> Well?")
    turns = [*asked(text="Hi"), {"role": "assistant", "content": "Ho"}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=False)
    assert prompt == "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"


@pytest.mark.parametrize("prompt", ["<SpeechHere> a", "<s><SpeechHere> a"])
def test_prompts_begin_with_one_begin_token(processor: MeralionProcessor, prompt: str) -> None:
    inputs = processor([prompt, "longer than the audio's"], [[clip(SECOND)], []])
    row = inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()
    assert row[:2] == [256, SPEECH_TOKEN] and row.count(256) == 1
    assert inputs["input_ids"][1].tolist().count(256) == 1


def test_features_are_whispers_of_normalised_chunks(processor: MeralionProcessor, tmp_path: Path) -> None:
    wave = clip(int(2.3 * SECOND), 1).numpy()
    got = processor("<SpeechHere>", wave)["input_features"]
    whisper = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    for i, features in enumerate(got):
        chunk = wave[i * SECOND : (i + 1) * SECOND].astype(np.float64)
        chunk = (chunk - chunk.mean()) / np.sqrt(chunk.var() + 1e-7)
        expected = whisper(chunk.astype(np.float32), sampling_rate=SECOND, return_tensors="pt").input_features[0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    soundfile.write(tmp_path / "clip.wav", wave, SECOND, subtype="FLOAT")
    assert torch.equal(processor("<SpeechHere>", tmp_path / "clip.wav")["input_features"], got)
    stereo = {"array": np.stack([wave, wave]), "sampling_rate": SECOND}
    assert torch.equal(processor("<SpeechHere>", stereo)["input_features"], got)


def test_other_rates_are_resampled(processor: MeralionProcessor) -> None:
    inputs = processor("<SpeechHere>", clip(8_000), sampling_rate=8_000)
    assert inputs["input_features"].shape[0] == 1
    assert processor("<SpeechHere>", clip(8_001), sampling_rate=8_000)["input_features"].shape[0] == 2


def test_chunks_of_thirty_seconds_and_at_most_ten() -> None:
    extractor = MeralionFeatureExtractor(feature_size=80)
    assert extractor([clip(30 * SECOND + 1)])["num_audio_tokens"] == [200]
    with pytest.raises(AudioError, match=r"audio 1: 300\.0 s are 11 chunks of 30 s, expected at most 10"):
        extractor([clip(SECOND), torch.zeros(300 * SECOND + 1)])


def test_ten_chunks_are_taken(processor: MeralionProcessor) -> None:
    assert processor("<SpeechHere>", clip(10 * SECOND))["input_features"].shape[0] == 10
    with pytest.raises(AudioError, match="11 chunks of 1 s"):
        processor("<SpeechHere>", clip(10 * SECOND + 1))


def test_from_audio_to_text(processor: MeralionProcessor, tmp_path: Path) -> None:
    model = MeralionForConditionalGeneration.from_pretrained(tmp_path).eval()
    conversations = [asked(clip(SECOND * 2, 4)), asked(text="Hello"), asked(clip(9_000, 5), text="Long " * 9)]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}

    def answers(batch: list[Any]) -> list[list[int]]:
        inputs = processor.apply_chat_template(batch, tokenize=True)
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()

    together = answers(conversations)
    assert together == [answers([one])[0] for one in conversations]
    assert len({tuple(answer) for answer in together}) > 1


def test_labels_for_training(processor: MeralionProcessor) -> None:
    batch = processor.apply_chat_template(
        [asked(clip(SECOND)), asked(text="Hi")], tokenize=True, answers=["yes", "no, it is not"]
    )
    learned = [row[row != -100].tolist() for row in batch["labels"]]
    assert [processor.tokenizer.decode(row) for row in learned] == ["yes</s>", "no, it is not</s>"]


@pytest.mark.parametrize("told", [None, {}, {"do_normalize": False, "time_duration_limit": 60}])
def test_settings_are_read_and_saved(tmp_path: Path, told: dict[str, Any] | None) -> None:
    first = MeralionProcessor.from_pretrained(checkpoint(tmp_path / "theirs", told))
    first.save_pretrained(tmp_path / "ours")
    wave = clip(2 * SECOND)
    for processor in (first, *(c.from_pretrained(tmp_path / "ours") for c in (MeralionProcessor, AutoProcessor))):
        assert type(processor) is MeralionProcessor and processor.audio_token_id == SPEECH_TOKEN
        extractor = processor.feature_extractor
        assert type(extractor) is MeralionFeatureExtractor
        assert (extractor.tokens_per_chunk, extractor.chunk_length, extractor.feature_size) == (TOKENS, 1, 80)
        assert extractor.do_normalize is (not told) and extractor.max_chunks == (2 if told else 10)
        for name, value in first.apply_chat_template(asked(wave), tokenize=True).items():
            assert torch.equal(processor.apply_chat_template(asked(wave), tokenize=True)[name], value)


def test_fixed_length_of_the_checkpoint_is_honoured(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    config = config_dict("meralion3", 50, speech_mlp_scale_factor=None, fixed_speech_embeds_length=25)
    (tmp_path / "config.json").write_text(json.dumps(config))
    inputs = MeralionProcessor.from_pretrained(tmp_path)("<SpeechHere>", clip(SECOND))
    assert (inputs["input_ids"] == SPEECH_TOKEN).sum() == 25


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"fixed_speech_embeds_length": 100}, "fixed_speech_embeds_length .* is 100, but .* config.json says 10"),
        ({"speech_token_index": 5}, "speech_token_index of processor_config.json is 5, but .* says 259"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeralionProcessor.from_pretrained(checkpoint(tmp_path, told))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder has no config.json"):
        MeralionProcessor.from_pretrained(tmp_path)
    checkpoint(tmp_path)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"feature_size of preprocessor_config.json is 128, but .* says 80"):
        MeralionProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the processor"):
        MeralionProcessor.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="speech_token_index is 259, the tokenizer has 259 tokens"):
        MeralionProcessor(MeralionFeatureExtractor(), byte_tokenizer(), speech_token_index=259)


@pytest.mark.parametrize(
    ("prompts", "audio", "told"),
    [
        (["<SpeechHere>"], None, "have 1 <SpeechHere> but 0 audios"),
        (["a"], [clip(SECOND)], "have 0 <SpeechHere> but 1 audios"),
        (["<SpeechHere>", "b"], [[], [clip(SECOND)]], "prompt 0 has 1 <SpeechHere> but 0 audios"),
        (["<SpeechHere>"], ["/no/such.wav"], "no such file"),
    ],
)
def test_prompts_and_audio_must_match(processor: MeralionProcessor, prompts: list[str], audio: Any, told: str) -> None:
    with pytest.raises(AudioError, match=told):
        processor(prompts, audio)
