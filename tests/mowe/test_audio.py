"""Files and arrays in, waveforms and batches out; every bad input ends in one line that names it."""

import os
import struct
import warnings

import numpy as np
import pytest
import soundfile
import soxr
import torch

from mowe.audio import MIN_SAMPLES, AudioBatch, as_waveform, clip_samples, load_audio, split_windows
from mowe.errors import AudioError, MoweError

RATE = 16_000


@pytest.fixture
def tone() -> np.ndarray:
    """1.5 s at 16 kHz, [24000] float32 in [-0.5, 0.5]."""
    return (0.5 * np.sin(2 * np.pi * 330 * np.arange(24_000) / RATE)).astype(np.float32)


def write(path, samples, rate=RATE, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def cut(path, fraction):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def fails(function, *args):
    with pytest.raises(AudioError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files


@pytest.mark.parametrize(("extension", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
def test_formats(tmp_path, tone, extension, tolerance):
    wave = load_audio(write(tmp_path / f"clip.{extension}", tone))
    assert wave.dtype == torch.float32 and wave.shape == tone.shape
    assert clip_samples(tmp_path / f"clip.{extension}") == len(wave)
    np.testing.assert_allclose(wave[2_000:-2_000], tone[2_000:-2_000], atol=tolerance)


def test_opus(tmp_path, tone):
    assert load_audio(write(tmp_path / "clip.ogg", tone, subtype="OPUS")).shape == tone.shape


def test_path_as_string(tmp_path, tone):
    path = write(tmp_path / "clip.wav", tone)
    assert torch.equal(load_audio(str(path)), load_audio(path))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_files_are_resampled(tmp_path, rate):
    samples = 0.5 * np.sin(2 * np.pi * 330 * np.arange(rate) / rate)
    wave = load_audio(write(tmp_path / "clip.wav", samples, rate))
    expected = 0.5 * np.sin(2 * np.pi * 330 * np.arange(RATE) / RATE)
    assert abs(len(wave) - RATE) <= 1
    np.testing.assert_allclose(wave[800:15_000], expected[800:15_000], atol=2e-3)


def test_channels_of_a_file_are_averaged(tmp_path, tone):
    stereo = np.stack((tone, -0.5 * tone), axis=1)
    wave = load_audio(write(tmp_path / "clip.wav", stereo, subtype="FLOAT"))
    np.testing.assert_allclose(wave, 0.25 * tone, atol=1e-6)


def test_missing_file(tmp_path):
    assert fails(load_audio, tmp_path / "none.wav") == f"{tmp_path}/none.wav: no such file"


def test_directory(tmp_path):
    assert fails(load_audio, tmp_path) == f"{tmp_path}: expected an audio file, got a directory"


def test_special_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert "special file" in fails(load_audio, tmp_path / "pipe.wav")


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "raw"])
def test_empty_file(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    path.touch()
    assert fails(load_audio, path) == fails(clip_samples, path) == f"{path}: an empty file"


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "raw", "txt"])
def test_not_audio(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    path.write_text("Dear reader, this is a letter. " * 100)
    assert fails(load_audio, path).startswith(f"{path}: not audio that can be decoded")


def test_no_samples(tmp_path):
    path = write(tmp_path / "clip.wav", np.zeros(0))
    assert fails(load_audio, path) == fails(clip_samples, path) == f"{path}: holds no samples"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_file_with_non_finite_samples(tmp_path, tone, value):
    tone[77] = value
    path = write(tmp_path / "clip.wav", tone, subtype="FLOAT")
    assert fails(load_audio, path) == f"{path}: holds NaN or infinite samples"


@pytest.mark.parametrize("fraction", [0.99, 0.5, 0.1])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "aiff", "au"])
def test_truncated_file(tmp_path, extension, fraction):
    noise = np.random.default_rng(0).normal(scale=0.1, size=160_000)
    path = cut(write(tmp_path / f"clip.{extension}", noise), fraction)
    assert fails(load_audio, path).startswith(f"{path}: truncated")
    assert fails(clip_samples, path).startswith(f"{path}: truncated")


