from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import triton
import triton.language as tl

from mowe_kernels.compile_report import _without_interpreter
from mowe_kernels.triton._compilation import Compilation, compile_for
from mowe_kernels.triton._device import find_tile, gelu, gelu_grad, normal_tail
from tests.mowe_kernels.checks import offsets
from tests.mowe_kernels.triton.accuracy import DEVICE

X = torch.cat([torch.linspace(-7, 7, 4001), torch.tensor([-1e4, -0.0, 1e-20, 1e4])])


@triton.jit
def tail_kernel(p_x, p_out, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(p_out + at, normal_tail(tl.load(p_x + at, mask=at < N, other=0.0)), mask=at < N)


@triton.jit
def gelu_kernel(p_x, p_y, p_slope, N, NARROW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(p_x + at, mask=at < N, other=0.0)
    tl.store(p_y + at, gelu(x, NARROW), mask=at < N)
    tl.store(p_slope + at, gelu_grad(x, NARROW), mask=at < N)


@triton.jit
def find_kernel(p_offsets, p_out, tile_rows, E: tl.constexpr, BE: tl.constexpr):
    group, start, stop = find_tile(p_offsets, tl.program_id(0), tile_rows, E, BE)
    p = p_out + 3 * tl.program_id(0)
    tl.store(p, group)
    tl.store(p + 1, start)
    tl.store(p + 2, stop)


def test_normal_tail():
    a = torch.linspace(0, 6, 4001, device=DEVICE)
    tail = torch.empty_like(a)
    tail_kernel[(1,)](a, tail, a.numel(), BLOCK=4096)
    exact = torch.special.log_ndtr(-a.double()).exp()
    assert (tail / exact - 1).abs().max() < 1e-5


@pytest.mark.parametrize(("narrow", "allowed"), [(False, 1.5e-6), (True, 2e-6)])
def test_gelu_and_its_slope(narrow, allowed):
    x = X.to(DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(1,)](x, y, slope, x.numel(), NARROW=narrow, BLOCK=4096)
    exact = x.double().requires_grad_()
    exact_y = torch.nn.functional.gelu(exact)
    exact_y.sum().backward()
    torch.testing.assert_close(y.double(), exact_y.detach(), atol=allowed, rtol=1e-7)
    torch.testing.assert_close(slope.double(), exact.grad, atol=allowed, rtol=0)


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_not_a_number_stays_so(narrow):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(1,)](x, y, slope, x.numel(), NARROW=narrow, BLOCK=4)
    assert y[0].isnan() and y[1] == torch.inf and slope[0].isnan()


def test_the_minimum_that_keeps_it_is_an_instruction_of_its_own():
    """The interpreter's only minimum is that one, a GPU's plain one gives the number."""
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "initializer": _without_interpreter}
    with ProcessPoolExecutor(1, **fresh) as pool:
        assert "min.NaN.f32" in pool.submit(_narrow_gelu).result()


def _narrow_gelu() -> str:
    """What the kernel is compiled to."""
    pointers = dict.fromkeys(("p_x", "p_y", "p_slope"), "*fp32")
    constants = {"NARROW": True, "BLOCK": 128}
    return compile_for(Compilation("", gelu_kernel, pointers | {"N": "i32"}, constants, 4, 1, False), 90).asm["ptx"]


@pytest.mark.parametrize("sizes", [(7, 0, 13, 3), (0, 0, 8), (1,), (16, 16), (0, 0), (5, 0, 0, 0)])
@pytest.mark.parametrize("tile_rows", [1, 4, 16, 100])
def test_tiles_cover_every_row_once(sizes, tile_rows):
    bounds = offsets(sizes)
    groups, rows = len(sizes), sum(sizes)
    tiles = rows // tile_rows + groups
    found = torch.empty(tiles, 3, dtype=torch.int32, device=DEVICE)
    find_kernel[(tiles,)](bounds.to(DEVICE), found, tile_rows, E=groups, BE=triton.next_power_of_2(groups))
    covered = []
    for group, start, stop in found.tolist():
        assert bounds[group] <= start and stop == bounds[group + 1]
        covered += range(start, min(start + tile_rows, stop))
    assert sorted(covered) == list(range(rows))
    assert set(found[:, 0].tolist()) == set(range(groups))
