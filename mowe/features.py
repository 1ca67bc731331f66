"""Model inputs from waveforms, on the device of the batch: Whisper's log-mel rows, and waves of unit variance.

Clips lie end to end, nothing waits for the device, and a clip's result does not depend on its neighbours in the batch.
No gradient flows into the waveforms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from mowe.audio import SAMPLING_RATE, WINDOW_SAMPLES, AudioBatch, offsets
from mowe.errors import AudioError, ConfigError
from mowe_kernels import varlen_log_mel, varlen_stft
from mowe_kernels.plan import device_lengths

N_FFT = 400
HOP = 160
Context = Literal["valid", "window"]
_WINDOW_FRAMES = WINDOW_SAMPLES // HOP
_BLOCK = 1_600  # samples that the statistics of a clip sum at once


class Spectrogram:
    """Short-time spectra of a batch of clips, from which every mel bank is made: one STFT for all encoders.

    audio: the clips.
    context: "valid" for a clip's own frames, length // 160; "window" for the clip padded with zeros to 30 s, 3000
      frames, of which only those that touch the clip are transformed.

    num_frames: rows of each clip, known to the host.
    starts: [clips] int32 on the device, the first row of each clip.

    The analysis is Whisper's: Hann windows of 25 ms every 10 ms, centred, the clip mirrored at its ends, the last frame
    dropped. Raises `ConfigError` for another context, `AudioError` for a clip over 30 s in "window".
    """

    def __init__(self, audio: AudioBatch, context: Context):
        check_context(context)
        self.num_frames = num_frames(audio.lengths, context)
        touched = self.num_frames
        if context == "window":
            for index, length in enumerate(audio.lengths):
                if length > WINDOW_SAMPLES:
                    raise AudioError(f"clip {index}: expected at most 30 s in one window, got {length} samples")
            touched = tuple(min(-(-(length + N_FFT // 2) // HOP), _WINDOW_FRAMES) for length in audio.lengths)
        self.audio = audio
        self._padded_to = WINDOW_SAMPLES if context == "window" else 0
        self._num_touched = sum(touched)
        table = [[*offsets(sizes), sum(sizes)] for sizes in (audio.lengths, touched, self.num_frames)]
        self._cu_samples, self._cu_touched, self._cu_frames = device_lengths(table, audio.samples.device)
        self.starts = self._cu_frames[:-1]

    @cached_property
    @torch.no_grad()
    def spectrum(self) -> Tensor:
        """[frames, 201] complex64: of the frames that touch their clip, packed by clip."""
        samples = self.audio.samples
        return varlen_stft(
            samples, _hann_window(samples.device), cu_samples=self._cu_samples, cu_frames=self._cu_touched,
            num_frames=self._num_touched, hop=HOP, padded_to=self._padded_to,
        )  # fmt: skip

    @torch.no_grad()
    def log_mel(self, num_mel_bins: int) -> Tensor:
        """[sum(num_frames), num_mel_bins] float32, packed by clip: the log-mel rows an encoder of that many bins takes.

        "valid": what `transformers.WhisperFeatureExtractor(feature_size=num_mel_bins)` gives for the clip alone,
        unpadded; "window": what it gives by default, the clip padded to 30 s.
        """
        device = self.audio.samples.device
        filters = _mel_filters(num_mel_bins, device)
        with torch.autocast(device.type, enabled=False):
            return varlen_log_mel(
                self.spectrum, filters, cu_frames=self._cu_touched, cu_rows=self._cu_frames,
                num_rows=sum(self.num_frames),
            )  # fmt: skip


def check_context(context: str) -> None:
    """Raise ConfigError for a context that is none."""
    if context not in get_args(Context):
        raise ConfigError(f"context must be {' or '.join(map(repr, get_args(Context)))}, got {context!r}")


def num_frames(lengths: Sequence[int], context: str) -> tuple[int, ...]:
    """Log-mel rows of clips of so many samples."""
    return tuple(_WINDOW_FRAMES if context == "window" else length // HOP for length in lengths)


def normalize_waves(audio: AudioBatch) -> AudioBatch:
    """Every clip with zero mean and unit variance, as `transformers.Wav2Vec2FeatureExtractor(do_normalize=True)`:
    (x - mean) / sqrt(var + 1e-7), var the population variance over the clip.
    """
    normal = _normalize_op if torch.compiler.is_compiling() else _normalize
    return AudioBatch(normal(audio.samples, list(audio.lengths)), audio.lengths)


@torch.no_grad()
def _normalize(samples: Tensor, lengths: list[int]) -> Tensor:
    audio = AudioBatch(samples, tuple(lengths))
    blocks = tuple(-(-length // _BLOCK) for length in audio.lengths)
    padding = [-length % _BLOCK for length in audio.lengths]
    silence = samples.new_zeros(_BLOCK)
    waves = zip(samples.split(audio.lengths), padding, strict=True)
    padded = torch.cat([piece for wave, pad in waves for piece in (wave, silence[:pad])]).view(-1, _BLOCK)

    starts, counts, totals = device_lengths((offsets(blocks), blocks, audio.lengths), samples.device)
    wide = padded.double()  # sums of squares must not cancel
    sums, squares = (_by_clip(x.sum(1), starts, counts, max(blocks), 0.0).sum(1) for x in (wide, wide.square()))
    mean = sums / totals
    scale = (squares / totals - mean.square() + 1e-7).rsqrt()
    clip = _owners(counts, len(padded))
    normal = (padded - mean.float()[clip, None]).mul_(scale.float()[clip, None])

    sizes = [size for pair in zip(audio.lengths, padding, strict=True) for size in pair]
    return torch.cat(normal.flatten().split(sizes)[::2])


def log_mel_rows(audio: AudioBatch, context: str, num_mel_bins: int) -> tuple[Tensor, Tensor]:
    """`Spectrogram.log_mel` and `starts` as one node of a compiled graph, which cuts no clip to its own shape."""
    rows = _log_mel_op(audio.samples, list(audio.lengths), context, num_mel_bins)
    return rows, device_lengths(offsets(num_frames(audio.lengths, context)), rows.device)


def _log_mel(samples: Tensor, lengths: list[int], context: Context, num_mel_bins: int) -> Tensor:
    return Spectrogram(AudioBatch(samples, tuple(lengths)), context).log_mel(num_mel_bins)


_log_mel_op = torch.library.custom_op(
    "mowe::log_mel",
    _log_mel,
    mutates_args=(),
    schema="(Tensor samples, SymInt[] lengths, str context, int num_mel_bins) -> Tensor",
)
_log_mel_op.register_fake(
    lambda samples, lengths, context, bins: samples.new_empty(sum(num_frames(lengths, context)), bins)
)
_normalize_op = torch.library.custom_op(
    "mowe::normalize_waves", _normalize, mutates_args=(), schema="(Tensor samples, SymInt[] lengths) -> Tensor"
)
_normalize_op.register_fake(lambda samples, lengths: torch.empty_like(samples))


def _owners(counts: Tensor, total: int) -> Tensor:
    """[total] int32: the clip of each row, when clip i has counts[i] of the `total` rows."""
    clips = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return clips.repeat_interleave(counts, output_size=total)  # without the size the device would be asked for it


def _by_clip(values: Tensor, starts: Tensor, counts: Tensor, longest: int, fill: float) -> Tensor:
    """[clips, longest]: each clip's run of `values`, then `fill`. A reduction of a line does the same work every time,
    where adding or comparing into one cell per clip would depend on the order of arrival.
    """
    step = torch.arange(longest, dtype=torch.int32, device=values.device)
    index = starts[:, None] + torch.minimum(step, counts[:, None] - 1)
    return torch.where(step < counts[:, None], values[index], fill)


@cache
def _hann_window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, device=device)


@cache
def _mel_filters(num_mel_bins: int, device: torch.device) -> Tensor:
    """[201, num_mel_bins] float32: triangular filters on the Slaney scale from 0 to 8 kHz."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=8_000.0,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).to(device, torch.float32)
