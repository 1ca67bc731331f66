"""`varlen_attention` by the package flash-attn (2.7 or newer), where it is installed."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def _flash() -> ModuleType | None:
    try:
        module = importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError):  # not there, or built for another torch
        return None
    return module if hasattr(module, "_wrapped_flash_attn_varlen_backward") else None  # since 2.7


def supports(qkv: Tensor, max_seqlen: int, scale: float, equal_lengths: bool) -> bool:
    fits = qkv.device.type == "cuda" and qkv.itemsize == 2 and qkv.shape[-1] % 8 == 0
    return fits and _flash() is not None


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, save_lse: bool, equal_lengths: bool = False
) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    out, lse, *_ = _flash()._wrapped_flash_attn_varlen_forward(
        *qkv.unbind(1), *lengths, dropout_p=0.0, softmax_scale=scale, causal=False
    )
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
    grad_qkv = torch.empty_like(qkv)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    _flash()._wrapped_flash_attn_varlen_backward(
        grad.contiguous(), *qkv.unbind(1), out, lse, *grad_qkv.unbind(1), *lengths,
        dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    return grad_qkv
