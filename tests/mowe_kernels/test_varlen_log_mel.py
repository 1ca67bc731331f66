from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mowe_kernels import varlen_log_mel
from tests.mowe_kernels.checks import int32, normal, offsets, opcheck, raises, spans, table

pytestmark = pytest.mark.usefixtures("poisoned")

# Frames and rows of each clip.
LAYOUTS = {
    "no padding": ((2, 3, 7, 1), (2, 3, 7, 1)),
    "padding": ((2, 3, 7, 1), (9, 9, 9, 9)),
    "a full clip among padded ones": ((2, 9, 1), (9, 9, 9)),
    "one clip": ((5,), (5,)),
    "one padded clip": ((5,), (6,)),
}
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def spectrum_of(frames: int, k: int) -> Tensor:
    """Real and imaginary parts [frames, k, 2] of loud and faint frames, one of them silent."""
    parts = normal(frames, k, 2) * 10.0 ** torch.randint(-6, 2, (frames, 1, 1))
    parts[frames // 2] = 0.0
    return parts


def bank(k: int, n: int) -> Tensor:
    """Filters [k, n] of which most are zero, as those of a mel bank."""
    return torch.rand(k, n, dtype=torch.float64) * (torch.rand(k, n) < 0.1)


def op(layout: Layout) -> Callable[[Tensor, Tensor], Tensor]:
    rows = layout[1]

    def call(parts: Tensor, filters: Tensor) -> Tensor:
        cu_frames, cu_rows = (offsets(sizes).to(filters.device) for sizes in layout)
        spectrum = torch.view_as_complex(parts)
        return varlen_log_mel(spectrum, filters, cu_frames=cu_frames, cu_rows=cu_rows, num_rows=sum(rows))

    return call


def naive(parts: Tensor, filters: Tensor, layout: Layout) -> Tensor:
    clips = []
    for span, rows in zip(spans(layout[0]), layout[1], strict=True):
        power = torch.zeros(rows, len(filters), dtype=filters.dtype)
        power[: span.stop - span.start] = torch.view_as_complex(parts[span]).abs() ** 2
        x = (power @ filters).clamp(min=1e-10).log10()
        clips.append((torch.maximum(x, x.max() - 8.0) + 4.0) / 4.0)
    return torch.cat(clips)


@table(LAYOUTS, "layout")
@pytest.mark.parametrize("n", [1, 7, 80])
def test_is_the_log_mel_of_every_clip_alone(layout, n):
    parts, filters = spectrum_of(sum(layout[0]), 21), bank(21, n)
    torch.testing.assert_close(op(layout)(parts, filters), naive(parts, filters, layout))


def test_silence_is_even():
    parts, filters = torch.zeros(3, 5, 2), torch.rand(5, 4)
    assert op(((1, 2), (1, 6)))(parts, filters).eq(-1.5).all()


def check_not_a_number(device: torch.device) -> None:
    layout = (4, 40, 3), (4, 45, 3)
    parts = spectrum_of(sum(layout[0]), 6).float().to(device)
    parts[30, 2] = torch.nan
    rows = op(layout)(parts, bank(6, 3).float().to(device) + 0.1)
    before, among, after = (clip.isnan() for clip in rows.split(layout[1]))
    assert among.all() and not before.any() and not after.any()


def test_what_is_not_a_number_takes_its_clip_alone():
    check_not_a_number(torch.device("cpu"))


def test_types():
    for dtype in (torch.float32, torch.float64):
        assert op(((2,), (3,)))(normal(2, 5, 2).to(dtype), normal(5, 4).to(dtype)).dtype == dtype


def test_registration():
    spectrum, filters = torch.view_as_complex(normal(5, 21, 2).float()), bank(21, 8).float()
    for rows in (int32(0, 2, 5), int32(0, 4, 9)):
        layout = int32(0, 2, 5), rows, 9 if rows[1] == 4 else 5
        opcheck(torch.ops.mowe.varlen_log_mel.default, (spectrum, filters, *layout))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"spectrum": torch.view_as_complex(normal(5, 2))}, ("spectrum must be", "[any, any]", "got [5]")),
        ({"filters": normal(6, 8)}, ("filters", "[7, any]", "got [6, 8]")),
        ({"filters": normal(7, 8).float()}, ("one precision", "float32", "complex128")),
        ({"spectrum": normal(5, 7)}, ("one precision", "float64 and torch.float64")),
        ({"cu_frames": int32(0, 5)[None]}, ("cu_frames", "[any]", "got [1, 2]")),
        ({"cu_rows": int32(0, 5)}, ("cu_rows", "[3]", "got [2]")),
        ({"num_rows": 4}, ("4 rows are fewer than the 5 frames",)),
    ],
)
def test_says_what_does_not_fit(change, parts):
    right = {"spectrum": torch.view_as_complex(normal(5, 7, 2)), "filters": normal(7, 8)}
    layout = {"cu_frames": int32(0, 3, 5), "cu_rows": int32(0, 3, 5), "num_rows": 5}
    with raises("varlen_log_mel: ", *parts):
        varlen_log_mel(**right | layout | change)
