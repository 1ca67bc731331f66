from __future__ import annotations

import pytest
import torch

from mowe_kernels import grouped_linear, use_backend
from mowe_kernels.triton import _descriptors
from mowe_kernels.triton import grouped_linear as grouped_linear_kernels
from mowe_kernels.triton._launch import ARCHITECTURES, assume, override
from mowe_kernels.triton.grouped_linear import ROW_TILES_TO_STAY, TILES, Tile, _gemm_choice
from mowe_kernels.tune.search import ROWS
from tests.mowe_kernels.checks import GROUPS, Inputs, normal, offsets, raises, rows_with_tail, table
from tests.mowe_kernels.triton.accuracy import DEVICE, DTYPES, assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poisoned")

EPILOGUES = {
    "plain": ((), ""),
    "bias": (("bias",), ""),
    "gelu": (("bias",), "gelu"),
    "residual": (("bias", "residual"), ""),
    "scale": (("row_scale",), ""),
    "all": (("bias", "residual", "row_scale"), "gelu"),
}
SHAPES = {"odd": (29, 19), "even": (32, 48)}


def make_inputs(sizes: tuple[int, ...], tail: int, epilogue: tuple[str, ...], k: int, n: int) -> Inputs:
    rows, encoders = sum(sizes), len(sizes)
    inputs = {
        "x": rows_with_tail(rows, tail, k),
        "weight": normal(encoders, n, k) / k**0.5,
        "bias": normal(encoders, n),
        "residual": rows_with_tail(rows, tail, n),
        "row_scale": rows_with_tail(rows, tail),
    }
    return {name: value if name in ("x", "weight", *epilogue) else None for name, value in inputs.items()}


def op(sizes: tuple[int, ...], activation: str):
    def call(x, weight, bias, residual, row_scale):
        return grouped_linear(
            x, weight, bias, offsets(sizes).to(DEVICE), activation=activation, residual=residual, row_scale=row_scale
        )

    return call


SMALL = {"gemm_tile": Tile(16, 16, 16, 4, 2), "wgrad_tile": Tile(16, 16, 16, 4, 2), "wgrad_chunk": 6}
PERSISTENT = {**SMALL, "gemm_tile": Tile(16, 16, 16, 4, 2, per_sm=1), "row_tiles_to_stay": 0}


@table(GROUPS, "sizes")
@table(SHAPES, "shape")
def test_layouts(sizes, shape):
    inputs = make_inputs(sizes, 3, EPILOGUES["all"][0], *shape)
    frozen = ("row_scale",) if sum(sizes) == 1 else ()  # see `test_gradient_of_one_scale`
    with override(**SMALL):
        assert_as_accurate_as_torch(op(sizes, "gelu"), inputs, sum(sizes), torch.float32, frozen)


@table(GROUPS, "sizes")
@table(SHAPES, "shape")
def test_programs_that_compute_block_after_block(sizes, shape):
    inputs = make_inputs(sizes, 3, EPILOGUES["all"][0], *shape)
    frozen = ("row_scale",) if sum(sizes) == 1 else ()
    with override(**PERSISTENT):
        assert_as_accurate_as_torch(op(sizes, "gelu"), inputs, sum(sizes), torch.float32, frozen)


def test_what_is_measured_has_rows_that_fit(monkeypatch):
    """Every number of rows at the size that is measured, where int32 holds no product of two of them."""
    seen = []

    def forward(x, weight, bias, offsets, *others):
        seen.append((len(x), offsets))
        return x, x

    monkeypatch.setattr(grouped_linear_kernels, "forward", forward)
    for tuning in grouped_linear_kernels.tunings(torch.device("cpu"), ROWS):
        if tuning.name == "gemm_tile":
            tuning.call()
    assert len(seen) == 6 + 6 + 1
    for count, at in seen:
        assert at[0] == 0 and at[-1] == count and (at.diff() >= 0).all()
    assert any((at.diff() == 0).any() for _, at in seen)


def test_programs_stay_where_few_blocks_are_computed_for_nothing():
    encoders, staying = 4, Tile(128, 256, 64, 8, 3, per_sm=2)
    least = 128 * ROW_TILES_TO_STAY * encoders
    with assume(ARCHITECTURES[90]), override(gemm_tile=staying):
        for rows, tile, programs in ((least - 1, TILES[16, 90][0], 0), (least, staying, 2 * 132)):
            assert _gemm_choice(DEVICE, torch.bfloat16, rows, encoders, 1536, 384, False)[::2] == (tile, programs)


