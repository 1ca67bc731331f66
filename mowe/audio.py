"""Audio in: files and arrays of any kind to mono float32 waveforms at 16 kHz, and batches of them."""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mowe.errors import AudioError
from mowe_kernels.plan import device_lengths

SAMPLING_RATE = 16_000
"""Hz. The rate of every waveform inside the library."""

MIN_SAMPLES = 400
"""25 ms, one analysis window: the shortest clip an encoder can take."""

WINDOW_SAMPLES = 480_000
"""30 s: the longest piece an encoder is given at once."""

_SHORT_PADDED_TO = SAMPLING_RATE  # 1 s, as the paper's adapter pads short audio
_MIN_RATE = 1_000  # below this, kHz were given for Hz, and resampling would blow the clip up a thousandfold

_FULL_SCALE = {torch.uint8: 2**7, torch.int8: 2**7, torch.int16: 2**15, torch.int32: 2**31}
_UNKNOWN_LENGTH = 0x7FFFF000  # writers into a pipe declare this many bytes or more: the size was not known yet
_DECLARED_BYTES = re.compile(r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_OGG_PAGE_MAX = 27 + 255 + 255 * 255


def load_audio(path: str | os.PathLike[str]) -> Tensor:
    """Reads a wav, flac, ogg or mp3 file as a waveform: [samples] float32, 16 kHz, the mean of its channels.

    Raises `AudioError`, naming the file, if it is missing, a directory, empty, not audio, cut off, without samples, or
    holds NaN or infinite samples. A cut is found where the file tells its length: always in wav and flac, in ogg by its
    last page, in mp3 by the length header nearly every encoder writes; an mp3 without one is warned about, because
    its length is a guess from its bit rate.
    """
    with _opened(path) as file:
        return file.waveform()


def decode_audio(data: bytes, name: str = "audio") -> Tensor:
    """The same for the bytes of such a file. name: what errors call it."""
    with _opened(data, name) as file:
        return file.waveform()


def clip_samples(source: str | os.PathLike[str] | bytes, name: str = "audio") -> int:
    """How many samples `as_waveform` makes of a file or its bytes, of which only the beginning and the end are read.

    Raises `AudioError` as `load_audio` does, but damage in the middle and samples that are not finite are not seen.
    """
    with _opened(source, name) as file:
        return _usable_length(file.count(), file.name)


def as_waveform(audio: Any, sampling_rate: float = SAMPLING_RATE, name: str = "audio") -> Tensor:
    """One clip in any usual form as a waveform: [samples] float32 at 16 kHz, at least `MIN_SAMPLES` long, finite.

    audio: a path (see `load_audio`); a 1-D or 2-D numpy array, torch tensor or (nested) list; or what `datasets` gives:
      a mapping with "array" and "sampling_rate", or with "bytes" or "path", or its AudioDecoder. The smaller axis of a
      2-D clip holds the channels, which are averaged. Floats are taken as they are; 8-, 16- and 32-bit integers are
      scaled to [-1, 1] (uint8 is offset binary). Wider or unsigned integers, and lists of ints, have no agreed scale
      and are refused.
    sampling_rate: Hz, of an array. A path or a mapping brings its own.
    name: what errors and warnings call the clip.

    A tensor stays on its device, and is not copied where nothing has to change. A clip under 25 ms is padded with
    zeros to 1 s, as in the paper, with a `UserWarning`. Raises `AudioError` for anything else.
    """
    if isinstance(audio, (str, os.PathLike)):
        name = os.fspath(audio)
        wave = load_audio(audio)
    elif isinstance(audio, Mapping) and audio.get("bytes") is not None:
        wave = decode_audio(audio["bytes"], audio.get("path") or name)
    elif isinstance(audio, Mapping) and "array" not in audio and audio.get("path") is not None:
        return as_waveform(audio["path"])
    elif isinstance(audio, Mapping) or type(audio).__name__ == "AudioDecoder":
        try:
            array, rate = audio["array"], audio["sampling_rate"]
        except KeyError:
            raise AudioError(
                f'{name}: expected a mapping with "array" and "sampling_rate", got keys {list(audio)}'
            ) from None
        return as_waveform(array, rate, name)
    else:
        wave = _mono(_as_tensor(audio, name), sampling_rate, name)
    missing = _usable_length(len(wave), name) - len(wave)
    return F.pad(wave, (0, missing)) if missing else wave


def _usable_length(samples: int, name: str) -> int:
    """What a clip of so many samples is padded to."""
    if samples >= MIN_SAMPLES:
        return samples
    warnings.warn(f"{name}: {samples} samples are under 25 ms, padded with zeros to 1 s", stacklevel=3)
    return _SHORT_PADDED_TO


def split_windows(wave: Tensor, window: int = WINDOW_SAMPLES, fewest: int = MIN_SAMPLES) -> list[Tensor]:
    """Cuts a waveform [samples] into consecutive views of `window` samples, the last one shorter. Nothing is dropped.

    A last piece under `fewest` samples is padded with zeros to so many, so that every piece can be encoded (our choice:
    the pieces before it stay what they are without it).
    """
    pieces = list(wave.split(window))
    if (missing := fewest - len(pieces[-1])) > 0:
        pieces[-1] = F.pad(pieces[-1], (0, missing))
    return pieces


@dataclass(frozen=True)
class AudioBatch:
    """Clips laid end to end, without padding.

    samples: [sum of lengths] float32, 16 kHz, finite.
    lengths: samples of each clip, known to the host, so that no shape ever has to be read back from the device.
    """

    samples: Tensor
    lengths: tuple[int, ...]

    @property
    def starts(self) -> Tensor:
        """[clips] int32 on the device of `samples`: where each clip begins."""
        return device_lengths(offsets(self.lengths), self.samples.device)

    @classmethod
    def from_waveforms(cls, waveforms: Sequence[Tensor], device: torch.device | str | None = None) -> AudioBatch:
        """Lays 1-D float waveforms (see `as_waveform`) end to end on `device`, or where the first one is.

        Values are trusted to be finite: looking would make a GPU wait. Raises `AudioError` if there are no clips, or
        one is not a 1-D float tensor of at least `MIN_SAMPLES`.
        """
        if not len(waveforms):
            raise AudioError("expected at least one clip, got none")
        for index, wave in enumerate(waveforms):
            if not isinstance(wave, Tensor):
                raise AudioError(f"clip {index}: expected a 1-D float tensor, got {type(wave).__name__}")
            if wave.ndim != 1 or not wave.is_floating_point():
                raise AudioError(f"clip {index}: expected a 1-D float tensor, got {wave.dtype} {list(wave.shape)}")
            if wave.shape[0] < MIN_SAMPLES:
                raise AudioError(f"clip {index}: expected at least {MIN_SAMPLES} samples (25 ms), got {len(wave)}")
        device = torch.device(device) if device is not None else waveforms[0].device
        lengths = tuple(wave.shape[0] for wave in waveforms)
        waves = [wave.detach() if wave.requires_grad else wave for wave in waveforms]
        return cls(_lay_out(waves, device) if not torch.compiler.is_compiling() else _op(waves, device), lengths)

    @classmethod
    def from_padded(cls, waveforms: Tensor, mask: Tensor | None, name: str) -> AudioBatch:
        """[N, S] waveforms, called `name` in errors, and their mask. Reads the lengths back from the device once.

        Raises `AudioError` for shapes that do not fit, gaps in the mask, no windows, and windows under `MIN_SAMPLES`.
        """
        if waveforms.dim() != 2 or (mask is not None and mask.shape != waveforms.shape):
            got = f"{list(waveforms.shape)} and {None if mask is None else list(mask.shape)}"
            raise AudioError(f"{name} and their mask must be [windows, samples], got {got}")
        count, samples = waveforms.shape
        lengths, ends = [samples] * count, [samples] * count
        if mask is not None and samples:
            real = mask.bool()
            last = samples - real.flip(1).byte().argmax(1)  # the first of the largest, seen from the end
            lengths, ends = torch.stack((real.sum(1), last)).tolist()
        shortest = min(lengths, default=MIN_SAMPLES)  # that there are none is told below
        if shortest < MIN_SAMPLES:
            raise AudioError(f"every window of audio needs {MIN_SAMPLES} samples (25 ms) or more, got {shortest}")
        if lengths != ends:
            raise AudioError(f"{name}_mask must be true from the first to the last sample of each window")
        return cls.from_waveforms([wave[:length] for wave, length in zip(waveforms, lengths, strict=True)])


def _lay_out(waves: list[Tensor], device: torch.device) -> Tensor:
    """The clips end to end, float32 on `device`, without waiting for it."""
    if device.type == "cuda" and all(wave.device.type == "cpu" for wave in waves):
        pinned = torch.empty(sum(map(len, waves)), dtype=torch.float32, pin_memory=True)
        torch.cat([wave.float() for wave in waves], out=pinned)
        return pinned.to(device, non_blocking=True)
    if any(wave.dtype != torch.float32 or wave.device != device for wave in waves):
        # On its way to the host, a copy that nobody waits for would be read before it is there.
        waves = [wave.to(device, torch.float32, non_blocking=device.type == "cuda") for wave in waves]
    return torch.cat(waves)


_op = torch.library.custom_op(  # for torch.compile, which knows no pinned memory
    "mowe::lay_out", _lay_out, mutates_args=(), schema="(Tensor[] waves, Device device) -> Tensor"
)
_op.register_fake(lambda waves, device: torch.empty(sum(w.shape[0] for w in waves), dtype=torch.float32, device=device))


def offsets(lengths: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces begins: the exclusive running sum of their lengths."""
    return list(accumulate(lengths[:-1], initial=0))


def _as_tensor(audio: Any, name: str) -> Tensor:
    """Samples of any container as a tensor of the dtype they came in; floats that torch lacks become float32."""
    if isinstance(audio, Tensor):
        return audio.detach()
    if not isinstance(audio, (np.ndarray, list, tuple)):
        raise AudioError(f"{name}: expected a path, an array, a tensor or a list, got {type(audio).__name__}")
    try:
        array = np.asarray(audio)
    except (ValueError, TypeError, RuntimeError) as error:
        raise AudioError(f"{name}: expected samples, got a list that is not an array of numbers") from error
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            array = array.astype(np.float32)
    elif array.dtype.kind in "iu":
        array = array.astype(array.dtype.newbyteorder("="))
    else:
        raise AudioError(f"{name}: expected float or integer samples, got {array.dtype}")
    return torch.tensor(np.ascontiguousarray(array))  # a copy: the array may be read-only


def _mono(samples: Tensor, sampling_rate: float, name: str) -> Tensor:
    """Samples [T], [C, T] or [T, C] of any real dtype -> [T] float32 at 16 kHz."""
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, Real) or not math.isfinite(sampling_rate):
        raise AudioError(f"{name}: expected a sampling rate in Hz, got {sampling_rate!r}")
    if sampling_rate < _MIN_RATE:
        raise AudioError(f"{name}: expected a sampling rate of at least {_MIN_RATE} Hz, got {sampling_rate}")
    if samples.ndim not in (1, 2):
        raise AudioError(f"{name}: expected 1-D samples or 2-D channels, got shape {list(samples.shape)}")
    if not samples.numel():
        raise AudioError(f"{name}: expected samples, got an empty array of shape {list(samples.shape)}")
    if samples.is_floating_point():
        wave = samples.float()
    elif samples.dtype in _FULL_SCALE:
        wave = samples.float() / _FULL_SCALE[samples.dtype]
        if samples.dtype == torch.uint8:
            wave = wave - 1.0
    else:
        kind = str(samples.dtype).removeprefix("torch.")
        raise AudioError(f"{name}: expected float samples in [-1, 1] or 8-, 16- or 32-bit integers, got {kind}")
    if not torch.isfinite(wave).all():
        raise AudioError(f"{name}: holds NaN or infinite samples")
    if wave.ndim == 2:
        wave = wave.mean(dim=0 if wave.shape[0] <= wave.shape[1] else 1)
    if sampling_rate == SAMPLING_RATE:
        return wave
    return torch.from_numpy(_resampled(wave.cpu().numpy(), sampling_rate)).to(wave.device)


def _resampled(wave: np.ndarray, rate: float) -> np.ndarray:
    """[T] float32 at `rate` Hz -> [T'] float32 at 16 kHz."""
    if rate == SAMPLING_RATE:
        return wave
    import soxr

    return soxr.resample(wave, rate, SAMPLING_RATE, quality="HQ")


@dataclass(frozen=True)
class _AudioFile:
    """file: of soundfile, open. stream: the same bytes, to look at."""

    name: str
    file: Any
    stream: BinaryIO

    def waveform(self) -> Tensor:
        """[T] float32 at 16 kHz, the mean of the channels."""
        samples = self._read()
        if not np.isfinite(samples).all():
            raise AudioError(f"{self.name}: holds NaN or infinite samples")
        return torch.from_numpy(_resampled(samples.mean(axis=1), self.file.samplerate))

    def count(self) -> int:
        """T, without decoding a file that looks whole."""
        frames = self.file.frames if self._looks_whole() else len(self._read())
        return int(frames * SAMPLING_RATE / self.file.samplerate + 0.5)

    def _read(self) -> np.ndarray:
        """[frames, channels] float32. Raises AudioError if they are not all there, or none."""
        try:
            self.file.seek(0)
            samples = self.file.read(dtype="float32", always_2d=True)
        except RuntimeError as error:
            raise AudioError(f"{self.name}: truncated or damaged, cannot be decoded to its end") from error
        promised, there = self.file.frames, len(samples)
        if self.file.format == "MP3" and _mp3_bytes(self.stream) is None:
            told = f"an mp3 without a length header, may be longer than the {there / self.file.samplerate:.2f} s read"
            warnings.warn(f"{self.name}: {told}", stacklevel=4)
        elif there < promised:
            raise AudioError(f"{self.name}: truncated, {promised} samples were promised, {there} are there")
        if not there:
            raise AudioError(f"{self.name}: holds no samples")
        return samples

    def _looks_whole(self) -> bool:
        """Whether the last sample can be read; of an mp3, whether the bytes are there that its header tells of."""
        if self.file.format == "MP3":  # whose decoder complains on stderr when it begins in the middle
            return 0 < (_mp3_bytes(self.stream) or 0) <= self.stream.seek(0, os.SEEK_END)
        try:
            self.file.seek(-1, os.SEEK_END)
            return len(self.file.read(1)) == 1
        except RuntimeError:
            return False


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes, name: str = "audio") -> Iterator[_AudioFile]:
    """An audio file, or the bytes of one, called `name`. Raises AudioError if its beginning tells that it is none, or
    that something is missing.
    """
    import soundfile

    if not isinstance(source, bytes):
        name = os.fspath(source)
    try:
        if not isinstance(source, bytes):
            _check_file(Path(source))
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            if not stream.seek(0, os.SEEK_END):
                raise AudioError(f"{name}: an empty file")
            try:
                file = soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else source)
            except (RuntimeError, TypeError) as error:  # TypeError: headerless .raw, of which nothing is known
                raise AudioError(f"{name}: not audio that can be decoded (wav, flac, ogg, mp3), or damaged") from error
            with file:
                _check_whole(name, file, stream)
                yield _AudioFile(name, file, stream)
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror})") from error


