"""Attention within sequences: one pass over the keys of a sequence with a running softmax, nothing quadratic stored.

A tile is a block of rows of one sequence. Tiles are numbered over the packed rows, so absent and short sequences cost
no empty programs beyond one a sequence; the heads of a tile are neighbours in the launch, so what runs at a time
works on the keys and values of few sequences.
"""

import math

import triton
import triton.language as tl

from mowe_kernels.triton._sequences import find_sequence

LOG2E = tl.constexpr(math.log2(math.e))
RUNTIME = ["num_rows", "sequences"]


@triton.jit
def _find_rows(p_cu_seqlens, sequences, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: head, first row of its sequence, rows of its sequence, its own first row in there."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    sequence, first = find_sequence(p_cu_seqlens, tile, sequences, BLOCK)
    start = tl.load(p_cu_seqlens + sequence)
    return head, start.to(tl.int64), tl.load(p_cu_seqlens + sequence + 1) - start, first


@triton.jit
def _load(
    p, rows, column, PITCH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """COLUMNS of rows of a head, PITCH apart, zeros from `rows` on; WHOLE: all BLOCK of them are there."""
    b_r, b_d = tl.arange(0, BLOCK), column + tl.arange(0, COLUMNS)
    at = b_r[:, None] * PITCH + b_d[None, :]
    if WHOLE and DIM % COLUMNS == 0:
        block = tl.load(p + at)
    elif WHOLE:
        block = tl.load(p + at, mask=(b_d < DIM)[None, :], other=0.0)
    else:
        block = tl.load(p + at, mask=(b_r < rows)[:, None] & (b_d < DIM)[None, :], other=0.0)
    return block


@triton.jit
def _store(p, block, rows, PITCH: tl.constexpr, DIM: tl.constexpr):
    b_r, b_d = tl.arange(0, block.shape[0]), tl.arange(0, block.shape[1])
    there = (b_r < rows)[:, None] & (b_d < DIM)[None, :]
    tl.store(p + b_r[:, None] * PITCH + b_d[None, :], block.to(p.dtype.element_ty), mask=there)


@triton.jit
def _products(
    b_own, p_own, own_rows, b_other, p_other, other_rows, OWN_PITCH: tl.constexpr, OTHER_PITCH: tl.constexpr,
    DIM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """own @ other.T of two blocks of rows, which are both at hand and in memory.

    In float32 there is no matrix instruction and a thread would hold whole rows, more than it has registers for:
    then the columns are taken from memory, a few at a time.
    """
    if p_own.dtype.element_ty == tl.float32:
        b_products = tl.zeros([b_own.shape[0], b_other.shape[0]], tl.float32)
        for column in range(0, DIM, 32):
            b_own_part = _load(p_own, own_rows, column, OWN_PITCH, DIM, b_own.shape[0], 32, False)
            b_other_part = _load(p_other, other_rows, column, OTHER_PITCH, DIM, b_other.shape[0], 32, WHOLE)
            b_products = tl.dot(b_own_part, tl.trans(b_other_part), b_products, input_precision="ieee")
    else:
        b_products = tl.dot(b_own, tl.trans(b_other))
    return b_products


@triton.jit
def _attend(
    b_q, p_q, queries, p_k, keys, b_out, b_sum, b_max, scale, PITCH: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax, in base 2: the next BLOCK_N keys, of which `keys` are left."""
    b_k = _load(p_k, keys, 0, PITCH, DIM, BLOCK_N, BLOCK_D, WHOLE)
    b_scores = _products(b_q, p_q, queries, b_k, p_k, keys, PITCH, PITCH, DIM, WHOLE)
    if not WHOLE:
        b_scores = tl.where((tl.arange(0, BLOCK_N) < keys)[None, :], b_scores, -float("inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
    b_p = tl.exp2(b_scores * scale - b_new_max[:, None])
    b_rescale = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_v = _load(p_k + PITCH // 3, keys, 0, PITCH, DIM, BLOCK_N, BLOCK_D, WHOLE)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")
    return b_out, b_sum, b_new_max


# p_qkv: [num_rows, 3, HEADS, DIM]. p_cu_seqlens: int32 [sequences + 1]. p_out: [num_rows, HEADS, DIM].
# p_lse: float32 [HEADS, num_rows], or None.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_cu_seqlens"])
def varlen_attention_fwd_kernel(
    p_qkv, p_cu_seqlens, p_out, p_lse, num_rows, sequences, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, start, length, first = _find_rows(p_cu_seqlens, sequences, HEADS, BLOCK_M)
    if first >= length:
        return
    WIDTH: tl.constexpr = HEADS * DIM
    PITCH: tl.constexpr = 3 * WIDTH
    row, queries = start + first, length - first
    p_q = p_qkv + row * PITCH + head * DIM
    p_k = p_qkv + start * PITCH + WIDTH + head * DIM
    b_q = _load(p_q, queries, 0, PITCH, DIM, BLOCK_M, BLOCK_D, False)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    base2 = scale * LOG2E
    for _ in range(length // BLOCK_N):
        b_out, b_sum, b_max = _attend(
            b_q, p_q, queries, p_k, BLOCK_N, b_out, b_sum, b_max, base2, PITCH, DIM, BLOCK_D, BLOCK_N, True
        )
        p_k += BLOCK_N * PITCH
    keys = length % BLOCK_N
    if keys > 0:
        b_out, b_sum, b_max = _attend(
            b_q, p_q, queries, p_k, keys, b_out, b_sum, b_max, base2, PITCH, DIM, BLOCK_D, BLOCK_N, False
        )
    _store(p_out + row * WIDTH + head * DIM, b_out / b_sum[:, None], queries, WIDTH, DIM)
    if p_lse is not None:
        b_m = tl.arange(0, BLOCK_M)
        p_own = p_lse + head * num_rows.to(tl.int64) + row
        tl.store(p_own + b_m, (b_max + tl.log2(b_sum)) / LOG2E, mask=b_m < queries)


@triton.jit
def _query_step(
    b_q, b_grad, p_q, p_grad, queries, b_lse, b_delta, p_k, keys, b_grad_q, scale, PITCH: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the next BLOCK_N keys, of which `keys` are left, add to the gradient of the queries."""
    p_v = p_k + PITCH // 3
    b_k = _load(p_k, keys, 0, PITCH, DIM, BLOCK_N, BLOCK_D, WHOLE)
    b_scores = _products(b_q, p_q, queries, b_k, p_k, keys, PITCH, PITCH, DIM, WHOLE)
    b_p = tl.exp2(b_scores * scale - b_lse[:, None])
    if not WHOLE:
        b_p = tl.where((tl.arange(0, BLOCK_N) < keys)[None, :], b_p, 0.0)
    b_v = _load(p_v, keys, 0, PITCH, DIM, BLOCK_N, BLOCK_D, WHOLE)
    b_grad_p = _products(b_grad, p_grad, queries, b_v, p_v, keys, PITCH // 3, PITCH, DIM, WHOLE)
    b_grad_scores = (b_p * (b_grad_p - b_delta[:, None])).to(b_k.dtype)
    return tl.dot(b_grad_scores, b_k, b_grad_q, input_precision="ieee")


# p_grad, p_out: [num_rows, HEADS, DIM]. p_qkv, p_grad_qkv: [num_rows, 3, HEADS, DIM]. p_lse: float32 [HEADS, num_rows].
# p_delta: float32 [HEADS, num_rows], sum(grad * out) of each row, left for the keys.
# p_cu_seqlens: int32 [sequences + 1].
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_cu_seqlens"])
def varlen_attention_bwd_queries_kernel(
    p_grad, p_out, p_qkv, p_lse, p_cu_seqlens, p_delta, p_grad_qkv, num_rows, sequences, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, start, length, first = _find_rows(p_cu_seqlens, sequences, HEADS, BLOCK_M)
    if first >= length:
        return
    WIDTH: tl.constexpr = HEADS * DIM
    PITCH: tl.constexpr = 3 * WIDTH
    row, queries = start + first, length - first
    p_q = p_qkv + row * PITCH + head * DIM
    p_k = p_qkv + start * PITCH + WIDTH + head * DIM
    p_grad += row * WIDTH + head * DIM
    b_grad = _load(p_grad, queries, 0, WIDTH, DIM, BLOCK_M, BLOCK_D, False)
    b_out = _load(p_out + row * WIDTH + head * DIM, queries, 0, WIDTH, DIM, BLOCK_M, BLOCK_D, False)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    b_m = tl.arange(0, BLOCK_M)
    own = head * num_rows.to(tl.int64) + row + b_m
    tl.store(p_delta + own, b_delta, mask=b_m < queries)
    b_lse = tl.load(p_lse + own, mask=b_m < queries, other=0.0) * LOG2E
    b_q = _load(p_q, queries, 0, PITCH, DIM, BLOCK_M, BLOCK_D, False)
    b_grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    base2 = scale * LOG2E
    for _ in range(length // BLOCK_N):
        b_grad_q = _query_step(
            b_q, b_grad, p_q, p_grad, queries, b_lse, b_delta, p_k, BLOCK_N, b_grad_q, base2, PITCH, DIM, BLOCK_D,
            BLOCK_N, True,
        )  # fmt: skip
        p_k += BLOCK_N * PITCH
    keys = length % BLOCK_N
    if keys > 0:
        b_grad_q = _query_step(
            b_q, b_grad, p_q, p_grad, queries, b_lse, b_delta, p_k, keys, b_grad_q, base2, PITCH, DIM, BLOCK_D,
            BLOCK_N, False,
        )  # fmt: skip
    _store(p_grad_qkv + row * PITCH + head * DIM, b_grad_q * scale, queries, PITCH, DIM)


@triton.jit
def _key_step(
    b_k, b_v, p_k, keys, p_q, p_grad, p_lse, p_delta, queries, b_grad_k, b_grad_v, scale, PITCH: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What the next BLOCK_M queries, of which `queries` are left, add to the gradients of the keys and values."""
    WIDTH: tl.constexpr = PITCH // 3
    b_m = tl.arange(0, BLOCK_M)
    b_q = _load(p_q, queries, 0, PITCH, DIM, BLOCK_M, BLOCK_D, WHOLE)
    b_grad = _load(p_grad, queries, 0, WIDTH, DIM, BLOCK_M, BLOCK_D, WHOLE)
    if WHOLE:
        b_lse, b_delta = tl.load(p_lse + b_m), tl.load(p_delta + b_m)
    else:
        b_lse = tl.load(p_lse + b_m, mask=b_m < queries, other=float("inf"))
        b_delta = tl.load(p_delta + b_m, mask=b_m < queries, other=0.0)
    b_scores = _products(b_k, p_k, keys, b_q, p_q, queries, PITCH, PITCH, DIM, WHOLE)
    b_p = tl.exp2(b_scores * scale - (b_lse * LOG2E)[None, :])
    b_grad_v = tl.dot(b_p.to(b_grad.dtype), b_grad, b_grad_v, input_precision="ieee")
    b_grad_p = _products(b_v, p_k + WIDTH, keys, b_grad, p_grad, queries, PITCH, WIDTH, DIM, WHOLE)
    b_grad_scores = (b_p * (b_grad_p - b_delta[None, :])).to(b_q.dtype)
    b_grad_k = tl.dot(b_grad_scores, b_q, b_grad_k, input_precision="ieee")
    return b_grad_k, b_grad_v


# Pointers as in `varlen_attention_bwd_queries_kernel`, which has filled p_delta.
@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=["p_cu_seqlens"])
def varlen_attention_bwd_keys_kernel(
    p_grad, p_qkv, p_lse, p_delta, p_cu_seqlens, p_grad_qkv, num_rows, sequences, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, start, length, first = _find_rows(p_cu_seqlens, sequences, HEADS, BLOCK_N)
    if first >= length:
        return
    WIDTH: tl.constexpr = HEADS * DIM
    PITCH: tl.constexpr = 3 * WIDTH
    own, keys = (start + first) * PITCH + WIDTH + head * DIM, length - first
    p_k = p_qkv + own
    b_k = _load(p_k, keys, 0, PITCH, DIM, BLOCK_N, BLOCK_D, False)
    b_v = _load(p_k + WIDTH, keys, 0, PITCH, DIM, BLOCK_N, BLOCK_D, False)
    b_grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    p_q = p_qkv + start * PITCH + head * DIM
    p_grad += start * WIDTH + head * DIM
    p_lse += head * num_rows.to(tl.int64) + start
    p_delta += head * num_rows.to(tl.int64) + start
    base2 = scale * LOG2E
    for _ in range(length // BLOCK_M):
        b_grad_k, b_grad_v = _key_step(
            b_k, b_v, p_k, keys, p_q, p_grad, p_lse, p_delta, BLOCK_M, b_grad_k, b_grad_v, base2, PITCH, DIM, BLOCK_D,
            BLOCK_M, True,
        )  # fmt: skip
        p_q += BLOCK_M * PITCH
        p_grad += BLOCK_M * WIDTH
        p_lse += BLOCK_M
        p_delta += BLOCK_M
    queries = length % BLOCK_M
    if queries > 0:
        b_grad_k, b_grad_v = _key_step(
            b_k, b_v, p_k, keys, p_q, p_grad, p_lse, p_delta, queries, b_grad_k, b_grad_v, base2, PITCH, DIM, BLOCK_D,
            BLOCK_M, False,
        )  # fmt: skip
    _store(p_grad_qkv + own, b_grad_k * scale, keys, PITCH, DIM)
    _store(p_grad_qkv + own + WIDTH, b_grad_v, keys, PITCH, DIM)
