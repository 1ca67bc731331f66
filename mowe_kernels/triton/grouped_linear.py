"""Triton `grouped_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mowe_kernels.triton import _gemm
from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._descriptors import TMA_SINCE, operands, worth_describing
from mowe_kernels.triton._launch import (
    Hardware,
    Launch,
    Programs,
    Tuning,
    alike,
    cdiv,
    check_dtypes,
    contiguous,
    hardware,
    launch,
    next_power_of_2,
    override,
    recorded,
    remembered,
    setting,
)


class Tile(NamedTuple):
    """Rows, columns and depth of the block a program multiplies, its warps and its stages of prefetching.

    per_sm: of `grouped_linear` alone, how many programs a multiprocessor keeps, each of which computes block after
    block; 0 for a program a block.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    per_sm: int = 0


# By bits of the type and capability (the newest that is not newer than the device): the block of a program when there
# are enough for every multiprocessor, and the block when there are not. Two of the former fit a multiprocessor, so that
# one's epilogue hides behind the other's products.
TILES = {
    (16, 90): (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    (16, 86): (Tile(128, 64, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    (16, 80): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    (32, 80): (Tile(128, 64, 16, 8, 3), Tile(64, 32, 16, 4, 3)),
}
# The same for the products over rows: here `depth` counts rows, `rows` and `cols` the two sides of the weight.
WGRAD_TILES = {
    (16, 90): Tile(128, 128, 64, 8, 3),
    (16, 80): Tile(128, 128, 32, 8, 3),
    (32, 80): Tile(128, 64, 16, 8, 3),
}
# What `tunings` tries, of this op and of those that multiply alike.
CANDIDATES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 4, 2),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 128, 32, 8, 3),
)
# Of `grouped_linear` alone: programs that stay read the operands of the next block while they finish one, which is what
# lets a block be so large that no second program fits beside it, and large blocks read less.
PERSISTENT_CANDIDATES = (
    Tile(128, 256, 64, 8, 3, 1),
    Tile(128, 256, 64, 8, 4, 1),
    Tile(256, 128, 64, 8, 3, 1),
    Tile(128, 128, 64, 8, 3, 2),
    Tile(128, 128, 64, 4, 3, 2),
)
FEW_CANDIDATES = (Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 4, 6), Tile(64, 128, 64, 4, 4), Tile(64, 32, 128, 4, 4))
# Products of so few summands (our choice): what follows them takes as long, so a table has a tile for them.
SHALLOW = 512
WGRAD_PROGRAMS_PER_SM = 4
WGRAD_MIN_CHUNK = 512
REDUCE_BLOCK = 1024
EPILOGUE_ROWS = 8
BAND = 8  # row tiles walked together
# Programs that stay compute for nothing what has no rows, at most a row tile of each encoder: of so many for each
# encoder on average, that is little (our choice).
ROW_TILES_TO_STAY = 8


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_offsets: Tensor,
    residual: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    check_dtypes("grouped_linear", x, weight)
    x, weight, bias, group_offsets, residual, row_scale = contiguous(
        x, weight, bias, group_offsets, residual, row_scale
    )
    out = x.new_empty(x.shape[0], weight.shape[1])
    pre = torch.empty_like(out) if save_pre else x.new_empty(0)
    gemm(
        x, weight, group_offsets, out,
        bias=bias, gelu=activation == "gelu", scale=row_scale, residual=residual, pre=pre if save_pre else None,
    )  # fmt: skip
    return out, pre


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group_offsets: Tensor,
    row_scale: Tensor | None,
    pre: Tensor,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference's gradients."""
    check_dtypes("grouped_linear", grad, x, weight)
    grad, x, weight, group_offsets, row_scale, residual = contiguous(
        grad, x, weight, group_offsets, row_scale, residual
    )
    nothing = x.new_empty(0)
    need_product = need_x or need_weight or need_bias
    grad_scale = torch.empty_like(row_scale) if need_scale else nothing
    if need_scale or (need_product and (activation or row_scale is not None)):
        g = torch.empty_like(grad) if need_product else None
        _through_epilogue(grad, pre, row_scale, group_offsets, activation, g, grad_scale if need_scale else None)
    else:
        g = grad
    if not need_product:
        return nothing, nothing, nothing, grad_scale
    grad_x = torch.empty_like(x) if need_x else nothing
    if need_x:
        gemm(g, weight, group_offsets, grad_x, transposed=True, residual=residual)
    return grad_x, *wgrad(g, x, weight, group_offsets, need_weight, need_bias), grad_scale


