"""Log-mel rows against transformers' WhisperFeatureExtractor, normalised waves against Wav2Vec2FeatureExtractor."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from mowe import features
from mowe.audio import MIN_SAMPLES, WINDOW_SAMPLES, AudioBatch
from mowe.errors import AudioError, ConfigError
from mowe.features import Spectrogram, normalize_waves
from mowe_kernels import use_backend

LENGTHS = [400, 401, 479, 480, 560, 7_321, 16_000, 117_920, 3_999]
# Where the end of the 30 s window meets the end of the clip: the mirror there holds the clip, its padding, or both.
WINDOW_LENGTHS = [400, 16_000, 479_640, 479_641, 479_801, 479_958, 479_959, 479_970, 479_999, 480_000]


def speechlike(length: int, seed: int = 0, gain: float = 0.1) -> torch.Tensor:
    """Noise with a slow envelope and two tones: loud and quiet frames, wide and narrow spectra."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(length) / 16_000
    envelope = (3 * torch.sin(2 * torch.pi * 2.3 * time + seed)).exp() / 20
    tones = torch.sin(2 * torch.pi * 220 * time) + 0.3 * torch.sin(2 * torch.pi * 1_730 * time)
    return gain * envelope * (tones + torch.randn(length, generator=generator))


def whisper_rows(wave: torch.Tensor, num_mel_bins: int, context: str) -> torch.Tensor:
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins)
    unpadded = {"padding": "do_not_pad", "truncation": False} if context == "valid" else {}
    return extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt", **unpadded).input_features[0].T


def split(spectra: Spectrogram, num_mel_bins: int) -> tuple[torch.Tensor, ...]:
    return spectra.log_mel(num_mel_bins).split(spectra.num_frames)


def assert_whisper(waves: list[torch.Tensor], context: str, num_mel_bins: int) -> None:
    spectra = Spectrogram(AudioBatch.from_waveforms(waves), context)
    for wave, rows in zip(waves, split(spectra, num_mel_bins), strict=True):
        expected = whisper_rows(wave, num_mel_bins, context)
        assert rows.shape == expected.shape and rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_valid_rows_are_those_of_the_clip_alone(num_mel_bins):
    waves = [speechlike(length, seed) for seed, length in enumerate(LENGTHS)]
    assert_whisper(waves, "valid", num_mel_bins)


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_window_rows_are_those_of_the_clip_padded_to_30_s(num_mel_bins):
    waves = [speechlike(length, seed) for seed, length in enumerate([400, 7_321, 117_920])]
    assert_whisper(waves, "window", num_mel_bins)


@pytest.mark.parametrize("length", WINDOW_LENGTHS)
def test_window_where_the_clip_ends_near_30_s(length):
    wave = speechlike(length)
    wave[-150:] += 0.5  # an end that shows
    assert_whisper([wave], "window", 80)


@pytest.mark.parametrize(("context", "lengths"), [("valid", LENGTHS[:6]), ("window", [400, 7_321, 479_641, 479_970])])
def test_the_kernels_make_the_same_rows(context, lengths):
    with use_backend("triton"):
        assert_whisper([speechlike(length, seed) for seed, length in enumerate(lengths)], context, 80)


def test_valid_beyond_30_s():
    assert_whisper([speechlike(WINDOW_SAMPLES + 12_345)], "valid", 80)


@pytest.mark.parametrize("context", ["valid", "window"])
@pytest.mark.parametrize("gain", [30.0, 1e-3, 1e-6, 0.0], ids=["loud", "quiet", "faint", "zero"])
def test_loud_quiet_and_silent_clips(context, gain):
    assert_whisper([speechlike(9_000, gain=gain), speechlike(20_000)], context, 80)


@pytest.mark.parametrize("context", ["valid", "window"])
def test_pure_tone_and_click(context):
    tone = 0.9 * torch.sin(2 * torch.pi * 440 * torch.arange(20_000) / 16_000)
    click = torch.zeros(12_000)
    click[6_000] = 1.0
    assert_whisper([tone, click], context, 128)


