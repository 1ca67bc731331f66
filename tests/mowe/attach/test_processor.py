"""Wrapped processors: the pool hears what the model does."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ProcessorMixin, WhisperFeatureExtractor

import mowe
from mowe.meralion import MeralionFeatureExtractor, MeralionProcessor
from tests.mowe.attach.audio_llms import AUDIO, MEL
from tests.mowe.attach.models import tiny, tiny_pool
from tests.mowe.attach.tools import OVER_A_WINDOW, SHORT, TINY_CLIP, awaken, logits, plain
from tests.mowe.tokenizer import byte_tokenizer

TOKEN = "<|AUDIO|>"
ANSWER = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3, "max_length": None}


class _VoxtralTokenizer(PreTrainedTokenizerFast):
    """Stands in for Mistral's, which turns conversations into ids and waveforms itself."""

    def apply_chat_template(self, conversations: Any, **kwargs: Any) -> dict[str, Any]:
        waves = [np.pad(wave, (0, -len(wave) % 32_000)) for wave in conversations[0]]
        ids = [[3] + [AUDIO] * (25 * len(wave) // 32_000) + [4] for wave in waves]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "audio": waves}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
    return tokenizer


def _mel() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=MEL, chunk_length=2)


def _qwen2_audio() -> ProcessorMixin:
    return transformers.Qwen2AudioProcessor(_mel(), _tokenizer(), audio_token=TOKEN)


def _audioflamingo3() -> ProcessorMixin:
    return transformers.AudioFlamingo3Processor(_mel(), _tokenizer(), audio_token=TOKEN)


def _vibevoice_asr() -> ProcessorMixin:
    extractor = transformers.VibeVoiceAcousticTokenizerFeatureExtractor()
    return transformers.VibeVoiceAsrProcessor(extractor, _tokenizer(), audio_token=TOKEN)


def _meralion2() -> ProcessorMixin:
    extractor = MeralionFeatureExtractor(feature_size=MEL, tokens_per_chunk=10, chunk_length=2)
    return MeralionProcessor(extractor, _tokenizer(), speech_token_index=259)


def _speaking(model_type: str) -> transformers.PreTrainedModel:
    """A tiny model over the tokenizer's vocabulary, its mixture trained."""
    model = tiny(model_type)
    model.resize_token_embeddings(264)
    model.config.audio_token_id = 259
    return awaken(mowe.attach(model, tiny_pool()))


@pytest.mark.parametrize("make", [_qwen2_audio, _audioflamingo3])
def test_same_output_and_the_waveforms(make: Any) -> None:
    processor = make()
    wrapped = mowe.wrap_processor(processor)
    call = {"text": [f"a {TOKEN}?", f"{TOKEN} b"], "audio": [SHORT.numpy(), TINY_CLIP.numpy()], "padding": True}
    call["return_tensors"] = "pt"
    expected, got = processor(**call), wrapped(**call)
    assert type(wrapped) is not type(processor) and isinstance(wrapped, type(processor))
    assert got.keys() - expected.keys() == {"mowe_waveforms", "mowe_waveforms_mask"}
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert "mowe_waveforms" not in processor(**call)
    _assert_waves(got, [SHORT, TINY_CLIP])
    assert {"mowe_waveforms", "mowe_waveforms_mask"} <= set(wrapped.model_input_names)


def _assert_waves(batch: Any, waves: list[Tensor]) -> None:
    assert batch["mowe_waveforms"].dtype == torch.float32
    assert batch["mowe_waveforms_mask"].sum(1).tolist() == [len(wave) for wave in waves]
    for row, wave in zip(batch["mowe_waveforms"], waves, strict=True):
        assert torch.equal(row[: len(wave)], wave) and not row[len(wave) :].any()


def test_windows_are_cut_as_the_features_are() -> None:
    batch = mowe.wrap_processor(_audioflamingo3())(text=TOKEN, audio=OVER_A_WINDOW.numpy())
    assert batch["input_features"].shape[0] == 2
    _assert_waves(batch, list(OVER_A_WINDOW.split(32_000)))


def test_whole_clips_where_the_model_takes_windows_of_them() -> None:
    batch = mowe.wrap_processor(_meralion2())(text=TOKEN, audio=OVER_A_WINDOW.numpy())
    assert batch["input_features"].shape[0] == 2
    _assert_waves(batch, [OVER_A_WINDOW])


def test_other_sampling_rates_are_resampled() -> None:
    tone = torch.sin(torch.arange(24_000) * 2 * torch.pi * 200 / 24_000)
    batch = mowe.wrap_processor(_vibevoice_asr())(text=TOKEN, audio=tone.numpy(), sampling_rate=24_000)
    at_16_khz = torch.sin(torch.arange(16_000) * 2 * torch.pi * 200 / 16_000)
    assert batch["mowe_waveforms"].shape == (1, 16_000)
    torch.testing.assert_close(batch["mowe_waveforms"][0, 500:-500], at_16_khz[500:-500], atol=1e-3, rtol=0)


def test_without_audio_nothing_is_added() -> None:
    assert not any("mowe" in name for name in mowe.wrap_processor(_qwen2_audio())(text="a", return_tensors="pt"))


def test_chat_template() -> None:
    wrapped = mowe.wrap_processor(_qwen2_audio())
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text or '<|AUDIO|>' }}{% endfor %}{% endfor %}"
    content = [{"type": "audio", "audio": SHORT.numpy()}, {"type": "text", "text": "what?"}]
    batch = wrapped.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    _assert_waves(batch, [SHORT])


def test_casting_leaves_the_waveforms_in_float32() -> None:
    batch = mowe.wrap_processor(_qwen2_audio())(text=TOKEN, audio=SHORT.numpy(), return_tensors="pt")
    cast = batch.to("cpu", dtype=torch.bfloat16)
    assert cast["input_features"].dtype == torch.bfloat16
    _assert_waves(cast, [SHORT])