@pytest.mark.parametrize("rate", [8_000, 12_345, 22_050, 32_000, 44_100, 48_000])
def test_samples_are_counted_as_they_will_be(tmp_path, rate):
    noise = np.random.default_rng(0).normal(scale=0.1, size=2 * rate)
    for length in range(2 * rate - 20, 2 * rate):
        path = write(tmp_path / "clip.flac", noise[:length], rate)
        assert clip_samples(path.read_bytes()) == clip_samples(path) == len(as_waveform(path))


def test_of_counted_samples_only_the_last_one_is_decoded(tmp_path, tone):
    tone[77] = np.nan
    path = write(tmp_path / "clip.wav", tone, subtype="FLOAT")
    assert clip_samples(path) == len(tone)
    assert fails(load_audio, path) == f"{path}: holds NaN or infinite samples"


def test_file_cut_within_its_header(tmp_path, tone):
    for extension in ("wav", "flac", "ogg", "mp3"):
        path = write(tmp_path / f"clip.{extension}", tone)
        path.write_bytes(path.read_bytes()[:40])
        assert fails(load_audio, path) == fails(clip_samples, path)


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_wav_streamed_into_a_pipe_is_whole(tmp_path, tone, declared):
    path = write(tmp_path / "clip.wav", tone)
    data = bytearray(path.read_bytes())
    size = data.index(b"data") + 4
    data[size : size + 4] = struct.pack("<I", declared)
    path.write_bytes(data)
    assert load_audio(path).shape == tone.shape == (clip_samples(path),)


@pytest.mark.parametrize("tagged", [False, True])
def test_mp3_without_a_length_header_is_warned_about(tmp_path, tone, tagged):
    path = write(tmp_path / "clip.mp3", tone, bitrate_mode="CONSTANT", compression_level=0.5)
    data = path.read_bytes()
    header = data.index(data[:2], 2)  # where the first frame ends, which holds the length and no sound
    tag = b"ID3\x04\0\0" + struct.pack(">I", 0x00000100) + bytes(128) if tagged else b""
    path.write_bytes(tag + data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_audio(path).shape == tone.shape
    path.write_bytes(tag + data[header:])
    with pytest.warns(UserWarning, match="clip.mp3: an mp3 without a length header"):
        samples = len(load_audio(path))
    assert samples >= len(tone)
    with pytest.warns(UserWarning, match="clip.mp3: an mp3 without a length header"):
        assert clip_samples(path) == samples


# Arrays


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, np.ndarray.tolist, tuple])
def test_containers(tone, make):
    wave = as_waveform(make(tone))
    assert wave.dtype == torch.float32
    np.testing.assert_array_equal(wave, tone)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.longdouble, ">f4"])
def test_float_widths(tone, dtype):
    np.testing.assert_allclose(as_waveform(tone.astype(dtype)), tone, atol=1e-3)


def test_bfloat16(tone):
    np.testing.assert_allclose(as_waveform(torch.from_numpy(tone).bfloat16()), tone, atol=2e-3)