def gemm(
    a: Tensor,
    weight: Tensor,
    group_offsets: Tensor,
    out: Tensor,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    gelu: bool = False,
    scale: Tensor | None = None,
    through: Tensor | None = None,
    residual: Tensor | None = None,
    pre: Tensor | None = None,
) -> None:
    """out = scale * act(a @ weight[e].T + bias[e]) * gelu'(through) + residual, pre the value before act.

    a: [R, K]. weight: [E, N, K], with `transposed` [E, K, N], and then a @ weight[e] is meant. out, residual, pre,
    through: [R, N], and out may be `through` itself.
    """
    rows, k = a.shape
    experts, n = weight.shape[0], out.shape[1]
    tile, described, resident = _gemm_choice(a.device, a.dtype, alike(rows), experts, n, k, transposed)
    matrices, tma = (a, weight), False
    if described:
        block = (tile.depth, tile.cols) if transposed else (tile.cols, tile.depth)
        matrices, tma = operands((a, (tile.rows, tile.depth)), (weight, block))
    start = _gemm_launch(tile, tma, a.itemsize, experts, n, k, transposed, gelu)
    programs = resident or Programs(rows, tile.rows, experts, cdiv(n, tile.cols))
    start(programs if rows else 0, *matrices, bias, group_offsets, residual, scale, through, pre, out, rows)


@remembered
def _gemm_choice(
    device: torch.device, dtype: torch.dtype, rows: int, experts: int, n: int, k: int, transposed: bool
) -> tuple[Tile, bool, int]:
    """The block of a program, whether it is fetched through descriptors, and how many programs compute all blocks, 0
    where each computes one.
    """
    found = hardware(device)
    tile = gemm_tile(found, dtype, rows, n, k)
    if tile.per_sm and rows // tile.rows < setting("row_tiles_to_stay", ROW_TILES_TO_STAY) * experts:
        tile = newest(TILES, found, dtype)[0]
    whole = not transposed or k % tile.depth == 0  # else a descriptor reads on into the next encoder's weights
    return tile, whole and worth_describing(found, rows * n * k), tile.per_sm * found.num_sms


@remembered
def _gemm_launch(
    tile: Tile, tma: bool, itemsize: int, experts: int, n: int, k: int, transposed: bool, gelu: bool
) -> Launch:
    return Launch(
        _gemm.grouped_gemm_kernel, E=experts, BE=next_power_of_2(experts), N=n, K=k, TRANSPOSED=transposed, GELU=gelu,
        BM=tile.rows, BN=tile.cols, BK=tile.depth, BAND=BAND, TMA=tma, PERSISTENT=tile.per_sm > 0,
        num_warps=tile.warps, num_stages=tile.stages, matmul=itemsize == 2,
    )  # fmt: skip


