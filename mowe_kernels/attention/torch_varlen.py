"""`varlen_attention` by `torch.nn.attention.varlen`, which is FlashAttention-2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

_switching = Lock()  # the switch is the process's, and autograd has a thread for every GPU


def supports(qkv: Tensor, max_seqlen: int, scale: float, equal_lengths: bool) -> bool:
    return qkv.device.type == "cuda" and qkv.itemsize == 2 and qkv.shape[-1] % 8 == 0


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, save_lse: bool, equal_lengths: bool = False
) -> tuple[Tensor, Tensor]:
    asked = {"return_aux": varlen.AuxRequest(lse=True), "scale": scale, **_whole_keys()}
    out, lse = varlen.varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **asked)
    return out, lse if save_lse else qkv.new_empty(0)


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
    # torch has no public name for it: its own gradient of `varlen_attn` calls this.
    no_dropout = qkv.new_zeros(2, dtype=torch.uint64), qkv.new_empty(0)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    with _switching, _deterministic():
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *qkv.unbind(1), out, lse, *lengths, 0.0, False, *no_dropout, scale=scale
        )
    return torch.stack(grads, 1)


@cache
def _whole_keys() -> dict[str, Any]:
    """Never split the keys of a sequence: how many parts there are would depend on the rest of the batch."""
    return {"num_splits": 1} if "num_splits" in signature(varlen.varlen_attn).parameters else {}


@contextmanager
def _deterministic() -> Iterator[None]:
    """Without this switch the gradient of the queries is summed up in the order of arrival."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = enabled and fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
