"""Triton `varlen_stft`: one kernel cuts the clips into windowed frames, the transform is the FFT library's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._launch import cdiv, check_dtypes, contiguous, launch, next_power_of_2, recorded, setting
from mowe_kernels.triton._sequences import find_sequence

# The FFT library plans every number of frames anew, in the host's time: numbers are rounded up to a multiple of this,
# so that most batches find the plan of an earlier one.
PLANNED = 1024


# p_samples: float32 [S]. p_window: float32 [N]. p_cu_samples, p_cu_frames: int32 [clips + 1]. p_out: float32 [R, N].
# Programs: BM frames of a clip.
@triton.jit(
    do_not_specialize=["clips", "padded_to"],
    do_not_specialize_on_alignment=["p_samples", "p_cu_samples", "p_cu_frames"],
)
def varlen_frames_kernel(
    p_samples, p_window, p_cu_samples, p_cu_frames, p_out, clips, padded_to,
    N: tl.constexpr, HOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    clip, first = find_sequence(p_cu_frames, tl.program_id(0), clips, BM)
    row = tl.load(p_cu_frames + clip) + first
    rows = tl.load(p_cu_frames + clip + 1) - row
    if rows <= 0:
        return
    start = tl.load(p_cu_samples + clip)
    length = tl.load(p_cu_samples + clip + 1) - start
    turn = tl.maximum(length, padded_to) - 1
    b_m = tl.arange(0, BM)
    b_n = tl.arange(0, BN)
    b_position = tl.abs((first + b_m)[:, None] * HOP + (b_n - N // 2)[None, :])
    b_position = turn - tl.abs(b_position - turn)
    there = (b_m < rows)[:, None] & (b_n < N)[None, :]
    heard = there & (b_position >= 0) & (b_position < length)
    b_x = tl.load(p_samples + start.to(tl.int64) + b_position, mask=heard, other=0.0)
    b_window = tl.load(p_window + b_n, mask=b_n < N, other=0.0)
    p_out += row.to(tl.int64) * N
    tl.store(p_out + b_m[:, None] * N + b_n[None, :], b_x * b_window[None, :], mask=there)


def forward(
    samples: Tensor,
    window: Tensor,
    cu_samples: Tensor,
    cu_frames: Tensor,
    num_frames: int,
    hop: int,
    padded_to: int,
) -> Tensor:
    check_dtypes("varlen_stft", samples, window)
    n, clips, block = window.shape[0], cu_frames.shape[0] - 1, setting("stft_block", 16)
    planned = cdiv(num_frames, PLANNED) * PLANNED
    frames = torch.empty(planned, n, dtype=torch.float32, device=samples.device)
    launch(
        varlen_frames_kernel, num_frames // block + clips, *contiguous(samples, window, cu_samples, cu_frames), frames,
        clips, padded_to, N=n, HOP=hop, BM=block, BN=next_power_of_2(n), num_warps=8, num_stages=1,
    )  # fmt: skip
    frames[num_frames:].zero_()  # the library may transform two rows at once, and what lies there may be no number
    return torch.fft.rfft(frames)[:num_frames]


def compilations(capability: int) -> Iterator[Compilation]:
    def whisper() -> None:
        samples, window = (torch.empty(k, device="meta") for k in (16_000_000, 400))
        offsets = torch.empty(65, dtype=torch.int32, device="meta")
        forward(samples, window, offsets, offsets, 100_000, 160, 0)

    yield from recorded(capability, {"whisper": whisper})
