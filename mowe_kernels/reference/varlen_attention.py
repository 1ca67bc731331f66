"""Plain torch `varlen_attention`: one sequence at a time, no padding; the CPU has torch's fused kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.reference._rows import assemble, clear_tail, groups

# Elements of a block of scores [heads, T, T] held at a time where the scores are materialised.
_SCORES = 1 << 22


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, save_lse: bool, equal_lengths: bool = False
) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    if not save_lse:
        attended = ((seq, _attend(qkv[seq], scale)) for _, seq in groups(cu_seqlens, rows))
        return assemble((rows, heads, head_dim), qkv, attended), qkv.new_empty(0)
    out = qkv.new_empty(rows, heads, head_dim)
    lse = qkv.new_zeros(heads, rows, dtype=accumulation_dtype(qkv.dtype))
    if not _fused(qkv):
        for seq, block in _blocks(cu_seqlens, rows, heads):
            q, k, v = _heads(qkv[seq, :, block])
            scores = _scores(q, k, scale)
            lse[block, seq] = scores.logsumexp(-1)
            probabilities = scores.sub_(lse[block, seq, None]).exp_()
            out[seq, block] = (probabilities.to(v.dtype) @ v).transpose(0, 1)
        return clear_tail(out, cu_seqlens), lse
    for _, seq in groups(cu_seqlens, rows):
        q, k, v = _heads(qkv[seq].contiguous())  # the fused kernels take columns to lie side by side
        attended, lse[:, seq] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], scale=scale
        )
        out[seq] = attended[0].transpose(0, 1)
    return clear_tail(out, cu_seqlens), lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    equal_lengths: bool = False,
) -> Tensor:
    grad_qkv = qkv.new_empty(qkv.shape)
    if _fused(qkv):
        for _, seq in groups(cu_seqlens, len(qkv)):
            q, k, v = _heads(qkv[seq].contiguous())
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(t[None] for t in (grad[seq].transpose(0, 1), q, k, v, out[seq].transpose(0, 1), lse[:, seq])),
                0.0, False, scale=scale,
            )  # fmt: skip
            for i, part in enumerate(grads):
                grad_qkv[seq, i] = part[0].transpose(0, 1)
        return clear_tail(grad_qkv, cu_seqlens)
    for seq, block in _blocks(cu_seqlens, len(qkv), qkv.shape[2]):
        q, k, v = _heads(qkv[seq, :, block])
        g = grad[seq, block].transpose(0, 1)  # [H, T, Dh]
        probabilities = _scores(q, k, scale).sub_(lse[block, seq, None]).exp_()
        through = (grad[seq, block] * out[seq, block]).sum(-1, dtype=lse.dtype).T[..., None]  # [H, T, 1]
        grad_scores = (g @ v.mT).to(lse.dtype).sub_(through).mul_(probabilities).mul_(scale).to(q.dtype)
        for i, part in enumerate((grad_scores @ k, grad_scores.mT @ q, probabilities.to(g.dtype).mT @ g)):
            grad_qkv[seq, i, block] = part.transpose(0, 1)
    return clear_tail(grad_qkv, cu_seqlens)


def _attend(qkv: Tensor, scale: float) -> Tensor:
    """[T, 3, H, Dh] -> [T, H, Dh]."""
    q, k, v = _heads(qkv)
    attended = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)
    return attended[0].transpose(0, 1)


def _fused(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu"


def _blocks(cu_seqlens: Tensor, rows: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """(sequence, some of its heads), so many that their scores stay small."""
    for _, seq in groups(cu_seqlens, rows):
        size = max(1, _SCORES // (seq.stop - seq.start) ** 2)
        for head in range(0, heads, size):
            yield seq, slice(head, min(head + size, heads))


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 3, H, Dh] -> three [H, T, Dh]."""
    return qkv.permute(1, 2, 0, 3).unbind(0)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.mT).to(accumulation_dtype(q.dtype)).mul_(scale)
