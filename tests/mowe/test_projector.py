"""The projector against the concatenation it never builds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe import MoweConfig, PoolOutput
from mowe.projector import BaseFeatures, MoweProjector, projected_lengths
from mowe_kernels import FrameClock, PackLayout, PackPlan
from tests.mowe.encoders import assert_same, assert_same_gradients
from tests.mowe.naive import WAVE_TIMES, WHISPER_TIMES, NaiveProjector, frames_at

WIDTH, WIDTHS, HIDDEN, OUT = 6, (5, 7), 8, 9
FAMILY_OF = (0, 1, 0)  # encoders 0 and 2 are of the first family, whose frames happen with the base's
TIMES = (WHISPER_TIMES, WAVE_TIMES)
CLOCKS = tuple(FrameClock(hop, offset) for offset, hop in TIMES)
# Frames of each clip: of the base, of the first family, of the second.
LENGTHS = [(50, 50, 49), (1, 1, 1), (17, 17, 16), (8, 8, 8), (33, 120, 32), (25, 3, 24), (40, 1_500, 5)]
SLOTS = {
    "one slot": [[0], [1], [1], [2], [1], [0], [1]],
    "two slots": [[0, 1], [1, 0], [1, 2], [2, 0], [1, 0], [0, 1], [2, 1]],
    "duplicates": [[0, 0], [1, 1], [1, 1], [2, 2], [1, 1], [0, 0], [1, 1]],
    "three slots, some unused": [[0, -1, 1], [1, 0, 1], [-1, -1, -1], [2, 1, 0], [1, 1, 2], [0, 1, 2], [-1, 2, 1]],
}
KINDS = {"conv 8": ("conv", 8), "conv 2": ("conv", 2), "stack 8": ("stack", 8), "stack 5": ("stack", 5),
         "stack 1": ("stack", 1)}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def projector(kind: str, slots: int) -> MoweProjector:
    torch.manual_seed(0)
    projector_type, stride = KINDS[kind]
    config = MoweConfig(
        projector_type=projector_type,
        projector_stride=stride,
        projector_hidden_size=HIDDEN,
        num_independent_slots=0,
        num_dependent_slots=slots,
    )
    made = MoweProjector(config, WIDTH, WIDTHS, OUT).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


class Inputs:
    """Random features of a routed batch, packed for the projector and apart for the naive one."""

    def __init__(self, indices: list[list[int]], lengths: list[tuple[int, ...]] = LENGTHS, spare: int = 0):
        torch.manual_seed(1)
        self.indices, self.lengths = indices, lengths
        levels = [[row[1 + f] for row in lengths] for f in range(2)]
        self.plan = PackPlan.build(torch.tensor(indices), levels, PackLayout.build(FAMILY_OF, [1, 1]))
        self.rows = [
            torch.randn(self.plan.family(f).rows.num_rows, WIDTHS[f], dtype=torch.float64, requires_grad=True)
            for f in range(2)
        ]
        # `spare` frames after each clip's own, as where a window has been encoded whole: never to be read.
        self.base = [torch.randn(row[0], WIDTH, dtype=torch.float64, requires_grad=True) for row in lengths]
        self.spare = torch.full((spare, WIDTH), torch.nan, dtype=torch.float64)
        self.weights = torch.rand(len(lengths), len(indices[0]), requires_grad=True)

    def project(self, made: MoweProjector) -> tuple[list[Tensor], tuple[Tensor, Tensor, tuple[int, ...]]]:
        starts = torch.tensor([0, *(len(frames) + len(self.spare) for frames in self.base[:-1])]).cumsum(0).int()
        rows = torch.cat([part for frames in self.base for part in (frames, self.spare)])
        lengths = tuple(len(frames) for frames in self.base)
        base = BaseFeatures(rows, starts, lengths, CLOCKS[0])
        out = made(base, PoolOutput(tuple(self.rows), self.plan), self.weights, CLOCKS)
        return list(out[0].split(out[2])), out

    def project_naively(self, naive: NaiveProjector) -> list[Tensor]:
        tokens = []
        for b, (frames, row) in enumerate(zip(self.base, self.indices, strict=True)):
            slots = []
            for s, encoder in enumerate(row):
                parts: list[Tensor | None] = [None, None]
                if encoder >= 0:
                    f = FAMILY_OF[encoder]
                    own = PoolOutput(tuple(self.rows), self.plan).pair(b, s)
                    parts[f] = self.weights[b, s] * frames_at(320 * torch.arange(len(frames)), own, TIMES[f])
                slots.append(parts)
            tokens.append(naive(frames, slots))
        return tokens

    def gradients(self) -> dict[str, Tensor]:
        named = {f"base {b}": frames for b, frames in enumerate(self.base)}
        named |= {f"rows {f}": rows for f, rows in enumerate(self.rows)} | {"weights": self.weights}
        return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}

    def forget(self) -> None:
        for tensor in (*self.base, *self.rows, self.weights):
            tensor.grad = None


@kinds
@pytest.mark.parametrize("indices", SLOTS.values(), ids=SLOTS)
def test_tokens_and_gradients(kind, indices):
    inputs, made = Inputs(indices), projector(kind, len(indices[0]))
    naive = NaiveProjector(made)
    expected = inputs.project_naively(naive)
    cotangents = [torch.randn_like(tokens) for tokens in expected]
    sum((t * g).sum() for t, g in zip(expected, cotangents, strict=True)).backward()
    expected_gradients = inputs.gradients()
    inputs.forget()
    tokens, _ = inputs.project(made)
    for one, other in zip(tokens, expected, strict=True):
        assert_same(one, other, tolerance=1e-10)
    sum((t * g).sum() for t, g in zip(tokens, cotangents, strict=True)).backward()
    assert_same_gradients(inputs.gradients(), expected_gradients, tolerance=1e-6)
    own = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert_same_gradients(own, naive.gradients(made), tolerance=1e-6)


@kinds
def test_lengths_and_offsets(kind):
    inputs = Inputs(SLOTS["one slot"])
    _, (tokens, offsets, lengths) = inputs.project(projector(kind, 1))
    stride = KINDS[kind][1]
    assert lengths == tuple(-(-row[0] // stride) for row in LENGTHS)
    assert offsets.dtype == torch.int32 and offsets.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert tokens.shape == (sum(lengths), OUT)


@kinds
def test_frames_beyond_a_clip_are_never_read(kind):
    made = projector(kind, 1)
    plain, _ = Inputs(SLOTS["one slot"]).project(made)
    spaced, _ = Inputs(SLOTS["one slot"], spare=9).project(made)
    for one, other in zip(spaced, plain, strict=True):
        assert_same(one, other, tolerance=1e-12)


@kinds
def test_30_s_of_whisper_frames_meet_1499_wave_frames_by_time(kind):
    inputs = Inputs([[1, 0]], [(1_500, 1_500, 1_499)])
    made = projector(kind, 2)
    (tokens,), _ = inputs.project(made)
    (expected,) = inputs.project_naively(NaiveProjector(made))
    assert_same(tokens, expected, tolerance=1e-10)
    # Base frame t hears up to sample 320 t; the wave frame centred nearest to it is t - 1, at 320 t - 120.
    nearest = frames_at(320 * torch.arange(1_500), torch.arange(1_499.0)[:, None], WAVE_TIMES)[:, 0]
    assert nearest.tolist() == [0, *range(1_499)]


@pytest.mark.parametrize(
    ("base", "rows", "expected"),
    [
        (WAVE_TIMES, WHISPER_TIMES, lambda t: t + 1),  # centred on 320 t + 200: nearer to 320 (t + 1)
        (WHISPER_TIMES, WHISPER_TIMES, lambda t: t),
        (WAVE_TIMES, WAVE_TIMES, lambda t: t),
        (WHISPER_TIMES, WAVE_TIMES, lambda t: t - 1),
        (WHISPER_TIMES, (3, 20), lambda t: 16 * t),  # a family of many more frames a second
        ((3, 20), WHISPER_TIMES, lambda t: (t + 8) // 16),
    ],
)
def test_clocks_align_by_time(base, rows, expected):
    scale, shift, divisor = FrameClock(base[1], base[0]).align(FrameClock(rows[1], rows[0]))
    for t in range(100):
        assert (scale * t + shift) // divisor == expected(t)


@pytest.mark.parametrize(
    ("frames", "strides", "tokens"),
    [(1_500, [2, 2, 2], 188), (1_500, [8], 188), (1_499, [2, 2, 2], 188), (1, [2, 2, 2], 1), (9, [8], 2), (8, [8], 1)],
)
def test_projected_lengths(frames, strides, tokens):
    assert projected_lengths([frames], strides) == [tokens]


def test_halving_three_times_drops_no_frame():
    frames = list(range(1, 200))
    assert projected_lengths(frames, [2, 2, 2]) == projected_lengths(frames, [8]) == [-(-n // 8) for n in frames]


@kinds
def test_clips_do_not_depend_on_their_neighbours(kind):
    inputs, made = Inputs(SLOTS["two slots"]), projector(kind, 2)
    tokens, _ = inputs.project(made)
    with torch.no_grad():
        for tensor in (inputs.base[1], inputs.base[3]):
            tensor *= 1e3
    changed, _ = inputs.project(made)
    for b, (one, other) in enumerate(zip(changed, tokens, strict=True)):
        if b in (1, 3):
            assert not torch.equal(one, other)
        else:
            assert_same(one, other, tolerance=1e-12)


@pytest.mark.parametrize("kind", ["conv 8", "stack 8"])
def test_half_precision(kind):
    inputs, made = Inputs(SLOTS["two slots"]), projector(kind, 2)
    expected, _ = inputs.project(made)
    tokens, _ = inputs.project(made.bfloat16())  # features of another dtype take that of the projector
    for one, other in zip(tokens, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert_same(one, other, tolerance=0.05)
    sum(one.float().sum() for one in tokens).backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in made.parameters())
    assert inputs.weights.grad.dtype == torch.float32


def test_the_scale_of_fresh_tokens():
    torch.manual_seed(0)
    inputs, made = Inputs(SLOTS["two slots"]), projector("conv 8", 2)
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tokens, _ = inputs.project(made)
    assert 0.05 < torch.cat(tokens).std().item() < 5.0
