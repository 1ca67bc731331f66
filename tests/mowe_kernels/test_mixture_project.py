from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mowe_kernels import FrameClock, PackLayout, PackPlan, mixture_project
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

N, BASE_WIDTH, WIDTHS = 3, 4, (2, 5)
# A whisper and a wave encoder: the same hop, the wave's first frame centred on its receptive field of 400 samples.
BASE, SAME, WAVE = FrameClock(320, 0), FrameClock(320, 0), FrameClock(320, 200)
CLOCKS = {
    "whisper and wave": (BASE, (SAME, WAVE)),
    "faster and slower": (FrameClock(320, 40), (FrameClock(160, 0), FrameClock(500, -130))),
    "far apart": (BASE, (FrameClock(320, 2000), FrameClock(320, -2000))),
    "ties": (BASE, (FrameClock(320, 160), FrameClock(640, 0))),
}
PROJECTORS = {  # taps, stride, padding
    "conv": (3, 2, 1),
    "stack": (4, 4, 0),
    "frame by frame": (1, 1, 0),
    "gaps": (2, 3, 0),
}


@dataclass(frozen=True)
class Batch:
    """Choices of each clip among encoders 0, 1 (family 0) and 2, 3 (family 1); frames of each clip at each family."""

    indices: tuple[tuple[int, ...], ...]
    base: tuple[int, ...]
    weak: tuple[tuple[int, ...], tuple[int, ...]]

    def plan(self) -> PackPlan:
        return PackPlan.build(torch.tensor(self.indices), self.weak, PackLayout.build([0, 0, 1, 1], [1, 1]))

    @property
    def slots(self) -> int:
        return len(self.indices[0])

    def frames_out(self, taps: int, stride: int, padding: int) -> tuple[int, ...]:
        return tuple(max(0, (t + 2 * padding - taps) // stride + 1) if t else 0 for t in self.base)


BATCHES = {
    "both families": Batch(((0, 2), (3, 1)), (13, 7), ((13, 7), (12, 6))),
    "shared pairs": Batch(((2, 2, 0), (1, 1, 1)), (11, 5), ((11, 5), (11, 4))),
    "absent slots": Batch(((-1, 3), (-1, -1), (0, 2)), (5, 8, 3), ((5, 8, 3), (0, 8, 3))),
    "an empty clip": Batch(((0,), (2,), (1,)), (0, 9, 0), ((0, 9, 0), (0, 10, 0))),
    "one frame": Batch(((0, 2),), (1,), ((1,), (1,))),
    "other lengths": Batch(((0, 2), (3, 1), (1, 2)), (9, 9, 9), ((8, 5, 12), (12, 9, 5))),
}


def make_inputs(batch: Batch, projector: tuple[int, int, int], tail: int = 0, bias: bool = True) -> Inputs:
    taps, plan = projector[0], batch.plan()
    inputs = {
        "base": rows_with_tail(sum(batch.base), tail, BASE_WIDTH),
        "weights": normal(*plan.position.shape),
        "base_weight": normal(N, taps, BASE_WIDTH),
        "bias": normal(N) if bias else None,
    }
    for f, width in enumerate(WIDTHS):
        inputs[f"rows{f}"] = rows_with_tail(plan.family(f).rows.num_rows, tail, width)
        inputs[f"row_weights{f}"] = normal(batch.slots, N, taps, width)
    return inputs


def layout(batch: Batch, projector: tuple[int, int, int], clocks: Any, tail: int = 0) -> dict[str, Any]:
    plan, cu_seqlens = batch.plan(), offsets(batch.frames_out(*projector))
    return {
        "base_starts": offsets(batch.base)[:-1],
        "base_lengths": int32(*batch.base),
        "row_offsets": [plan.family(f).rows.cu_seqlens for f in range(2)],
        "position": plan.position,
        "base_clock": clocks[0],
        "row_clocks": clocks[1],
        "cu_seqlens": cu_seqlens,
        "num_rows": int(cu_seqlens[-1]) + tail,
        "stride": projector[1],
        "padding": projector[2],
    }


def op(batch: Batch, projector: tuple[int, int, int], clocks: Any, activation: str, tail: int = 0):
    arguments = layout(batch, projector, clocks, tail)

    def call(rows0, rows1, row_weights0, row_weights1, **inputs):
        return mixture_project(
            rows=[rows0, rows1], row_weights=[row_weights0, row_weights1], activation=activation, **inputs, **arguments
        )

    return call


def nearest(clock: FrameClock, other: FrameClock, frames: int, length: int) -> list[int | None]:
    """The frame of `other` nearest in time to each frame of `clock`, the later of two; None out of a clip.

    Frames -1 and `length` are the ones just past the ends, whose place the first and the last take.
    """

    def distance(t: int, candidate: int) -> int:
        return abs(clock.offset + t * clock.hop - other.offset - candidate * other.hop)

    candidates = range(-2, length + 2)
    best = [min(candidates, key=lambda c, t=t: (distance(t, c), -c)) for t in range(frames)]
    return [min(max(c, 0), length - 1) if -1 <= c <= length else None for c in best]


def naive(batch: Batch, projector: tuple[int, int, int], clocks: Any, activation: str):
    def call(base, weights, base_weight, bias, rows0, rows1, row_weights0, row_weights1) -> Tensor:
        """The concatenation built: a strided convolution over [base ; for each slot, both families' features]."""
        _, stride, padding = projector
        plan, rows = batch.plan(), (rows0, rows1)
        kernel = [base_weight]
        for slot in range(batch.slots):
            kernel += [row_weights0[slot], row_weights1[slot]]
        kernel = torch.cat(kernel, -1)
        parts = [(base[:0, :1] + sum(t.flatten()[:1].sum() for t in (weights, kernel, *rows))).expand(0, N)]
        for b, (clip, frames_out) in enumerate(zip(spans(batch.base), batch.frames_out(*projector), strict=True)):
            frames = batch.base[b]
            columns = [base[clip]]
            for slot in range(batch.slots):
                for f in range(2):
                    cu_seqlens, p = plan.family(f).rows.cu_seqlens.tolist(), plan.position[b, slot]
                    own = rows[f][cu_seqlens[p] : cu_seqlens[p + 1]]
                    at = nearest(clocks[0], clocks[1][f], frames, len(own)) if len(own) else [None] * frames
                    silence = own.new_zeros(WIDTHS[f])
                    aligned = [silence if t is None else weights[b, slot] * own[t] for t in at]
                    columns.append(torch.stack(aligned) if aligned else own.new_zeros(0, WIDTHS[f]))
            if frames_out:
                whole = torch.cat(columns, -1).T[None]
                y = functional.conv1d(whole, kernel.mT, bias, stride=stride, padding=padding)[0].T
                parts.append(functional.gelu(y) if activation else y)
        return torch.cat(parts)

    return call


@table(BATCHES, "batch")
@table(PROJECTORS, "projector")
@pytest.mark.parametrize(("activation", "tail", "unfolded"), [("", 0, 30), ("gelu", 2, 1 << 22)])
def test_matches_a_convolution_over_the_concatenation(batch, projector, activation, tail, unfolded, monkeypatch):
    monkeypatch.setattr(_convolution, "UNFOLDED", unfolded)
    clocks = CLOCKS["whisper and wave"]
    ours, theirs = op(batch, projector, clocks, activation, tail), naive(batch, projector, clocks, activation)
    assert_matches(ours, theirs, make_inputs(batch, projector, tail), sum(batch.frames_out(*projector)))


@table(CLOCKS, "clocks")
def test_aligns_by_time(clocks):
    batch, projector = BATCHES["both families"], PROJECTORS["conv"]
    ours, theirs = op(batch, projector, clocks, ""), naive(batch, projector, clocks, "")
    assert_matches(ours, theirs, make_inputs(batch, projector), sum(batch.frames_out(*projector)))


@pytest.mark.parametrize("clock", [BASE, FrameClock(320, 40), FrameClock(160, -7)])
@pytest.mark.parametrize("other", [SAME, WAVE, FrameClock(500, 33), FrameClock(640, 0)])
def test_alignment_is_the_nearest_frame(clock, other):
    a, c, d = clock.align(other)
    found = [(a * t + c) // d for t in range(20)]
    inside = [(f, n) for f, n in zip(found, nearest(clock, other, 20, 60), strict=True) if n is not None and f >= 0]
    assert len(inside) >= 18
    assert all(f == n for f, n in inside)


def test_no_family():
    base, weight, bias = (normal(*s).requires_grad_() for s in ((7, BASE_WIDTH), (N, 3, BASE_WIDTH), (N,)))
    out = mixture_project(
        base, [], normal(1, 2), base_starts=int32(0), base_lengths=int32(7), row_offsets=[],
        position=torch.zeros(1, 2, dtype=torch.int32), base_weight=weight, row_weights=[], bias=bias, base_clock=BASE,
        row_clocks=[], cu_seqlens=int32(0, 3), num_rows=3, stride=2,
    )  # fmt: skip
    expected = functional.conv1d(base.T[None], weight.mT, bias, stride=2)[0].T
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (base, weight, bias)) for y in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_where_no_row_is_met_there_is_silence_whatever_the_last_row_is():
    batch, projector = Batch(((0,),), (5,), ((2,), (0,))), PROJECTORS["frame by frame"]
    inputs = make_inputs(batch, projector)
    inputs["rows0"][-1] = torch.nan
    out = op(batch, projector, CLOCKS["whisper and wave"], "")(**inputs)
    assert out.isfinite().all(1).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    batch, projector, clocks = Batch(((0, 2),), (31,), ((31,), (30,))), PROJECTORS["conv"], CLOCKS["whisper and wave"]
    ours, theirs = op(batch, projector, clocks, "gelu"), naive(batch, projector, clocks, "gelu")
    assert_accurate(ours, theirs, make_inputs(batch, projector), sum(batch.frames_out(*projector)), dtype)


def test_float32_weights_scale_bfloat16_rows():
    batch, projector, clocks = BATCHES["both families"], PROJECTORS["stack"], CLOCKS["whisper and wave"]
    inputs = {name: t.bfloat16().requires_grad_() for name, t in make_inputs(batch, projector).items()}
    inputs["weights"] = inputs["weights"].detach().float().requires_grad_()
    out = op(batch, projector, clocks, "gelu")(**inputs)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(t.grad.dtype == t.dtype for t in inputs.values())


def test_accepts_any_strides():
    batch, projector, clocks = BATCHES["both families"], PROJECTORS["conv"], CLOCKS["whisper and wave"]
    inputs = make_inputs(batch, projector)
    inputs = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in inputs.items()}
    ours, theirs = op(batch, projector, clocks, "gelu"), naive(batch, projector, clocks, "gelu")
    assert_matches(ours, theirs, inputs, sum(batch.frames_out(*projector)))


@table(PROJECTORS, "projector")
@pytest.mark.parametrize("bias", [False, True])
def test_derivatives(projector, bias):
    batch = Batch(((0, 2), (3, 3)), (5, 4), ((5, 4), (4, 3)))
    gradcheck(op(batch, projector, CLOCKS["whisper and wave"], "gelu"), make_inputs(batch, projector, bias=bias))


def registered(batch: Batch, projector: tuple[int, int, int]) -> tuple[Inputs, dict[str, Any], list[int]]:
    clocks = CLOCKS["whisper and wave"]
    alignment = [number for clock in clocks[1] for number in clocks[0].align(clock)]
    return make_inputs(batch, projector), layout(batch, projector, clocks), alignment


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("save_pre", [False, True])
def test_registration(bias, save_pre):
    x, at, alignment = registered(BATCHES["both families"], PROJECTORS["conv"])
    x = {name: t.requires_grad_(save_pre) for name, t in x.items()}
    args = (
        x["base"], at["base_starts"], at["base_lengths"], [x["rows0"], x["rows1"]], at["row_offsets"], at["position"],
        x["weights"], x["base_weight"], [x["row_weights0"], x["row_weights1"]], x["bias"] if bias else None, alignment,
        at["cu_seqlens"], at["num_rows"], at["stride"], at["padding"], "gelu" if save_pre else "", save_pre,
    )  # fmt: skip
    opcheck(torch.ops.mowe.mixture_project.default, args)


@pytest.mark.parametrize("needs", [(True,) * 5, (False, False, True, False, False), (False, True, False, True, False)])
def test_registration_of_the_backward(needs):
    x, at, alignment = registered(BATCHES["both families"], PROJECTORS["conv"])
    rows = at["num_rows"]
    args = (
        normal(rows, N), x["base"], at["base_starts"], at["base_lengths"], [x["rows0"], x["rows1"]], at["row_offsets"],
        at["position"], x["weights"], x["base_weight"], [x["row_weights0"], x["row_weights1"]], alignment,
        at["cu_seqlens"], normal(rows, N), at["stride"], at["padding"], "gelu", *needs,
    )  # fmt: skip
    opcheck(torch.ops.mowe.mixture_project_backward.default, args)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"base": normal(20)}, ("base must be packed", "[any, any]", "got [20]")),
        ({"base_weight": normal(N, 3, 5)}, ("base_weight", "[any, any, 4]", "got [3, 3, 5]")),
        ({"base_lengths": int32(13)}, ("base_lengths", "[2]", "got [1]")),
        ({"weights": normal(3, 2)}, ("weights", "[2, any]", "got [3, 2]")),
        ({"position": int32(0, 1)}, ("position", "[2, 2]", "got [2]")),
        ({"rows": [normal(13, 2)]}, ("row_offsets", "one entry per family (1)", "got 2")),
        ({"row_clocks": (SAME,)}, ("row_clocks", "one entry per family (2)", "got 1")),
        ({"rows": [normal(13), normal(19, 5)]}, ("rows[0]", "[any, any]", "got [13]")),
        ({"row_offsets": [int32(0, 1), int32(0, 1)]}, ("row_offsets[0]", "[5]", "got [2]")),
        (
            {"row_weights": [normal(2, N, 3, 2), normal(2, N, 3, 4)]},
            ("row_weights[1]", "[2, 3, 3, 5]", "got [2, 3, 3, 4]"),
        ),
        ({"bias": normal(N + 1)}, ("bias", "[3]", "got [4]")),
        ({"cu_seqlens": int32(0, 7)}, ("cu_seqlens", "[3]", "got [2]")),
        ({"rows": [normal(13, 2), normal(19, 5).half()]}, ("rows[1] must be torch.float64", "got torch.float16")),
        ({"activation": "relu"}, ("activation", "'', 'gelu'", "got 'relu'")),
        ({"stride": 0}, ("stride must be positive", "got 0")),
        ({"padding": -1}, ("padding must not be negative", "got -1")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    x, at, _ = registered(BATCHES["both families"], PROJECTORS["conv"])
    rows, row_weights = ([x.pop(f"{name}{f}") for f in range(2)] for name in ("rows", "row_weights"))
    with raises("mixture_project: ", *parts):
        mixture_project(**x | at | {"rows": rows, "row_weights": row_weights} | change)