@pytest.mark.parametrize(
    ("dtype", "scale", "zero"),
    [("uint8", 2**7, 2**7), ("int8", 2**7, 0), ("int16", 2**15, 0), (">i2", 2**15, 0), ("int32", 2**31, 0)],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_integers_are_scaled_by_their_width(tone, dtype, scale, zero, as_tensor):
    integers = (np.round(tone * scale) + zero).astype(dtype)
    if as_tensor:
        integers = torch.from_numpy(integers.astype(np.dtype(dtype).newbyteorder("=")))
    np.testing.assert_allclose(as_waveform(integers), tone, atol=0.51 / scale + 1e-7)


def test_full_scale_integers():
    assert as_waveform(np.array([-(2**15), 0, 2**15 - 1] * 200, np.int16)).aminmax() == (-1.0, 1 - 2**-15)
    assert as_waveform(np.array([0, 128, 255] * 200, np.uint8)).aminmax() == (-1.0, 1 - 2**-7)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_channels_are_the_smaller_axis(tone, axis, make):
    np.testing.assert_allclose(as_waveform(make(np.stack((tone, 0.5 * tone), axis))), 0.75 * tone, atol=1e-6)


def test_stereo_integers(tone):
    integers = np.round(tone * 2**15).astype(np.int16)
    np.testing.assert_allclose(as_waveform(np.stack((integers, integers), axis=1)), tone, atol=1e-4)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_arrays_are_resampled(make):
    samples = np.random.default_rng(0).normal(size=12_000).astype(np.float32)
    expected = soxr.resample(samples, 24_000, RATE, quality="HQ")
    np.testing.assert_array_equal(as_waveform(make(samples), 24_000), expected)
    np.testing.assert_array_equal(as_waveform(make(samples), np.int64(24_000)), expected)
    assert as_waveform(make(samples), 22_050.5).shape == (8_707,)


class AudioDecoder:
    """The interface of what `datasets` gives with torchcodec."""

    def __init__(self, array, rate):
        self.values = {"array": array, "sampling_rate": rate}

    def __getitem__(self, name):
        return self.values[name]


def test_other_forms_in_which_datasets_gives_audio(tone, tmp_path):
    soundfile.write(path := tmp_path / "tone.wav", tone, 8_000, "FLOAT")
    expected = as_waveform({"array": tone, "sampling_rate": 8_000})
    for given in (
        AudioDecoder(tone, 8_000),
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    ):
        torch.testing.assert_close(as_waveform(given), expected)
    with pytest.raises(AudioError, match=r"nowhere.wav: expected audio|nowhere.wav"):
        as_waveform({"bytes": b"no audio", "path": "nowhere.wav"})


def test_mapping_as_datasets_gives_it(tone):
    assert len(as_waveform({"array": tone, "sampling_rate": 8_000, "path": None}, sampling_rate=3)) == 2 * len(tone)


def test_path(tmp_path, tone):
    path = write(tmp_path / "clip.wav", tone)
    assert torch.equal(as_waveform(path), load_audio(path))
    assert torch.equal(as_waveform(str(path), sampling_rate=8_000), load_audio(path))


def test_tensor_is_not_copied(tone):
    wave = torch.from_numpy(tone)
    assert as_waveform(wave).data_ptr() == wave.data_ptr()


def test_array_is_copied_and_may_be_read_only_or_reversed(tone):
    tone.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wave = as_waveform(tone[::-1])
    assert wave[0] == tone[-1]


def test_gradients_end_here(tone):
    assert not as_waveform(torch.from_numpy(tone).requires_grad_()).requires_grad


@pytest.mark.parametrize("length", [1, MIN_SAMPLES - 1])
def test_short_clip_is_padded_to_1_s_and_said(length):
    with pytest.warns(UserWarning) as caught:
        wave = as_waveform(np.ones(length, np.float32), name="third clip")
    (warning,) = caught
    assert str(warning.message) == f"third clip: {length} samples are under 25 ms, padded with zeros to 1 s"
    assert wave.shape == (RATE,) and wave.sum() == length


def test_short_file_is_named(tmp_path):
    path = write(tmp_path / "click.wav", np.ones(100))
    with pytest.warns(UserWarning, match="click.wav: 100 samples"):
        assert as_waveform(path).shape == (RATE,)


def test_shortest_clip_is_not_padded():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_waveform(np.ones(MIN_SAMPLES, np.float32)).shape == (MIN_SAMPLES,)


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (None, "NoneType"),
        (3.0, "float"),
        (b"RIFF", "bytes"),
        (np.zeros((2, 3, 400)), r"[2, 3, 400]"),
        (torch.tensor(0.0), "[]"),
        (np.zeros(0), "empty array of shape [0]"),
        ([], "empty array of shape [0]"),
        (np.zeros((2, 0)), "empty array of shape [2, 0]"),
        (np.zeros(800, complex), "complex128"),
        (torch.zeros(800, dtype=torch.complex64), "complex64"),
        (np.zeros(800, bool), "bool"),
        (torch.zeros(800, dtype=torch.bool), "bool"),
        (np.zeros(800, np.int64), "int64"),
        ([0, 1, 2] * 300, "int64"),
        (np.zeros(800, np.uint16), "uint16"),
        (["a"] * 800, "<U1"),
        ([[0.0, 1.0], [0.0]], "not an array of numbers"),
        (np.array([None] * 800), "object"),
        (np.r_[np.zeros(800), np.nan], "NaN or infinite"),
        (torch.full((800,), -torch.inf), "NaN or infinite"),
        (np.full(800, 1e300), "NaN or infinite"),
        ({"array": np.zeros(800)}, "got keys ['array']"),
        ({"file": "a.wav"}, "got keys ['file']"),
        ({"array": np.zeros(800), "sampling_rate": None}, "None"),
        ({"array": None, "sampling_rate": RATE}, "NoneType"),
    ],
)
def test_bad_arrays(audio, said):
    message = fails(as_waveform, audio, RATE, "clip 7")
    assert message.startswith("clip 7: ") and said in message


