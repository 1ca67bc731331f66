"""Products of packed rows with each group's own matrix, and the products over rows that give its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from mowe_kernels.triton._device import add_product, find_tile, gelu, gelu_grad
from mowe_kernels.triton._epilogue import write


@triton.jit
def load_block(source, row, col, row_stop, COLS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """Block [BR, BC] at (row, col) of a row-major matrix of COLS columns, zeros past row_stop and past its columns.

    source: a pointer, or with TMA a descriptor; then past row_stop the matrix's further rows are read.
    """
    if TMA:
        block = source.load([tl.cast(row, tl.int32), col])
    else:
        rows, cols = tl.arange(0, BR), tl.arange(0, BC)
        pointers = source + tl.cast(row, tl.int64) * COLS + col + rows[:, None] * COLS + cols[None, :]
        there = (rows < row_stop - row)[:, None]
        if COLS % BC != 0:
            there = there & (cols < COLS - col)[None, :]
        block = tl.load(pointers, mask=there, other=0.0)
    return block


@triton.jit
def halves(block):
    """The left and the right columns of a block."""
    return block.reshape(block.shape[0], 2, block.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def finish(
    acc,
    p_bias,
    p_residual,
    p_scale,
    p_through,
    p_pre,
    p_out,
    group,
    row,
    stop,
    col,
    N: tl.constexpr,
    GELU: tl.constexpr,
):
    """What follows a product, on its block [BM, BN] at (row, col)."""
    first = tl.cast(row, tl.int64) * N
    write(
        acc,
        None if p_bias is None else p_bias + group * N,
        None if p_residual is None else p_residual + first,
        None if p_pre is None else p_pre + first,
        p_out + first,
        stop - row,
        col,
        N,
        N,
        GELU,
        p_scale=None if p_scale is None else p_scale + row,
        p_through=None if p_through is None else p_through + first,
    )


@triton.jit
def find_block(
    number, num_rows, p_offsets, E: tl.constexpr, BE: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """(group, first row, one past the group's last row, first column) of a block of the products.

    Blocks are walked in bands of BAND row tiles, within a band column by column, so that those computed together share
    rows and columns in the cache.
    """
    col_tiles: tl.constexpr = (N + BN - 1) // BN
    band = number // (BAND * col_tiles)
    band_tiles = tl.minimum(num_rows // BM + E - band * BAND, BAND)
    place = number % (BAND * col_tiles)
    group, row, stop = find_tile(p_offsets, band * BAND + place % band_tiles, BM, E, BE)
    return group, row, stop, place // band_tiles * BN


@triton.jit
def multiply_block(
    a, w, p_bias, p_residual, p_scale, p_through, p_pre, p_out, group, row, stop, col, N: tl.constexpr,
    K: tl.constexpr, TRANSPOSED: tl.constexpr, GELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of `grouped_gemm_kernel`, with what follows the products."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        b_a = load_block(a, row, k, stop, K, BM, BK, TMA)
        if TRANSPOSED:
            b_w = load_block(w, group * K + k, col, group * K + K, N, BK, BN, TMA)
        else:
            b_w = load_block(w, group * N + col, k, group * N + N, K, BN, BK, TMA).T
        acc = add_product(acc, b_a, b_w)
    left, right = halves(acc)
    quarters = halves(left) + halves(right)
    for i in tl.static_range(4):
        at = col + i * (BN // 4)
        finish(quarters[i], p_bias, p_residual, p_scale, p_through, p_pre, p_out, group, row, stop, at, N, GELU)


# a: [R, K], or its descriptor. w: [E, N, K], or [E, K, N] with TRANSPOSED, or its descriptor as a matrix of E * N
# (E * K) rows. p_bias: [E, N]. p_offsets: int32 [E+1]. p_residual, p_through, p_pre, p_out: [R, N]. p_scale: [R].
# num_rows: R.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["p_offsets"])
def grouped_gemm_kernel(
    a,
    w,
    p_bias,
    p_offsets,
    p_residual,
    p_scale,
    p_through,
    p_pre,
    p_out,
    num_rows,
    E: tl.constexpr,
    BE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """out = scale * act(a @ w[e].T + bias[e]) * gelu'(through) + residual; pre is kept before the activation.

    A program computes one block or, with PERSISTENT, one after the other: the loop over both blocks and summands is one
    loop to the compiler, so that the next block's first operands are under way while this one is finished.
    """
    if PERSISTENT:
        blocks = (num_rows // BM + E) * ((N + BN - 1) // BN)
        for number in tl.range(tl.program_id(0), blocks, tl.num_programs(0), flatten=True):
            # One without rows is computed for nothing: a condition would keep the loops apart.
            group, row, stop, col = find_block(number, num_rows, p_offsets, E, BE, N, BM, BN, BAND)
            multiply_block(
                a, w, p_bias, p_residual, p_scale, p_through, p_pre, p_out, group, row, stop, col, N, K, TRANSPOSED,
                GELU, BM, BN, BK, TMA,
            )  # fmt: skip
    else:
        group, row, stop, col = find_block(tl.program_id(0), num_rows, p_offsets, E, BE, N, BM, BN, BAND)
        if row < stop:
            multiply_block(
                a, w, p_bias, p_residual, p_scale, p_through, p_pre, p_out, group, row, stop, col, N, K, TRANSPOSED,
                GELU, BM, BN, BK, TMA,
            )  # fmt: skip


@triton.jit
def store_sum(value, p_parts, p_out, at, there, group, part, in_parts, SIZE: tl.constexpr):
    """Store a sum over rows: in the group's place of p_out, or as a part where the group has several."""
    if in_parts:
        tl.store(p_parts + tl.cast(part, tl.int64) * SIZE + at, value, mask=there)
    else:
        tl.store(p_out + group.to(tl.int64) * SIZE + at, value.to(p_out.dtype.element_ty), mask=there)


# p_g: [R, N]. p_x: [R, K]. p_offsets: int32 [E+1]. p_weight: [E, N, K]. p_bias: [E, N].
# p_weight_parts: fp32, at least [2 * R // chunk, N, K]. p_bias_parts: fp32, at least [2 * R // chunk, N].
@triton.jit(do_not_specialize=["chunk"], do_not_specialize_on_alignment=["p_offsets"])
def grouped_wgrad_kernel(
    p_g,
    p_x,
    p_offsets,
    p_weight,
    p_bias,
    p_weight_parts,
    p_bias_parts,
    chunk,
    E: tl.constexpr,
    BE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """weight = g.T @ x and bias = the sums of g, of every group; in parts, where a group has more than `chunk` rows.

    A program owns a block of one chunk's product, or the sums of some of its columns. The parts of a group with more
    than one chunk start at 2 * (its first row) // chunk: there are never more parts than that leaves room for.
    """
    k_tiles: tl.constexpr = (K + BK - 1) // BK if p_weight is not None else 0
    across: tl.constexpr = k_tiles if p_bias is None else k_tiles + 1
    tiles: tl.constexpr = (N + BN - 1) // BN * across
    group, start, stop = find_tile(p_offsets, tl.program_id(0) // tiles, chunk, E, BE)
    group_start = tl.load(p_offsets + group)
    if start >= stop and start > group_start:  # an empty group's first program goes on: it owes zeros
        return
    n = tl.program_id(0) % tiles // across * BN
    k = tl.program_id(0) % across * BK
    end = tl.minimum(start + chunk, stop)
    ns = n + tl.arange(0, BN)
    part = 2 * group_start // chunk + (start - group_start) // chunk
    in_parts = stop - group_start > chunk
    if p_weight is not None and k < k_tiles * BK:
        acc = tl.zeros((BN, BK), dtype=tl.float32)
        for row in range(start, end, BM):
            b_g = load_block(p_g, row, n, end, N, BM, BN, False)
            b_x = load_block(p_x, row, k, end, K, BM, BK, False)
            acc = add_product(acc, b_g.T, b_x)
        ks = k + tl.arange(0, BK)
        at, there = ns[:, None] * K + ks[None, :], (ns < N)[:, None] & (ks < K)[None, :]
        store_sum(acc, p_weight_parts, p_weight, at, there, group, part, in_parts, N * K)
    elif p_bias is not None:
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        for row in range(start, end, BM):
            sums += load_block(p_g, row, n, end, N, BM, BN, False).to(tl.float32)
        store_sum(tl.sum(sums, 0), p_bias_parts, p_bias, ns, ns < N, group, part, in_parts, N)


# p_parts: fp32, at least [2 * R // chunk, M]. p_offsets: int32 [E+1]. p_out: [E, M].
@triton.jit(do_not_specialize=["chunk"], do_not_specialize_on_alignment=["p_offsets"])
def grouped_wgrad_reduce_kernel(p_parts, p_offsets, p_out, chunk, M: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the parts of every group that has more than one."""
    blocks: tl.constexpr = (M + BLOCK - 1) // BLOCK
    group = tl.program_id(0) // blocks
    start, stop = tl.load(p_offsets + group), tl.load(p_offsets + group + 1)
    if stop - start <= chunk:
        return
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    first = 2 * start // chunk
    for part in range(first, first + (stop - start + chunk - 1) // chunk):
        acc += tl.load(p_parts + tl.cast(part, tl.int64) * M + cols, mask=cols < M, other=0.0)
    tl.store(p_out + group.to(tl.int64) * M + cols, acc.to(p_out.dtype.element_ty), mask=cols < M)


# p_grad, p_pre, p_out: [R, N]. p_scale, p_scale_grad: [R]. p_total: int32 [1], the rows there are.
@triton.jit(do_not_specialize_on_alignment=["p_total"])
def through_epilogue_kernel(
    p_grad,
    p_pre,
    p_scale,
    p_total,
    p_out,
    p_scale_grad,
    N: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out = grad * scale * act'(pre), the gradient of the product; scale_grad = the sums of grad * act(pre) by row."""
    NARROW: tl.constexpr = p_grad.dtype.element_ty != tl.float32
    row, total = tl.program_id(0) * BM, tl.load(p_total)
    if row >= total:
        return
    rows = row + tl.arange(0, BM)
    if p_scale is not None:
        scale = tl.load(p_scale + rows, mask=rows < total, other=0.0).to(tl.float32)[:, None]
    along = tl.zeros((BM, BN), dtype=tl.float32)
    for col in range(0, N, BN):
        cols = col + tl.arange(0, BN)
        at = rows.to(tl.int64)[:, None] * N + cols[None, :]
        there = (rows < total)[:, None] & (cols < N)[None, :]
        g = tl.load(p_grad + at, mask=there, other=0.0).to(tl.float32)
        if p_pre is not None:
            pre = tl.load(p_pre + at, mask=there, other=0.0).to(tl.float32)
        if p_scale_grad is not None:
            along += g * (gelu(pre, NARROW) if GELU else pre)
        if p_out is not None:
            if p_scale is not None:
                g *= scale
            if GELU:
                g *= gelu_grad(pre, NARROW)
            tl.store(p_out + at, g.to(p_out.dtype.element_ty), mask=there)
    if p_scale_grad is not None:
        tl.store(p_scale_grad + rows, tl.sum(along, 1).to(p_scale_grad.dtype.element_ty), mask=rows < total)