@pytest.mark.parametrize("context", ["valid", "window"])
def test_a_clip_does_not_depend_on_its_batch(context):
    waves = [speechlike(length, seed, gain=4.0**-seed) for seed, length in enumerate(LENGTHS)]
    together = split(Spectrogram(AudioBatch.from_waveforms(waves), context), 80)
    backwards = split(Spectrogram(AudioBatch.from_waveforms(waves[::-1]), context), 80)[::-1]
    for wave, rows, reordered in zip(waves, together, backwards, strict=True):
        (alone,) = split(Spectrogram(AudioBatch.from_waveforms([wave]), context), 80)
        torch.testing.assert_close(rows, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(rows, reordered, rtol=0, atol=1e-5)


def test_two_runs_are_bitwise_equal():
    audio = AudioBatch.from_waveforms([speechlike(length) for length in LENGTHS])
    assert torch.equal(Spectrogram(audio, "valid").log_mel(128), Spectrogram(audio, "valid").log_mel(128))
    assert torch.equal(normalize_waves(audio).samples, normalize_waves(audio).samples)


def test_one_transform_serves_every_bank(monkeypatch):
    calls, stft = [], features.varlen_stft
    monkeypatch.setattr(features, "varlen_stft", lambda *args, **kwargs: calls.append(args) or stft(*args, **kwargs))
    spectra = Spectrogram(AudioBatch.from_waveforms([speechlike(5_000)]), "valid")
    assert not calls
    assert spectra.log_mel(80).shape == (31, 80)
    assert spectra.log_mel(128).shape == (31, 128)
    assert len(calls) == 1


def test_padding_of_the_window_is_not_transformed():
    spectra = Spectrogram(AudioBatch.from_waveforms([speechlike(16_000)]), "window")
    assert spectra.log_mel(80).shape == (3000, 80)
    assert len(spectra.spectrum) < 16_000 // 160 + 10


@pytest.mark.parametrize(("context", "num_frames"), [("valid", (2, 100, 46)), ("window", (3000, 3000, 3000))])
def test_rows_of_each_clip(context, num_frames):
    spectra = Spectrogram(AudioBatch.from_waveforms([speechlike(n) for n in (400, 16_000, 7_500)]), context)
    assert spectra.num_frames == num_frames
    assert spectra.starts.tolist() == [0, num_frames[0], num_frames[0] + num_frames[1]]
    assert spectra.starts.dtype == torch.int32


def test_autocast_does_not_coarsen_the_features():
    spectra = Spectrogram(AudioBatch.from_waveforms([speechlike(5_000)]), "valid")
    expected = spectra.log_mel(80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spectra.log_mel(80), expected)


def test_errors_name_clip_and_context():
    audio = AudioBatch.from_waveforms([torch.zeros(MIN_SAMPLES), torch.zeros(WINDOW_SAMPLES + 1)])
    with pytest.raises(AudioError, match="clip 1: expected at most 30 s in one window, got 480001 samples"):
        Spectrogram(audio, "window")
    with pytest.raises(ConfigError, match="context must be 'valid' or 'window', got 'full'"):
        Spectrogram(audio, "full")


@pytest.mark.parametrize("context", ["valid", "window"])
def test_no_value_is_read_back_from_the_device(context):
    """Fake tensors have shapes and no values: whatever would make a GPU wait fails."""
    Spectrogram(AudioBatch.from_waveforms([speechlike(400)]), context).log_mel(80)  # so that the filters are real
    with FakeTensorMode(allow_non_fake_inputs=True):
        audio = AudioBatch(torch.empty(24_400), (24_000, 400))
        assert Spectrogram(audio, context).log_mel(80).shape == ((152, 80) if context == "valid" else (6000, 80))
        assert normalize_waves(audio).samples.shape == (24_400,)


def test_normalized_waves_are_those_of_wav2vec2():
    gains = [4.0**-seed for seed in range(len(LENGTHS))]
    waves = [gain * (0.1 + speechlike(n, n, gain=1.0)) for n, gain in zip(LENGTHS, gains, strict=True)]
    waves += [torch.zeros(1_600), speechlike(1_601, gain=1e-6)]
    audio = AudioBatch.from_waveforms(waves)
    normal = normalize_waves(audio)
    assert normal.lengths == audio.lengths
    for wave, values in zip(waves, normal.samples.split(normal.lengths), strict=True):
        expected = Wav2Vec2FeatureExtractor(do_normalize=True)(wave.numpy(), sampling_rate=16_000).input_values[0]
        assert values.dtype == torch.float32
        np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-5)


def test_a_normalized_wave_does_not_depend_on_its_batch():
    waves = [speechlike(length, seed, gain=4.0**-seed) for seed, length in enumerate(LENGTHS)]
    together = normalize_waves(AudioBatch.from_waveforms(waves))
    for wave, values in zip(waves, together.samples.split(together.lengths), strict=True):
        assert torch.equal(values, normalize_waves(AudioBatch.from_waveforms([wave])).samples)
