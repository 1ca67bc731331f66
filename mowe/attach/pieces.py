"""Which samples of an audio belong to which frames of an encoder, in pieces short enough for the pool."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor
from torch.nn import functional as F

from mowe.audio import MIN_SAMPLES, WINDOW_SAMPLES


@dataclass(frozen=True)
class Piece:
    """At most 30 s of one audio, and the frames `start` .. `start + frames` of its row of features."""

    row: int
    start: int
    frames: int
    wave: Tensor


def windows(waves: Iterable[Tensor], frames: int, hop: int | Fraction) -> list[Tensor]:
    """Waveforms [samples] cut where a row of so many frames ends."""
    return [part for wave in waves for part in wave.split(int(frames * hop))]


def copies_of(repeats: Iterable[int]) -> list[list[int]]:
    """Places of each row, where the row at place i repeats row `repeats[i]`; every row is repeated as often."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(repeats):
        places.setdefault(row, []).append(place)
    return [places[row] for row in sorted(places)]


def pieces(waves: Sequence[Tensor], frames: Sequence[int], hop: int | Fraction, stack: int) -> list[Piece]:
    """The pieces of each row: waves[i] is what was heard in frames[i] frames of `hop` samples.

    Every piece but the last of a row has a multiple of `stack` frames. Frames after the end of the audio belong to no
    piece; samples after the last frame to none, but for those under a hop, which its last one also takes.
    """
    most = int(WINDOW_SAMPLES / hop) // stack * stack
    found = []
    for row, (wave, count) in enumerate(zip(waves, frames, strict=True)):
        for start in range(0, count, most):
            last = start + most >= count
            begin, end = int(start * hop), int((count + 1 if last else start + most) * hop)
            part = wave[begin : min(end, begin + WINDOW_SAMPLES)]
            if not part.numel():
                break
            heard = min(math.ceil(part.numel() / hop), most, count - start)
            found.append(Piece(row, start, heard, F.pad(part, (0, max(0, MIN_SAMPLES - part.numel())))))
    return found
