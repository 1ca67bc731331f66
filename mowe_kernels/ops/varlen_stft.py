"""`mowe::varlen_stft`: short-time spectra of packed clips, each mirrored at its own ends."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.ops._op import Op, check, check_shape


def _fake(samples, window, cu_samples, cu_frames, num_frames, hop, padded_to):
    return samples.new_empty(num_frames, window.shape[0] // 2 + 1, dtype=samples.dtype.to_complex())


_op = Op(
    "varlen_stft",
    "(Tensor samples, Tensor window, Tensor cu_samples, Tensor cu_frames, SymInt num_frames, int hop,"
    " SymInt padded_to) -> Tensor",
    _fake,
    module="varlen_stft",
    function="forward",
)


def varlen_stft(
    samples: Tensor,
    window: Tensor,
    *,
    cu_samples: Tensor,
    cu_frames: Tensor,
    num_frames: int,
    hop: int,
    padded_to: int = 0,
) -> Tensor:
    """Frame t of a clip is the Fourier transform of window times its samples hop t - N/2 .. hop t + N/2 - 1.

    It is what `torch.stft(clip, N, hop, window=window, return_complex=True)`, centred and reflecting, gives for every
    clip alone, but only as many frames as asked for. A clip shorter than padded_to goes on with zeros up to there,
    and is mirrored there.

    samples: [S] float32 or float64, clips end to end. window: [N], N even, of the type of the samples.
    cu_samples: int32 [B+1], first sample of each clip; every clip has at least N. cu_frames: int32 [B+1], first frame
    of each clip; every clip has at least one, and every frame sees samples of its clip. num_frames: cu_frames[-1],
    known to the host. Returns complex [num_frames, N/2 + 1]. No gradient.
    Floor: S + R (N + 2) elements moved for R frames. Raises ValueError for shapes or types that do not fit.
    """
    op = "varlen_stft"
    check_shape(op, "samples", samples, (None,), "packed samples [S]")
    check(samples.dtype in (torch.float32, torch.float64), op, f"samples must be float32, got {samples.dtype}")
    check_shape(op, "window", window, (None,), "analysis window [N]")
    n = window.shape[0]
    check(window.dtype == samples.dtype, op, f"window must be {samples.dtype} as the samples are, got {window.dtype}")
    check(window.device == samples.device, op, f"window must be on {samples.device}, got {window.device}")
    check(n > 0 and n % 2 == 0, op, f"window must have an even number of samples, got {n}")
    check(hop > 0, op, f"hop must be positive, got {hop}")
    check(samples.shape[0] >= n, op, f"clips must have at least the {n} samples of the window, got {samples.shape[0]}")
    check_shape(op, "cu_samples", cu_samples, (None,), "first sample of each clip [B+1]")
    check_shape(op, "cu_frames", cu_frames, (cu_samples.shape[0],), "first frame of each clip [B+1]")
    return _op(samples, window, cu_samples, cu_frames, num_frames, hop, padded_to)