@table(SHAPES, "shape")
def test_gradient_of_one_scale(shape):
    """One number, in which plain torch can be right by luck: against float64 itself."""
    inputs = make_inputs(GROUPS["one row"], 0, EPILOGUES["all"][0], *shape)
    inputs = {name: value.to(DEVICE, torch.float32) for name, value in inputs.items()}
    grads = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = {name: value.to(dtype) for name, value in inputs.items()}
        leaves["row_scale"].requires_grad_()
        with use_backend(backend), override(**SMALL):
            out = op(GROUPS["one row"], "gelu")(**leaves)
            grads += torch.autograd.grad(out.sum(), leaves["row_scale"])
    torch.testing.assert_close(grads[1], grads[0].float())


@table(EPILOGUES, "epilogue")
def test_epilogues(epilogue):
    sizes = GROUPS["primes"]
    inputs = make_inputs(sizes, 3, epilogue[0], *SHAPES["odd"])
    with override(**SMALL):
        assert_as_accurate_as_torch(op(sizes, epilogue[1]), inputs, sum(sizes), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_settings_of_every_architecture(dtype, capability):
    """The blocks of the tables, several of them in each direction."""
    sizes = (140, 0, 70)
    inputs = make_inputs(sizes, 5, EPILOGUES["all"][0], 72, 136)
    few_programs = ARCHITECTURES[capability]._replace(num_sms=1)
    with assume(few_programs), override(wgrad_chunk=80):
        assert_as_accurate_as_torch(op(sizes, "gelu"), inputs, sum(sizes), dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("n", [136, 192])
@pytest.mark.parametrize("per_sm", [0, 2])
def test_blocks_fetched_through_descriptors(dtype, n, per_sm, monkeypatch):
    """What another encoder's weights hold spreads to nobody's rows, nor where a block ends past an encoder's own."""
    sizes, described = (140, 0, 70), []
    inputs = make_inputs(sizes, 5, EPILOGUES["all"][0], 72, n)
    inputs["weight"][1] = torch.inf
    describe = _descriptors._described
    monkeypatch.setattr(_descriptors, "_described", lambda *args: described.append(args) or describe(*args))
    block = Tile(128, 128, 64, 8, 3, per_sm)
    settings = override(tma_products=0, gemm_tile=block, row_tiles_to_stay=0)
    with assume(ARCHITECTURES[90]._replace(num_sms=1)), settings:
        assert_as_accurate_as_torch(op(sizes, "gelu"), inputs, sum(sizes), dtype)
    assert len(described) == (4 if n % 64 == 0 else 2)  # forward and, where blocks end with the weights, backward


@pytest.mark.parametrize("settings", [SMALL, PERSISTENT], ids=["a block each", "block after block"])
def test_tiles_in_several_bands(settings):
    """More tiles than a band has, in both directions."""
    sizes = (100, 60, 37)
    inputs = make_inputs(sizes, 0, ("bias",), 8, 40)
    with override(**settings):
        assert_as_accurate_as_torch(op(sizes, ""), inputs, sum(sizes), torch.float32)


@pytest.mark.parametrize("learning", ["x", "weight", "bias", "row_scale"])
def test_gradients_one_by_one(learning):
    sizes = GROUPS["primes"]
    inputs = make_inputs(sizes, 0, ("bias", "row_scale"), *SHAPES["odd"])
    frozen = tuple(name for name in inputs if name != learning)
    with override(**SMALL):
        assert_as_accurate_as_torch(op(sizes, "gelu"), inputs, sum(sizes), torch.float32, frozen)


def test_more_groups_than_rows():
    sizes = (1, 0, 0, 2) * 12
    inputs = make_inputs(sizes, 0, ("bias",), 5, 3)
    with override(**SMALL):
        assert_as_accurate_as_torch(op(sizes, ""), inputs, sum(sizes), torch.float32)


def test_reads_rows_that_are_not_contiguous():
    sizes = GROUPS["primes"]
    inputs = make_inputs(sizes, 0, ("bias", "residual"), *SHAPES["odd"])

    def call(x, weight, bias, residual, row_scale):
        x, weight, bias, residual = (value.mT.contiguous().mT for value in (x, weight, bias, residual))
        at = torch.stack((offsets(sizes), offsets(sizes) + 1), 1).to(DEVICE)[:, 0]
        return grouped_linear(x, weight, bias, at, residual=residual)

    with override(**SMALL):
        assert_as_accurate_as_torch(call, inputs, sum(sizes), torch.float32)


def test_refuses_types_it_cannot_compute_in():
    x, weight, offsets_ = torch.zeros(4, 3), torch.zeros(2, 5, 3), offsets((2, 2))
    with use_backend("triton"):
        with raises("grouped_linear", "float64"):
            grouped_linear(x.double(), weight.double(), None, offsets_)
        with raises("grouped_linear", "bfloat16", "float32"):
            grouped_linear(x.bfloat16(), weight, None, offsets_)
