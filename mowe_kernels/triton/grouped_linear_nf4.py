"""Triton `grouped_linear_nf4`: the weights leave 4 bits block by block, in the loop of the product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mowe_kernels.reference.nf4_nested import NESTED_BLOCKSIZE
from mowe_kernels.reference.nf4_quantize import NF4_CODE
from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._device import add_product, find_tile
from mowe_kernels.triton._gemm import finish, load_block
from mowe_kernels.triton._launch import (
    Programs,
    Tuning,
    cdiv,
    check_dtypes,
    contiguous,
    hardware,
    launch,
    next_power_of_2,
    recorded,
    setting,
)
from mowe_kernels.triton.grouped_linear import Tile

TILE = Tile(64, 64, 64, 4, 3)  # for few rows
CANDIDATES = (
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 32, 128, 4, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 64, 8, 3),
)
FEW_ROWS = 500  # without a measured figure: where bitsandbytes' own kernels change over


def forward(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    nested_code: Tensor,
    sizes: list[int],
    bias: Tensor | None,
    group_offsets: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    check_dtypes("grouped_linear_nf4", x)
    x, codes, absmax, bias, group_offsets, residual = contiguous(x, codes, absmax, bias, group_offsets, residual)
    nested = contiguous(nested_absmax, nested_offset, nested_code) if nested_absmax.numel() else [None] * 3
    (rows, k), (n, _, blocksize), experts = x.shape, sizes, codes.shape[0]
    out = x.new_empty(rows, n)
    tile = setting("nf4_tile", TILE, hardware(x.device), f"{8 * x.itemsize} bits")
    launch(
        grouped_gemm_nf4_kernel, Programs(rows, tile.rows, experts, cdiv(n, tile.cols)) if rows else 0,
        x, codes, code(x.device), absmax, *nested, bias, group_offsets, residual, out,
        E=experts, BE=next_power_of_2(experts), N=n, K=k, BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
        GELU=activation == "gelu", BM=tile.rows, BN=tile.cols, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, matmul=x.itemsize == 2,
    )  # fmt: skip
    return out


def few_rows(x: Tensor) -> int:
    """Rows a group, on average, up to which this is faster than full weights written once and read by every block."""
    return setting("nf4_few_rows", FEW_ROWS, hardware(x.device), f"{8 * x.itemsize} bits")


@cache
def code(device: torch.device) -> Tensor:
    """The sixteen values, which the kernel reads on its device."""
    return NF4_CODE.to(device)


# p_x: [R, K], K even. p_codes: uint8 [E, ceil(N * K / 2)]. p_code: fp32 [16]. p_absmax: [E, blocks], fp32, or uint8
# with p_nested_absmax: fp32 [E, nested blocks], p_nested_offset: fp32 [E] and p_nested_code: fp32 [E, 256].
# p_bias: [E, N]. p_offsets: int32 [E+1]. p_residual, p_out: [R, N].
@triton.jit(do_not_specialize_on_alignment=["p_offsets"])
def grouped_gemm_nf4_kernel(
    p_x,
    p_codes,
    p_code,
    p_absmax,
    p_nested_absmax,
    p_nested_offset,
    p_nested_code,
    p_bias,
    p_offsets,
    p_residual,
    p_out,
    E: tl.constexpr,
    BE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = act(x @ w[e].T + bias[e]) + residual, w in the type of x. As K is even, a byte has two values of a row."""
    blocks: tl.constexpr = (N * K + BLOCKSIZE - 1) // BLOCKSIZE
    nested_blocks: tl.constexpr = (blocks + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    col_tiles: tl.constexpr = (N + BN - 1) // BN
    group, row, stop = find_tile(p_offsets, tl.program_id(0) // col_tiles, BM, E, BE)
    if row >= stop:
        return
    col = tl.program_id(0) % col_tiles * BN
    p_group_codes = p_codes + group.to(tl.int64) * ((N * K + 1) // 2)
    p_group_absmax = p_absmax + group.to(tl.int64) * blocks
    if p_nested_absmax is not None:
        offset = tl.load(p_nested_offset + group)
    n = col + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        b_x = load_block(p_x, row, k, stop, K, BM, BK, False)
        b_byte = (n[:, None] * K + k) // 2 + tl.arange(0, BK // 2)[None, :]
        there = (n < N)[:, None] & (k + 2 * tl.arange(0, BK // 2) < K)[None, :]
        b_codes = tl.load(p_group_codes + b_byte, mask=there, other=0).to(tl.int32)
        b_block = 2 * b_byte // BLOCKSIZE
        b_scale = tl.load(p_group_absmax + b_block, mask=there, other=0)
        if p_nested_absmax is not None:
            p_nested = p_nested_absmax + group * nested_blocks + b_block // NESTED_BLOCKSIZE
            b_scale = tl.load(p_nested_code + group * 256 + b_scale.to(tl.int32))
            b_scale = b_scale * tl.load(p_nested, mask=there, other=0.0) + offset
        b_first = tl.load(p_code + (b_codes >> 4)) * b_scale
        b_second = tl.load(p_code + (b_codes & 15)) * b_scale
        b_w = tl.join(b_first, b_second).reshape(BN, BK).to(b_x.dtype)
        acc = add_product(acc, b_x, b_w.T)
    finish(acc, p_bias, p_residual, None, None, None, p_out, group, row, stop, col, N, GELU)


def tunings(device: torch.device, rows: int) -> Iterator[Tuning]:
    """The first linear layer of a Whisper-tiny's feed-forward half over few rows, scales in 8 bits."""
    each, d, n = min(rows // 8, 128), 384, 1536
    x = torch.randn(8 * each, d, dtype=torch.bfloat16, device=device)
    codes, absmax = (
        torch.randint(256, (8, count), dtype=torch.uint8, device=device) for count in (n * d // 2, n * d // 64)
    )
    nested = [torch.rand(8, *shape, device=device) / 20 for shape in ((n * d // 64 // 256,), (), (256,))]
    offsets = torch.arange(9, dtype=torch.int32, device=device) * each
    bias = x[:8].repeat(1, n // d)
    call = partial(forward, x, codes, absmax, *nested, [n, d, 64], bias, offsets, None, "gelu")
    yield Tuning("nf4_tile", "16 bits", CANDIDATES, call)


def compilations(capability: int) -> Iterator[Compilation]:
    """The first linear layer of the feed-forward half of Whisper encoders, over a few seconds of audio."""
    calls = {}
    for case, d, nested in (("tiny", 384, False), ("tiny, nested", 384, True), ("large, nested", 1280, True)):
        x = torch.empty(400, d, dtype=torch.bfloat16, device="meta")
        n, blocks = 4 * d, 4 * d * d // 64

        def call(x=x, n=n, blocks=blocks, nested=nested):
            e, d = 8, x.shape[1]
            floats = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
            codes = x.new_empty(e, n * d // 2, dtype=torch.uint8)
            absmax = codes.new_empty(e, blocks) if nested else floats(e, blocks)
            scales = (floats(e, -(-blocks // 256)), floats(e), floats(e, 256)) if nested else (floats(0),) * 3
            offsets = x.new_empty(e + 1, dtype=torch.int32)
            forward(x, codes, absmax, *scales, [n, d, 64], x.new_empty(e, n), offsets, None, "gelu")

        calls[case] = call
    yield from recorded(capability, calls)
