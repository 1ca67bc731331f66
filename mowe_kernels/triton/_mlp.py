"""The feed-forward half of a transformer layer in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from mowe_kernels.triton._device import add_product, find_tile, gelu
from mowe_kernels.triton._gemm import finish, halves, load_block


@triton.jit
def normalise_rows(
    p_x,
    p_weight,
    p_bias,
    p_out,
    group,
    row,
    stop,
    eps,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """out = LayerNorm(x) for the BM rows from `row` on, BD columns at a time."""
    mean = tl.zeros((BM,), dtype=tl.float32)
    for col in range(0, D, BD):
        mean += tl.sum(load_block(p_x, row, col, stop, D, BM, BD, False).to(tl.float32), 1) / D
    variance = tl.zeros((BM,), dtype=tl.float32)
    for col in range(0, D, BD):
        centred = load_block(p_x, row, col, stop, D, BM, BD, False).to(tl.float32) - mean[:, None]
        variance += tl.sum(tl.where((col + tl.arange(0, BD) < D)[None, :], centred * centred, 0.0), 1) / D
    rstd = 1.0 / tl.sqrt(variance + eps)
    for col in range(0, D, BD):
        cols = col + tl.arange(0, BD)
        b_weight = tl.load(p_weight + group * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + group * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        h = (load_block(p_x, row, col, stop, D, BM, BD, False).to(tl.float32) - mean[:, None]) * rstd[:, None]
        h = h * b_weight[None, :] + b_bias[None, :]
        at = tl.arange(0, BM)[:, None] * D + cols[None, :]
        there = (tl.arange(0, BM) < stop - row)[:, None] & (cols < D)[None, :]
        tl.store(p_out + row.to(tl.int64) * D + at, h.to(p_out.dtype.element_ty), mask=there)


# p_x, p_out: [R, D]. p_norm_weight, p_norm_bias: [E, D]. p_fc1: [E, F, D]. p_fc1_bias: [E, F]. p_fc2: [E, D, F].
# p_fc2_bias: [E, D]. p_offsets: int32 [E+1].
@triton.jit(do_not_specialize_on_alignment=["p_offsets"])
def grouped_mlp_fwd_kernel(
    p_x,
    p_norm_weight,
    p_norm_bias,
    fc1,
    p_fc1_bias,
    fc2,
    p_fc2_bias,
    p_offsets,
    p_out,
    eps,
    E: tl.constexpr,
    BE: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """out = x + fc2(gelu(fc1(LayerNorm(x)))) for BM rows, BF hidden values of each at a time.

    The D columns are handled in pieces of BD, so that only the last one is padded.
    """
    pieces: tl.constexpr = (D + BD - 1) // BD
    group, row, stop = find_tile(p_offsets, tl.program_id(0), BM, E, BE)
    if row >= stop:
        return
    if p_norm_weight is not None:
        # The normed rows pass through `out`, where their result will lie: what is loaded can be multiplied out of
        # shared memory, what is computed would stay in registers that the sums need.
        normalise_rows(p_x, p_norm_weight, p_norm_bias, p_out, group, row, stop, eps, D, BM, BD)
        tl.debug_barrier()
        p_rows = p_out
    else:
        p_rows = p_x
    hs = ()
    for i in tl.static_range(pieces):
        hs += (load_block(p_rows, row, i * BD, stop, D, BM, BD, False),)
    accs = ()
    for _ in tl.static_range(pieces):
        accs += (tl.zeros((BM, BD), dtype=tl.float32),)
    for f in range(0, F, BF):
        pre = tl.zeros((BM, BF), dtype=tl.float32)
        for i in tl.static_range(pieces):
            b_w = load_block(fc1, group * F + f, i * BD, group * F + F, D, BF, BD, TMA)
            pre = add_product(pre, hs[i], b_w.T)
        fs = f + tl.arange(0, BF)
        pre += tl.load(p_fc1_bias + group * F + fs, mask=fs < F, other=0.0).to(tl.float32)[None, :]
        hidden = gelu(pre, p_out.dtype.element_ty != tl.float32).to(hs[0].dtype)
        sums = ()
        for i in tl.static_range(pieces):
            b_w = load_block(fc2, group * D + i * BD, f, group * D + D, F, BD, BF, TMA)
            sums += (add_product(accs[i], hidden, b_w.T),)
        accs = sums
    for i in tl.static_range(pieces):
        left, right = halves(accs[i])
        quarters = halves(left) + halves(right)
        for j in tl.static_range(4):
            col = i * BD + j * (BD // 4)
            finish(quarters[j], p_fc2_bias, p_x, None, None, None, p_out, group, row, stop, col, D, False)