def _check_file(path: Path) -> None:
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if not path.is_file():
        raise AudioError(f"{path}: expected an audio file, got {'a directory' if path.is_dir() else 'a special file'}")


def _check_whole(name: str, file: Any, stream: BinaryIO) -> None:
    """Raise AudioError for a file of soundfile that is shorter than it says."""
    if file.format == "OGG" and _ends_within_ogg_page(stream):
        raise AudioError(f"{name}: truncated, its last page is incomplete")
    for declared, found in _DECLARED_BYTES.findall(file.extra_info):
        if int(found) < int(declared) < _UNKNOWN_LENGTH:
            raise AudioError(f"{name}: truncated, {declared} bytes of samples were promised, {found} are there")


def _ends_within_ogg_page(stream: BinaryIO) -> bool:
    """Whether an Ogg file ends before its last page does (RFC 3533, section 6): one the decoder would drop unsaid."""
    stream.seek(-min(_OGG_PAGE_MAX, stream.seek(0, os.SEEK_END)), os.SEEK_END)
    tail = stream.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _mp3_bytes(stream: BinaryIO) -> int | None:
    """Where an mp3 should end by the Xing or Info header in its first frame, after an ID3v2 tag; 0 where the header
    does not tell, and None without one, where the number of frames is not known either.
    """
    stream.seek(0)
    tag = stream.read(10)
    start = 0
    if tag.startswith(b"ID3"):
        start = 10 + sum(byte << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0), strict=True))
    stream.seek(start)
    first_frame = stream.read(2048)
    header = max(first_frame.find(b"Xing"), first_frame.find(b"Info"))
    if header < 0:
        return None
    flags, *told = struct.unpack(">III", first_frame[header + 4 : header + 16].ljust(12, b"\0"))
    size = told[flags & 1] if flags & 2 else 0
    return start + size if size else 0
