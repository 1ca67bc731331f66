from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mowe_kernels import grouped_conv1d
from mowe_kernels.reference import _convolution
from tests.mowe_kernels.checks import (
    Inputs,
    assert_accurate,
    assert_matches,
    gradcheck,
    int32,
    normal,
    offsets,
    opcheck,
    raises,
    rows_with_tail,
    spans,
    table,
)

pytestmark = pytest.mark.usefixtures("poisoned")

ENCODERS = 3
EPILOGUES = {
    "plain": (),
    "bias": ("bias",),
    "residual": ("bias", "residual"),
    "positions": ("positions",),
    "all": ("bias", "positions", "residual"),
}


@dataclass(frozen=True)
class Shape:
    taps: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    c: int = 4
    n: int = 6

    def frames_out(self, frames: int) -> int:
        """As torch counts them; an even kernel padded by half gives one more than it got, which is dropped."""
        count = max(0, (frames + 2 * self.padding - self.taps) // self.stride + 1) if frames else 0
        return min(count, frames) if 2 * self.padding == self.taps else count

    @property
    def arguments(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}


SHAPES = {
    "whisper 1": Shape(taps=3, padding=1),
    "whisper 2": Shape(taps=3, stride=2, padding=1),
    "wave": Shape(taps=10, stride=5, c=1),
    "wave 2": Shape(taps=2, stride=2),
    "positional": Shape(taps=6, padding=3, groups=2),
    "depthwise, strided": Shape(taps=3, stride=2, padding=1, groups=2, c=2, n=2),
    "gaps": Shape(taps=1, stride=3),
    "one tap in groups": Shape(taps=1, groups=2),
}


@dataclass(frozen=True)
class Batch:
    """Clips end to end, and the (clip, encoder) pairs that read them; a pair of clip None has no frames."""

    clips: tuple[int, ...]
    pairs: tuple[tuple[int | None, int], ...]

    def lengths(self) -> tuple[int, ...]:
        return tuple(0 if clip is None else self.clips[clip] for clip, _ in self.pairs)

    def frames_out(self, shape: Shape) -> tuple[int, ...]:
        return tuple(map(shape.frames_out, self.lengths()))

    def arguments(self, shape: Shape, tail: int = 0) -> dict[str, Any]:
        starts = [0 if clip is None else spans(self.clips)[clip].start for clip, _ in self.pairs]
        cu_seqlens = offsets(self.frames_out(shape))
        return {
            "starts": int32(*starts),
            "lengths": int32(*self.lengths()),
            "encoder": int32(*(99 if clip is None else encoder for clip, encoder in self.pairs)),
            "cu_seqlens": cu_seqlens,
            "num_rows": int(cu_seqlens[-1]) + tail,
        }


BATCHES = {
    "shared clips": Batch((13, 0, 11), ((0, 0), (2, 0), (1, 0), (0, 2), (None, 0), (2, 2))),
    "one clip": Batch((17,), ((0, 1),)),
    "too short": Batch((1, 7), ((0, 0), (1, 1))),
    "nobody": Batch((5,), ((None, 0), (None, 0))),
}


def make_inputs(batch: Batch, shape: Shape, tail: int, epilogue: tuple[str, ...]) -> Inputs:
    rows = batch.frames_out(shape)
    inputs = {
        "x": normal(sum(batch.clips), shape.c),
        "weight": normal(ENCODERS, shape.n, shape.taps, shape.c // shape.groups),
        "bias": normal(ENCODERS, shape.n),
        "positions": normal(ENCODERS, max(rows) + 1, shape.n),
        "residual": rows_with_tail(sum(rows), tail, shape.n),
    }
    return {name: value if name in ("x", "weight", *epilogue) else None for name, value in inputs.items()}


def op(batch: Batch, shape: Shape, activation: str, tail: int = 0):
    arguments = batch.arguments(shape, tail) | shape.arguments
    return lambda **inputs: grouped_conv1d(**inputs, **arguments, activation=activation)


def naive(batch: Batch, shape: Shape, activation: str):
    def call(x, weight, bias, positions, residual) -> Tensor:
        parts = [(x[:0, :1] + weight.flatten()[:1]).expand(0, shape.n)]
        clips = [x[rows].T[None] for rows in spans(batch.clips)]
        for (clip, e), frames, rows in zip(
            batch.pairs, batch.frames_out(shape), spans(batch.frames_out(shape)), strict=True
        ):
            if frames == 0:
                continue
            y = functional.conv1d(clips[clip], weight[e].mT, None if bias is None else bias[e], **shape.arguments)
            y = y[0].T[:frames]
            y = functional.gelu(y) if activation else y
            y = y if positions is None else y + positions[e, :frames]
            parts.append(y if residual is None else y + residual[rows])
        return torch.cat(parts)

    return call


@table(BATCHES, "batch")
@table(SHAPES, "shape")
@pytest.mark.parametrize(("tail", "unfolded"), [(0, 50), (3, 1 << 22)])
def test_matches_a_convolution_per_pair(batch, shape, tail, unfolded, monkeypatch):
    monkeypatch.setattr(_convolution, "UNFOLDED", unfolded)
    inputs = make_inputs(batch, shape, tail, EPILOGUES["all"])
    rows = sum(batch.frames_out(shape))
    assert_matches(op(batch, shape, "gelu", tail), naive(batch, shape, "gelu"), inputs, rows, ("residual",))


@table(EPILOGUES, "epilogue")
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
def test_epilogues(epilogue, activation, shape):
    batch, shape = BATCHES["shared clips"], SHAPES[shape]
    inputs = make_inputs(batch, shape, 2, epilogue)
    rows = sum(batch.frames_out(shape))
    assert_matches(op(batch, shape, activation, 2), naive(batch, shape, activation), inputs, rows, ("residual",))


@pytest.mark.parametrize("frames", [1, 3, 9])
@pytest.mark.parametrize("shape", [SHAPES["whisper 1"], SHAPES["positional"], Shape(taps=2, padding=3)])
def test_offsets_decide_how_many_frames_come_out(shape, frames):
    """Fewer than the convolution gives, and more: windows that lie partly past the end see zeros."""
    arguments = {
        "starts": int32(2), "lengths": int32(7), "encoder": int32(0), "cu_seqlens": int32(0, frames), "num_rows": frames
    }  # fmt: skip

    def ours(x, weight) -> Tensor:
        return grouped_conv1d(x, weight, None, **arguments, **shape.arguments)

    def theirs(x, weight) -> Tensor:
        padded = functional.pad(x[2:9].T, (shape.padding, 10))
        return functional.conv1d(padded[None], weight[0].mT, groups=shape.groups)[0].T[:frames]

    weight = normal(1, shape.n, shape.taps, shape.c // shape.groups)
    assert_matches(ours, theirs, {"x": normal(11, shape.c), "weight": weight}, frames)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
def test_precision(dtype, shape):
    batch, shape = BATCHES["one clip"], SHAPES[shape]
    inputs = make_inputs(batch, shape, 0, EPILOGUES["all"])
    rows = sum(batch.frames_out(shape))
    assert_accurate(op(batch, shape, "gelu"), naive(batch, shape, "gelu"), inputs, rows, dtype)


@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
def test_accepts_any_strides(shape):
    batch, shape = BATCHES["shared clips"], SHAPES[shape]
    inputs = make_inputs(batch, shape, 0, EPILOGUES["all"])
    inputs = {name: value.mT.contiguous().mT for name, value in inputs.items()}
    rows = sum(batch.frames_out(shape))
    assert_matches(op(batch, shape, "gelu"), naive(batch, shape, "gelu"), inputs, rows)


@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_derivatives(shape, activation):
    batch, shape = Batch((3, 4), ((0, 0), (1, 0), (0, 2))), SHAPES[shape]
    gradcheck(op(batch, shape, activation), make_inputs(batch, shape, 0, EPILOGUES["all"]))


@pytest.mark.parametrize("epilogue", [(), EPILOGUES["all"]])
@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
@pytest.mark.parametrize("save_pre", [False, True])
def test_registration(epilogue, shape, save_pre):
    batch, shape = BATCHES["shared clips"], SHAPES[shape]
    inputs = make_inputs(batch, shape, 0, epilogue)
    x, weight, bias, positions, residual = (None if t is None else t.requires_grad_(save_pre) for t in inputs.values())
    starts, lengths, encoder, cu_seqlens, num_rows = batch.arguments(shape, 1).values()
    residual = None if residual is None else functional.pad(residual, (0, 0, 0, 1))
    args = (
        x, weight, bias, starts, lengths, encoder, cu_seqlens, positions, residual, num_rows,
        shape.stride, shape.padding, shape.groups, "gelu" if save_pre else "", save_pre,
    )  # fmt: skip
    opcheck(torch.ops.mowe.grouped_conv1d.default, args)


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False), (False, False, False, True)])
@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
def test_registration_of_the_backward(needs, shape):
    batch, shape = BATCHES["shared clips"], SHAPES[shape]
    x, weight, _, positions, residual = make_inputs(batch, shape, 0, EPILOGUES["all"]).values()
    *tensors, num_rows = batch.arguments(shape).values()
    args = (
        residual, x, weight, *tensors, positions, normal(num_rows, shape.n),
        shape.stride, shape.padding, shape.groups, "gelu", *needs,
    )  # fmt: skip
    opcheck(torch.ops.mowe.grouped_conv1d_backward.default, args)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"x": normal(17)}, ("x must be input frames", "[any, any]", "got [17]")),
        ({"groups": 3}, ("3 groups do not divide 4 channels",)),
        ({"groups": 4, "weight": normal(3, 6, 3, 1)}, ("4 groups do not divide 6 channels",)),
        ({"weight": normal(3, 6, 3, 2)}, ("weight", "[any, any, any, 4]", "got [3, 6, 3, 2]")),
        ({"bias": normal(6)}, ("bias", "[3, 6]", "got [6]")),
        ({"starts": int32(0)[None]}, ("starts", "[any]", "got [1, 1]")),
        ({"lengths": int32(5, 5)}, ("lengths", "[1]", "got [2]")),
        ({"encoder": int32(5, 5)}, ("encoder", "[1]", "got [2]")),
        ({"cu_seqlens": int32(5)}, ("cu_seqlens", "[2]", "got [1]")),
        ({"positions": normal(2, 20, 6)}, ("positions", "[3, any, 6]", "got [2, 20, 6]")),
        ({"residual": normal(8, 6)}, ("residual", "[9, 6]", "got [8, 6]")),
        ({"bias": normal(3, 6).float()}, ("bias must be torch.float64", "got torch.float32")),
        ({"activation": "relu"}, ("activation", "'', 'gelu'", "got 'relu'")),
        ({"stride": 0}, ("stride must be positive", "got 0")),
        ({"padding": -1}, ("padding must not be negative", "got -1")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    batch, shape = BATCHES["one clip"], SHAPES["whisper 2"]
    fits = make_inputs(batch, shape, 0, EPILOGUES["all"]) | batch.arguments(shape) | shape.arguments
    with raises("grouped_conv1d: ", *parts):
        grouped_conv1d(**fits | change)
