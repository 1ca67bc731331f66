from __future__ import annotations

import pytest
import torch

from mowe_kernels import grouped_conv1d, use_backend
from mowe_kernels.triton import grouped_conv1d as kernels
from mowe_kernels.triton._launch import ARCHITECTURES, assume, override, record
from mowe_kernels.triton.grouped_linear import Tile
from tests.mowe_kernels.checks import Inputs, raises, table
from tests.mowe_kernels.test_grouped_conv1d import BATCHES, EPILOGUES, SHAPES, Batch, Shape, make_inputs
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

# Blocks so small that every shape has several in each direction.
SMALL = {
    "conv_tile": Tile(16, 16, 16, 4, 2),
    "conv_weight_tile": Tile(16, 16, 16, 4, 2),
    "conv_positions_tile": Tile(4, 16, 1, 4, 2),
}


def op(batch: Batch, shape: Shape, activation: str, tail: int = 0):
    arguments = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in (batch.arguments(shape, tail) | shape.arguments).items()
    }
    return lambda **inputs: grouped_conv1d(**inputs, **arguments, activation=activation)


def check(
    batch: Batch,
    shape: Shape,
    epilogue: tuple[str, ...],
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
) -> None:
    inputs = make_inputs(batch, shape, 3, epilogue)
    rows = sum(batch.frames_out(shape))
    assert_as_accurate_as_torch(op(batch, shape, activation, 3), inputs, rows, dtype, frozen)


@table(BATCHES, "batch")
@table(SHAPES, "shape")
def test_layouts(batch, shape):
    with override(**SMALL, conv_weight_splits=3):
        check(batch, shape, EPILOGUES["all"])


@table(EPILOGUES, "epilogue")
@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("shape", ["whisper 2", "positional"])
def test_epilogues(epilogue, activation, shape):
    with override(**SMALL, conv_weight_splits=1):
        check(BATCHES["shared clips"], SHAPES[shape], epilogue, activation)


@pytest.mark.parametrize("learning", ["x", "weight", "bias", "positions", "residual"])
def test_gradients_one_by_one(learning):
    frozen = tuple(name for name in EPILOGUES["all"] + ("x", "weight") if name != learning)
    with override(**SMALL):
        check(BATCHES["shared clips"], SHAPES["whisper 2"], EPILOGUES["all"], frozen=frozen)


WIDE = {
    "one tap a step": Shape(taps=3, stride=2, padding=1, c=32, n=32),
    "one tap a step, groups": Shape(taps=2, padding=1, groups=2, c=32, n=32),
    "taps end within a step": Shape(taps=5, stride=2, padding=2, c=20, n=24),
    "more taps than frames": Shape(taps=30, padding=15, groups=2, c=4, n=6),
}


@table(WIDE, "shape")
def test_steps_of_the_products(shape):
    with override(**SMALL):
        check(Batch((35, 17), ((0, 0), (1, 2), (0, 2))), shape, EPILOGUES["all"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", [Shape(taps=3, stride=2, padding=1, c=80, n=136), SHAPES["wave"]])
def test_settings_of_every_architecture(dtype, capability, shape):
    """The blocks of the tables, several of them in each direction."""
    with assume(ARCHITECTURES[capability]._replace(num_sms=1)):
        check(Batch((270, 0, 35), ((0, 0), (1, 0), (2, 2))), shape, EPILOGUES["all"], dtype=dtype)


def test_frames_without_a_position_get_none():
    """What cannot be an error without waiting for the device is no other encoder's position either."""
    batch, shape = BATCHES["one clip"], SHAPES["whisper 2"]
    inputs = make_inputs(batch, shape, 0, ("positions",))
    inputs = {name: None if value is None else value.float().to(DEVICE) for name, value in inputs.items()}
    few = inputs | {"positions": inputs["positions"][:, :3].contiguous()}
    padded = inputs["positions"].clone()
    padded[:, 3:] = 0.0
    with use_backend("triton"), override(**SMALL):
        got, expected = (op(batch, shape, "")(**given) for given in (few, inputs | {"positions": padded}))
    assert torch.equal(got, expected)


def test_sequences_in_any_order():
    """Encoders need not be sorted, and there may be more sequences than one look of a search takes in."""
    pairs = tuple((clip if clip % 8 == 1 else None, clip * 7 % 3) for clip in range(270))
    with override(**SMALL):
        check(Batch((2,) * 270, pairs), SHAPES["whisper 1"], ())


def test_without_a_sequence_nothing_is_launched():
    none = torch.empty(0, dtype=torch.int32, device="meta")
    x, weight = torch.empty(300, 4, device="meta"), torch.empty(1, 6, 3, 4, device="meta")
    with record(90) as launches:
        kernels.forward(x, weight, None, none, none, none, none.new_empty(1), None, None, 300, 1, 1, 1, "", False)
    assert not launches


def test_a_clip_alone_is_the_clip_in_a_batch():
    shape, batch = SHAPES["whisper 2"], Batch((40, 33, 21), ((0, 0), (1, 0), (2, 1)))
    inputs: Inputs = make_inputs(batch, shape, 0, ("bias", "positions"))
    inputs = {name: None if value is None else value.to(DEVICE, torch.float32) for name, value in inputs.items()}
    with use_backend("triton"):
        together = op(batch, shape, "gelu")(**inputs)
        alone = op(Batch((33,), ((0, 0),)), shape, "gelu")(**inputs | {"x": inputs["x"][40:73]})
    assert torch.equal(alone, together[20:37])


def test_float64_is_refused():
    batch, shape = BATCHES["one clip"], SHAPES["whisper 1"]
    inputs = make_inputs(batch, shape, 0, ())
    with use_backend("triton"), raises("grouped_conv1d: ", "float32", "got torch.float64"):
        op(batch, shape, "")(**inputs)