def wgrad(
    g: Tensor, x: Tensor, weight: Tensor, group_offsets: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Every group's g.T @ x [E, N, K] and sums of g over its rows [E, N], in the type of `weight` [E, N, K].

    g: [R, N]. x: [R, K]. What is not needed is empty.
    """
    rows, (experts, n, k) = g.shape[0], weight.shape
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(experts, n) if need_bias else weight.new_empty(0)
    if not (need_weight or need_bias):
        return grad_weight, grad_bias
    device = hardware(g.device)
    tile = setting("wgrad_tile", newest(WGRAD_TILES, device, g.dtype), device, f"{8 * g.itemsize} bits")
    tiles = cdiv(n, tile.rows) * (need_weight * cdiv(k, tile.cols) + need_bias)
    chunks = cdiv(WGRAD_PROGRAMS_PER_SM * device.num_sms, tiles)
    most_rows = alike(rows)
    chunk = setting("wgrad_chunk", max(cdiv(most_rows, chunks), WGRAD_MIN_CHUNK))
    parts = 2 * most_rows // chunk if chunk < most_rows else 0
    weight_parts = g.new_empty(parts, n, k, dtype=torch.float32) if need_weight else None
    bias_parts = g.new_empty(parts, n, dtype=torch.float32) if need_bias else None
    launch(
        _gemm.grouped_wgrad_kernel, Programs(rows, chunk, experts, tiles),
        g, x, group_offsets, grad_weight if need_weight else None, grad_bias if need_bias else None,
        weight_parts, bias_parts, chunk,
        E=experts, BE=next_power_of_2(experts), N=n, K=k, BM=tile.depth, BN=tile.rows, BK=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages, matmul=need_weight and g.itemsize == 2,
    )  # fmt: skip
    for total, summands in ((grad_weight, weight_parts), (grad_bias, bias_parts)):
        if parts and summands is not None:
            size = total[0].numel()
            launch(
                _gemm.grouped_wgrad_reduce_kernel, experts * cdiv(size, REDUCE_BLOCK),
                summands, group_offsets, total, chunk, M=size, BLOCK=REDUCE_BLOCK, num_warps=4, num_stages=3,
            )  # fmt: skip
    return grad_weight, grad_bias


def _through_epilogue(
    grad: Tensor,
    pre: Tensor,
    scale: Tensor | None,
    group_offsets: Tensor,
    activation: str,
    out: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """out [R, N] = grad * scale * act'(pre), grad_scale [R] = the sums of grad * act(pre)."""
    rows, n = grad.shape
    launch(
        _gemm.through_epilogue_kernel, Programs(rows, EPILOGUE_ROWS, 1) if rows else 0,
        grad, pre if pre.numel() else None, scale, group_offsets[-1:], out, grad_scale,
        N=n, GELU=activation == "gelu", BM=EPILOGUE_ROWS, BN=min(256, next_power_of_2(n)),
        num_warps=8, num_stages=3,
    )  # fmt: skip


def gemm_tile(device: Hardware, dtype: torch.dtype, rows: int, cols: int, depth: int) -> Tile:
    """The block of a program for an output [rows, cols] of sums over `depth` products."""
    large, small = newest(TILES, device, dtype)
    starved = cdiv(rows, large.rows) * cdiv(cols, large.cols) < device.num_sms
    blocks = "few blocks" if starved else "many shallow blocks" if depth <= SHALLOW else "many blocks"
    return setting("gemm_tile", small if starved else large, device, f"{8 * dtype.itemsize} bits, {blocks}")


def newest(table: dict[tuple[int, int], Any], device: Hardware, dtype: torch.dtype) -> Any:
    """The entry of a table by (bits of the type, capability) that comes closest to the device from below."""
    bits = 8 * dtype.itemsize
    exact = table.get((bits, device.capability))
    return exact or table[max(key for key in table if key[0] == bits and key[1] <= max(device.capability, 80))]


def tunings(device: torch.device, rows: int) -> Iterator[Tuning]:
    """Both linear layers of a Whisper-tiny's feed-forward half over packed rows, and the gradient of a weight."""
    rows = rows // 8 * 8
    x, hidden = (torch.randn(rows, n, dtype=torch.bfloat16, device=device) for n in (384, 1536))
    up = torch.randn(8, 1536, 384, dtype=torch.bfloat16, device=device) / 20
    up_bias, down, down_bias = (part.contiguous() for part in (up[:, :, 0], up.mT, up[:, 0]))
    encoders = torch.arange(9, dtype=torch.int32, device=device)
    offsets, every_other = encoders * (rows // 8), encoders // 2 * (rows // 4)

    # Whether the last tiles fill the multiprocessors is luck: several numbers of rows have less of it. Not always does
    # every encoder have some.
    parts = (100, offsets), (106, every_other), (111, offsets), (117, every_other), (123, offsets), (128, every_other)
    several = [(part * rows // 128, part * each // 128) for part, each in parts]
    candidates = CANDIDATES + PERSISTENT_CANDIDATES * (hardware(device).capability >= TMA_SINCE)

    def widen(count: int, offsets: Tensor) -> Tensor:
        return forward(x[:count], up, up_bias, offsets, None, None, "gelu", False)[0]

    def narrow(count: int, offsets: Tensor) -> Tensor:
        return forward(hidden[:count], down, down_bias, offsets, x[:count], None, "", False)[0]

    for blocks, multiply in (("many shallow blocks", widen), ("many blocks", narrow)):
        call = partial(lambda m: [m(*of) for of in several][-1], multiply)
        yield Tuning("gemm_tile", f"16 bits, {blocks}", candidates, call)
    few = partial(widen, rows // 128, offsets // 128)
    yield Tuning("gemm_tile", "16 bits, few blocks", FEW_CANDIDATES, few)
    yield Tuning("wgrad_tile", "16 bits", CANDIDATES, lambda: wgrad(hidden, x, up, offsets, True, True)[0])


def compilations(capability: int) -> Iterator[Compilation]:
    """Feed-forward layers of Whisper and HuBERT encoders, forward and backward."""
    calls = {}
    for case, rows, d, dtype in (
        ("tiny", 48000, 384, torch.bfloat16),
        ("tiny, few rows", 400, 384, torch.bfloat16),
        ("large", 48000, 1280, torch.bfloat16),
        ("tiny, float32", 48000, 384, torch.float32),
    ):
        like = torch.empty(0, dtype=dtype, device="meta")
        offsets = like.new_empty(9, dtype=torch.int32)
        x, hidden, scale = like.new_empty(rows, d), like.new_empty(rows, 4 * d), like.new_empty(rows)
        up, down = like.new_empty(8, 4 * d, d), like.new_empty(8, d, 4 * d)
        up_bias, down_bias = like.new_empty(8, 4 * d), like.new_empty(8, d)
        calls |= {
            f"fc1 of {case}": partial(forward, x, up, up_bias, offsets, None, None, "gelu", True),
            f"fc2 of {case}": partial(forward, hidden, down, down_bias, offsets, x, scale, "", True),
            f"gradients of fc1 of {case}": partial(
                backward, hidden, x, up, offsets, scale, hidden, "gelu", True, True, True, True
            ),
        }
    yield from recorded(capability, calls)
    if capability >= TMA_SINCE:
        grad, x, weight, offsets, *_ = calls["gradients of fc1 of tiny"].args
        calls = {
            "fc1 of tiny, block after block": calls["fc1 of tiny"],
            "gradient through fc1 of tiny, block after block": partial(gemm, grad, weight, offsets, x, transposed=True),
        }
        with override(gemm_tile=PERSISTENT_CANDIDATES[0]):
            yield from recorded(capability, calls)