@pytest.mark.parametrize(
    ("model_type", "make"),
    [("qwen2_audio", _qwen2_audio), ("audioflamingo3", _audioflamingo3), ("meralion2", _meralion2)],
)
def test_into_the_model(model_type: str, make: Any) -> None:
    model, wrapped = _speaking(model_type), mowe.wrap_processor(make())
    silent = wrapped(text="a", return_tensors="pt")
    batch = wrapped(text=f"a {TOKEN}?", audio=SHORT.numpy(), return_tensors="pt")
    assert model.generate(**batch, **ANSWER).shape[1] == batch["input_ids"].shape[1] + 3
    with pytest.raises(mowe.AudioError, match=r"its processor was not wrapped \(processor = mowe.wrap_processor"):
        model.generate(**plain(batch), **ANSWER)
    assert model.generate(**silent, **ANSWER).shape[1] == silent["input_ids"].shape[1] + 3


def test_voxtral_hears_whole_clips_and_cuts_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = _VoxtralTokenizer(tokenizer_object=byte_tokenizer().backend_tokenizer, pad_token="<pad>")
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: PreTrainedTokenizerFast)
    wrapped = mowe.wrap_processor(transformers.VoxtralProcessor(_mel(), tokenizer))
    batch = wrapped.apply_chat_template(
        [[OVER_A_WINDOW.numpy()]], max_source_positions=200, pad_to_multiple_of=32_000, return_tensors="pt"
    )
    assert batch["input_features"].shape[0] == 2
    assert batch["mowe_waveforms"].shape == (1, 64_000)
    model = awaken(mowe.attach(tiny("voxtral"), tiny_pool()))
    outputs = model(**batch)
    assert outputs.router_logits.shape[0] == 2
    assert not torch.equal(outputs.logits, logits(mowe.detach(model), plain(batch)))


@pytest.mark.parametrize("name", ["Phi4Multimodal", "Gemma3nAudio", "Gemma4Audio", "Qwen3ASR"])
def test_feature_extractors_of_other_models(name: str) -> None:
    extractor = getattr(transformers, f"{name}FeatureExtractor")()

    class Processor(ProcessorMixin):
        def __init__(self, audio_processor: Any):
            self.audio_processor = audio_processor

        def __call__(self, audio: Any) -> Any:
            return self.audio_processor(audio, sampling_rate=16_000, return_tensors="pt")

    batch = mowe.wrap_processor(Processor(extractor))([SHORT.numpy(), TINY_CLIP.numpy()])
    _assert_waves(batch, [SHORT, TINY_CLIP])


def test_threads_hear_their_own() -> None:
    wrapped = mowe.wrap_processor(_qwen2_audio())

    def call(seconds: int) -> bool:
        wave = np.full(16_000 * seconds, 0.1 * seconds, dtype=np.float32)
        batch = wrapped(text=TOKEN, audio=[wave], sampling_rate=16_000, return_tensors="pt")
        return torch.equal(batch["mowe_waveforms"], torch.from_numpy(wave)[None])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, [1, 2] * 20))


def test_a_feature_extractor_alone_tells_nobody() -> None:
    wrapped = mowe.wrap_processor(_qwen2_audio())
    wrapped.feature_extractor(SHORT.numpy(), sampling_rate=16_000)
    assert "mowe_waveforms" not in wrapped(text="nothing to hear")


def test_hears_what_was_given_and_not_what_the_extractor_made_of_it() -> None:
    class InPlace(WhisperFeatureExtractor):
        def __call__(self, raw_speech: Any, **kwargs: Any) -> Any:
            raw_speech[0] *= 0.5
            return super().__call__(raw_speech, **kwargs)

    extractor = InPlace(feature_size=MEL, chunk_length=2)
    wrapped = mowe.wrap_processor(transformers.Qwen2AudioProcessor(extractor, _tokenizer(), audio_token=TOKEN))
    wave = SHORT.numpy().copy()
    batch = wrapped(text=TOKEN, audio=[wave], sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(batch["mowe_waveforms"][0], SHORT)


def test_pickles() -> None:
    wrapped = mowe.wrap_processor(_qwen2_audio())
    again = pickle.loads(pickle.dumps(wrapped))
    assert type(again) is type(wrapped)
    given = {"text": TOKEN, "audio": [SHORT.numpy()], "sampling_rate": 16_000, "return_tensors": "pt"}
    _assert_waves(again(**given), [SHORT])


def test_datasets_tells_wrapped_processors_apart() -> None:
    first, again = (Hasher.hash(mowe.wrap_processor(_qwen2_audio())) for _ in range(2))
    assert first == again != Hasher.hash(_qwen2_audio())


def test_saves_the_files_of_the_processor_it_wraps(tmp_path: Path) -> None:
    processor = _qwen2_audio()
    wrapped = mowe.wrap_processor(processor)
    wrapped(text=TOKEN, audio=SHORT.numpy(), return_tensors="pt")
    processor.save_pretrained(tmp_path / "own")
    wrapped.save_pretrained(tmp_path / "wrapped")
    files = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "wrapped").iterdir())
    for file in files:
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "wrapped" / file).read_bytes(), file


def test_bad_processors() -> None:
    wrapped = mowe.wrap_processor(_qwen2_audio())
    with pytest.raises(mowe.ConfigError, match="the processor is wrapped already"):
        mowe.wrap_processor(wrapped)
    with pytest.raises(mowe.ConfigError, match=r"\w+ has no feature extractor of audio to wrap"):
        mowe.wrap_processor(byte_tokenizer())
