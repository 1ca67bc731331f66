from __future__ import annotations

from typing import Any

import pytest
import torch

from mowe_kernels import mixture_project, use_backend
from mowe_kernels.triton._launch import ARCHITECTURES, assume, override
from mowe_kernels.triton.grouped_linear import Tile
from tests.mowe_kernels import test_mixture_project as sizes
from tests.mowe_kernels.checks import raises, table
from tests.mowe_kernels.test_mixture_project import BATCHES, CLOCKS, PROJECTORS, Batch, layout, make_inputs
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

# Blocks so small that every shape has several in each direction.
SMALL = {
    "mixture_tile": Tile(16, 16, 16, 4, 2),
    "mixture_features_tile": Tile(16, 16, 16, 4, 2),
    "mixture_weight_tile": Tile(16, 16, 16, 4, 2),
    "mixture_rows_tile": Tile(4, 4, 1, 4, 2),
    "mixture_parts": 2,
}

# All but the slots' weights, whose gradients are few: see `test_gradient_of_the_weights`.
LEARNING = ("base", "base_weight", "bias", "rows0", "row_weights0", "rows1", "row_weights1")


def op(batch: Batch, projector: tuple[int, int, int], clocks: Any, activation: str, tail: int = 0):
    arguments = layout(batch, projector, clocks, tail)
    arguments = {name: to_device(value) for name, value in arguments.items()}

    def call(rows0, rows1, row_weights0, row_weights1, **inputs):
        return mixture_project(
            rows=[rows0, rows1], row_weights=[row_weights0, row_weights1], activation=activation, **inputs, **arguments
        )

    return call


def to_device(value: Any) -> Any:
    if isinstance(value, list):
        return [to_device(v) for v in value]
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def check(
    batch: Batch,
    projector: tuple[int, int, int],
    clocks: Any = CLOCKS["whisper and wave"],
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    learning: tuple[str, ...] = LEARNING,
) -> None:
    inputs = make_inputs(batch, projector, 3)
    frozen = tuple(name for name in inputs if name not in learning)
    rows = sum(batch.frames_out(*projector))
    assert_as_accurate_as_torch(op(batch, projector, clocks, activation, 3), inputs, rows, dtype, frozen)


@table(BATCHES | {"no frames": Batch(((0, 2), (1, -1)), (0, 0), ((0, 0), (0, 0)))}, "batch")
@table(PROJECTORS, "projector")
def test_layouts(batch, projector):
    with override(**SMALL):
        check(batch, projector)


@table(CLOCKS, "clocks")
@pytest.mark.parametrize("projector", ["conv", "stack"])
def test_clocks(clocks, projector):
    with override(**SMALL):
        check(BATCHES["both families"], PROJECTORS[projector], clocks)


@table(BATCHES, "batch")
@table(CLOCKS, "clocks")
def test_gradient_of_the_weights(batch, clocks):
    """A sum with few results, in which plain torch can be right by luck: against float64 itself."""
    projector = PROJECTORS["conv"]
    inputs = {name: value.to(DEVICE, torch.float32) for name, value in make_inputs(batch, projector, 3).items()}
    grads = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {name: value.to(dtype) for name, value in inputs.items()}
        leaves["weights"].requires_grad_()
        with use_backend(backend), override(**SMALL):
            out = op(batch, projector, clocks, "gelu", 3)(**leaves)
            cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE).view(out.shape)
            cotangent[sum(batch.frames_out(*projector)) :] = torch.nan
            grads += torch.autograd.grad(out, leaves["weights"], cotangent.to(dtype))
    torch.testing.assert_close(grads[1], grads[0].float())


@pytest.mark.parametrize("learning", [("base",), ("rows0", "rows1"), ("base_weight",), ("bias",), ()])
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_gradients_one_by_one(learning, activation):
    with override(**SMALL):
        check(BATCHES["shared pairs"], PROJECTORS["conv"], CLOCKS["ties"], activation, learning=learning)


def test_without_weak_features():
    batch, projector = BATCHES["both families"], PROJECTORS["conv"]
    inputs = make_inputs(batch, projector, 3, bias=False)
    inputs = {name: value for name, value in inputs.items() if name[-1] not in "01"}
    arguments = {name: to_device(value) for name, value in layout(batch, projector, CLOCKS["ties"], 3).items()}
    arguments |= {"rows": [], "row_weights": [], "row_offsets": [], "row_clocks": []}
    rows = sum(batch.frames_out(*projector))
    with override(**SMALL):
        assert_as_accurate_as_torch(
            lambda **inputs: mixture_project(**inputs, **arguments), inputs, rows, torch.float32, tuple(inputs)
        )


def test_rows_without_a_clip():
    base, weight = (torch.ones(*shape, device=DEVICE, requires_grad=True) for shape in ((5, 4), (3, 3, 4)))
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    with use_backend("triton"):
        out = mixture_project(
            base, [], none.view(0, 1).float(), base_starts=none, base_lengths=none, row_offsets=[],
            position=none.view(0, 1), base_weight=weight, row_weights=[], bias=None, base_clock=CLOCKS["ties"][0],
            row_clocks=[], cu_seqlens=none.new_zeros(1), num_rows=3, stride=2,
        )  # fmt: skip
        grads = torch.autograd.grad(out, (base, weight), torch.full_like(out, torch.nan))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 90])
def test_settings_of_every_architecture(dtype, capability, monkeypatch):
    """The blocks of the tables, several of them in each direction."""
    monkeypatch.setattr(sizes, "N", 136)
    monkeypatch.setattr(sizes, "BASE_WIDTH", 80)
    batch = Batch(((0, 2), (3, 1)), (150, 40), ((150, 40), (149, 40)))
    with assume(ARCHITECTURES[capability]._replace(num_sms=1)):
        check(batch, PROJECTORS["frame by frame"], dtype=dtype)


def test_a_clip_alone_is_the_clip_in_a_batch():
    projector, clocks = PROJECTORS["conv"], CLOCKS["whisper and wave"]
    together, alone = Batch(((0, 2), (3, 1)), (13, 7), ((13, 7), (12, 6))), Batch(((3, 1),), (7,), ((7,), (6,)))
    inputs = make_inputs(together, projector)
    inputs = {name: value.to(DEVICE, torch.float32) for name, value in inputs.items()}
    own = {"base": inputs["base"][13:], "rows0": inputs["rows0"][13:], "rows1": inputs["rows1"][12:]}
    own |= {"weights": inputs["weights"][1:]}
    with use_backend("triton"):
        expected = op(together, projector, clocks, "gelu")(**inputs)[-4:]
        assert torch.equal(op(alone, projector, clocks, "gelu")(**inputs | own), expected)


def test_float64_is_refused():
    batch, projector = BATCHES["one frame"], PROJECTORS["stack"]
    with use_backend("triton"), raises("mixture_project: ", "float32", "got torch.float64"):
        op(batch, projector, CLOCKS["ties"], "")(**make_inputs(batch, projector))