@pytest.mark.parametrize("rate", [0, -16_000, 16, np.nan, np.inf, "16000", None, True])
def test_bad_rates(tone, rate):
    message = fails(as_waveform, tone, rate, "clip 7")
    assert message.startswith("clip 7: expected a sampling rate") and message.endswith(f"got {rate!r}")


def test_errors_are_value_errors():
    assert issubclass(AudioError, MoweError) and issubclass(MoweError, ValueError)


# Windows and batches


@pytest.mark.parametrize(
    ("length", "pieces"),
    [
        (300, [400]),
        (5_000, [5_000]),
        (10_000, [10_000]),
        (10_001, [10_000, 400]),
        (10_400, [10_000, 400]),
        (25_000, [10_000, 10_000, 5_000]),
    ],
)
def test_windows_hold_every_sample(length, pieces):
    wave = torch.rand(length) + 1
    windows = split_windows(wave, 10_000)
    assert [len(window) for window in windows] == pieces
    assert torch.equal(torch.cat(windows)[:length], wave)
    assert not torch.cat(windows)[length:].any()
    assert all(window.data_ptr() == wave[10_000 * i :].data_ptr() for i, window in enumerate(windows[:-1]))


def test_windows_are_30_s():
    assert [len(window) for window in split_windows(torch.zeros(1_000_000))] == [480_000, 480_000, 40_000]


def test_batch():
    waves = [torch.rand(400), torch.rand(1_000, dtype=torch.float64), torch.rand(500).half().requires_grad_()]
    batch = AudioBatch.from_waveforms(waves)
    assert batch.lengths == (400, 1_000, 500)
    assert batch.starts.tolist() == [0, 400, 1_400] and batch.starts.dtype == torch.int32
    assert batch.samples.dtype == torch.float32 and not batch.samples.requires_grad
    assert torch.equal(batch.samples, torch.cat([wave.detach().float() for wave in waves]))


def test_batch_goes_where_it_is_told():
    batch = AudioBatch.from_waveforms([torch.zeros(400)], device="meta")
    assert batch.samples.device.type == batch.starts.device.type == "meta"


@pytest.mark.parametrize(
    ("waveforms", "said"),
    [
        ([], "at least one clip"),
        ([torch.zeros(400), np.zeros(400)], "clip 1: expected a 1-D float tensor, got ndarray"),
        ([torch.zeros(2, 400)], "clip 0: expected a 1-D float tensor, got torch.float32 [2, 400]"),
        ([torch.zeros(400, dtype=torch.int16)], "clip 0: expected a 1-D float tensor, got torch.int16 [400]"),
        ([torch.zeros(400), torch.zeros(399)], "clip 1: expected at least 400 samples (25 ms), got 399"),
    ],
)
def test_bad_batches(waveforms, said):
    assert said in fails(AudioBatch.from_waveforms, waveforms)
