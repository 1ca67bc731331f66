"""Which samples belong to which frames."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from mowe.attach.pieces import pieces, windows

SECOND = 16_000


def _cut(seconds: float, frames: int, hop: int | Fraction, stack: int = 1) -> list[tuple[int, int, int, int]]:
    wave = torch.arange(int(seconds * SECOND), dtype=torch.float32)
    found = pieces([wave], [frames], hop, stack)
    return [(piece.start, piece.frames, int(piece.wave[0]), piece.wave.numel()) for piece in found]


def test_a_short_clip_is_one_piece_and_its_padding_none() -> None:
    assert _cut(1, 750, 640) == [(0, 25, 0, SECOND)]
    assert _cut(1.01, 750, 640) == [(0, 26, 0, 16_160)]


def test_a_long_clip_is_cut_at_30_seconds() -> None:
    assert _cut(70, 1750, 640) == [
        (0, 750, 0, 30 * SECOND), (750, 750, 30 * SECOND, 30 * SECOND), (1500, 250, 60 * SECOND, 10 * SECOND),
    ]  # fmt: skip


def test_a_clip_longer_than_its_frames_is_cut_off_after_the_last() -> None:
    assert _cut(4, 25, 640) == [(0, 25, 0, SECOND + 640)]


def test_frame_rates_that_30_seconds_are_no_multiple_of() -> None:
    assert _cut(60, 375, 2560) == [(0, 187, 0, 478_720), (187, 187, 478_720, 478_720), (374, 1, 957_440, 2_560)]
    assert _cut(31, 233, Fraction(6_400, 3)) == [(0, 225, 0, 480_000), (225, 8, 480_000, SECOND)]
    assert _cut(60, 780, Fraction(SECOND, 13)) == [(0, 390, 0, 480_000), (390, 390, 480_000, 480_000)]


def test_pieces_begin_where_a_stack_of_frames_does() -> None:
    assert [start % 7 for start, *_ in _cut(70, 3500, 320, stack=7)] == [0, 0, 0]


def test_a_last_piece_under_25_ms_is_padded() -> None:
    (piece,) = pieces([torch.ones(100)], [3], 320, 1)
    assert (piece.frames, piece.wave.numel(), piece.wave.sum()) == (1, 400, 100)


def test_rows_are_told_apart() -> None:
    found = pieces([torch.zeros(SECOND), torch.zeros(2 * SECOND)], [50, 100], 320, 1)
    assert [(piece.row, piece.frames) for piece in found] == [(0, 50), (1, 100)]


@pytest.mark.parametrize("seconds", [1, 30, 31, 95])
def test_windows(seconds: int) -> None:
    parts = windows([torch.arange(seconds * SECOND), torch.zeros(SECOND)], 1500, 320)
    assert [len(part) for part in parts[:-2]] == [480_000] * (len(parts) - 2)
    assert torch.equal(torch.cat(parts[:-1]), torch.arange(seconds * SECOND)) and len(parts[-1]) == SECOND
