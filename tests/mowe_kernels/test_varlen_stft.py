from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mowe_kernels import varlen_stft
from tests.mowe_kernels.checks import int32, normal, offsets, opcheck, raises, spans, table

pytestmark = pytest.mark.usefixtures("poisoned")

N, HOP = 400, 160
# Samples of each clip, and to where they go on with zeros.
CLIPS = {
    "one frame more": ((400, 401, 479, 480, 560, 7_321), 0),
    "one clip": ((640,), 0),
    "padded": ((400, 7_321, 560), 8_000),
    "padding that is mirrored": ((7_640, 7_641, 7_801, 7_958, 7_959, 7_970, 7_999, 8_000), 8_000),
}


def frames_of(samples: int, padded_to: int = 0) -> int:
    """As many as the padding gives, but only those that see samples of the clip."""
    return min(max(samples, padded_to) // HOP, -(-(samples + N // 2) // HOP))


def op(clips: tuple[int, ...], padded_to: int = 0, window: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """[frames, 201, 2], the spectrum's parts."""
    frames = tuple(frames_of(n, padded_to) for n in clips)

    def call(samples: Tensor) -> Tensor:
        on = {"dtype": samples.dtype, "device": samples.device}
        spectrum = varlen_stft(
            samples, torch.hann_window(N, **on) if window is None else window.to(**on),
            cu_samples=offsets(clips).to(samples.device), cu_frames=offsets(frames).to(samples.device),
            num_frames=sum(frames), hop=HOP, padded_to=padded_to,
        )  # fmt: skip
        return torch.view_as_real(spectrum)

    return call


def naive(samples: Tensor, clips: tuple[int, ...], padded_to: int, window: Tensor) -> Tensor:
    spectra = []
    for clip in (samples[rows] for rows in spans(clips)):
        whole = F.pad(clip, (0, max(0, padded_to - len(clip))))
        spectrum = torch.stft(whole, N, HOP, window=window, return_complex=True, pad_mode="reflect")
        spectra.append(spectrum.T[: frames_of(len(clip), padded_to)])
    return torch.view_as_real(torch.cat(spectra))


@table(CLIPS, "batch")
def test_is_the_transform_of_every_clip_alone(batch):
    clips, padded_to = batch
    samples, window = normal(sum(clips)), torch.rand(N, dtype=torch.float64)
    expected = naive(samples, clips, padded_to, window)
    torch.testing.assert_close(op(clips, padded_to, window)(samples), expected)


def test_other_windows_and_hops():
    samples, window, clips = normal(150), torch.hann_window(20, dtype=torch.float64), (29, 50, 71)
    for hop in (3, 10, 20, 27):
        spectrum = varlen_stft(
            samples, window, cu_samples=offsets(clips), cu_frames=offsets(tuple(n // hop + 1 for n in clips)),
            num_frames=sum(n // hop + 1 for n in clips), hop=hop,
        )  # fmt: skip
        alone = [torch.stft(samples[s], 20, hop, window=window, return_complex=True).T for s in spans(clips)]
        torch.testing.assert_close(spectrum, torch.cat(alone))


def test_types():
    clips = (480, 400)
    for dtype in (torch.float32, torch.float64):
        assert op(clips)(normal(880).to(dtype)).dtype == dtype


def test_samples_keep_no_gradient():
    samples = normal(400).requires_grad_()
    with pytest.raises(RuntimeError, match="varlen_stft"):
        op((400,))(samples).sum().backward()


def test_registration():
    samples, window = normal(880).float(), torch.hann_window(N)
    for padded_to in (0, 1_000):
        frames = tuple(frames_of(n, padded_to) for n in (480, 400))
        layout = int32(0, 480, 880), offsets(frames), sum(frames), HOP, padded_to
        opcheck(torch.ops.mowe.varlen_stft.default, (samples, window, *layout))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"samples": normal(1, 880)}, ("samples must be packed samples", "[any]", "got [1, 880]")),
        ({"samples": normal(880).half()}, ("samples must be float32", "float16")),
        ({"window": normal(N).float()}, ("window must be torch.float64", "float32")),
        ({"window": normal(N).to("meta")}, ("window must be on cpu", "got meta")),
        ({"window": normal(399)}, ("even", "399")),
        ({"samples": normal(399)}, ("at least the 400 samples", "399")),
        ({"cu_samples": int32(0, 880)[None]}, ("cu_samples", "[any]", "got [1, 2]")),
        ({"cu_frames": int32(0, 2)}, ("cu_frames", "[3]", "got [2]")),
        ({"hop": 0}, ("hop", "0")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    right = {"cu_samples": int32(0, 480, 880), "cu_frames": int32(0, 3, 5), "num_frames": 5, "hop": HOP}
    with raises("varlen_stft: ", *parts):
        varlen_stft(**{"samples": normal(880), "window": normal(N)} | right | change)
