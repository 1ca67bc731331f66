"""Triton `varlen_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mowe_kernels.triton import _attention
from mowe_kernels.triton._compilation import Compilation
from mowe_kernels.triton._launch import (
    COMPUTES_IN,
    Hardware,
    Launch,
    Programs,
    Tuning,
    check_dtypes,
    contiguous,
    hardware,
    next_power_of_2,
    recorded,
    remembered,
    setting,
)

MOST_COLUMNS = 128  # of a head
WINDOW = 1500  # rows of 30 s by Whisper
KERNELS = {
    "forward": _attention.varlen_attention_fwd_kernel,
    "queries": _attention.varlen_attention_bwd_queries_kernel,
    "keys": _attention.varlen_attention_bwd_keys_kernel,
}


class Settings(NamedTuple):
    """block_m: queries of a block. block_n: keys of a block."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By how dot products are made, for heads of at most 64 columns and for wider ones.
SETTINGS = {
    "scalar": {  # float32 anywhere
        "forward": (Settings(32, 32, 4, 1), Settings(32, 32, 8, 1)),
        "queries": (Settings(16, 32, 8, 1), Settings(16, 32, 8, 1)),
        "keys": (Settings(16, 32, 8, 1), Settings(16, 32, 8, 2)),
    },
    "warp": {  # mma.sync: sm_80, sm_86, sm_89
        "forward": (Settings(128, 32, 4, 3), Settings(128, 32, 8, 3)),
        "queries": (Settings(128, 64, 8, 2), Settings(128, 32, 8, 3)),
        "keys": (Settings(32, 128, 8, 2), Settings(16, 128, 8, 2)),
    },
    "warpgroup": {  # wgmma, tcgen05: sm_90, sm_100
        "forward": (Settings(128, 64, 4, 3), Settings(128, 64, 8, 3)),
        "queries": (Settings(128, 64, 8, 2), Settings(128, 64, 8, 2)),
        "keys": (Settings(64, 128, 8, 2), Settings(32, 128, 8, 2)),
    },
}


# What `tunings` tries.
CANDIDATES = {
    "forward": tuple(
        Settings(*s)
        for s in ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (128, 32, 4, 4))
    ),
    "queries": tuple(Settings(*s) for s in ((128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (128, 32, 8, 3))),
    "keys": tuple(Settings(*s) for s in ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 128, 4, 3))),
}


def choose(kernel: str, dtype: torch.dtype, head_dim: int, device: Hardware) -> Settings:
    """Launch settings of the "forward", "queries" or "keys" kernel."""
    capability = device.capability
    unit = "scalar" if dtype == torch.float32 else "warpgroup" if capability >= 90 else "warp"
    narrow, wide = SETTINGS[unit][kernel]
    chosen = wide if head_dim > 64 else narrow
    if unit == "warp" and kernel == "queries" and head_dim > 64 and (capability > 80 or head_dim == 96):
        chosen = chosen._replace(num_stages=2)  # a third stage takes registers that these need, and some spill
    return setting(f"attention_{kernel}", chosen, device, f"{8 * dtype.itemsize} bits, heads of {head_dim}")


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, save_lse: bool, equal_lengths: bool = False
) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(rows, heads, head_dim)
    lse = qkv.new_empty(heads, rows, dtype=torch.float32) if save_lse else None
    qkv, cu_seqlens = contiguous(qkv, cu_seqlens)
    _start("forward", (qkv, cu_seqlens, out, lse), qkv, cu_seqlens, scale)
    return out, qkv.new_empty(0) if lse is None else lse


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
    grad, qkv, cu_seqlens = contiguous(grad, qkv, cu_seqlens)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    queries = (grad, out, qkv, lse, cu_seqlens, delta, grad_qkv)
    keys = (grad, qkv, lse, delta, cu_seqlens, grad_qkv)
    _start("queries", queries, qkv, cu_seqlens, scale)
    _start("keys", keys, qkv, cu_seqlens, scale)
    return grad_qkv


def supports(qkv: Tensor, max_seqlen: int, scale: float, equal_lengths: bool) -> bool:
    return qkv.dtype in COMPUTES_IN and qkv.shape[-1] <= MOST_COLUMNS and scale > 0


def _start(name: str, pointers: tuple, qkv: Tensor, cu_seqlens: Tensor, scale: float) -> None:
    check_dtypes("varlen_attention", qkv)
    rows, _, heads, head_dim = qkv.shape
    if head_dim > MOST_COLUMNS:
        raise ValueError(
            f"varlen_attention: the Triton kernels take heads of at most {MOST_COLUMNS} columns, got {head_dim}"
        )
    if scale <= 0:
        raise ValueError(f"varlen_attention: the Triton kernels take a positive scale, got {scale}")
    sequences = cu_seqlens.shape[0] - 1
    start, tile = _launch_of(name, qkv.device, qkv.dtype, heads, head_dim)
    start(Programs(rows, tile, sequences, heads) if sequences else 0, *pointers, rows, sequences, scale)


@remembered
def _launch_of(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> tuple[Launch, int]:
    """The launch, and how many rows a program takes."""
    settings = choose(name, dtype, head_dim, hardware(device))
    start = Launch(
        KERNELS[name], HEADS=heads, DIM=head_dim, BLOCK_D=max(16, next_power_of_2(head_dim)), BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n, num_warps=settings.num_warps, num_stages=settings.num_stages,
        matmul=dtype != torch.float32,
    )  # fmt: skip
    return start, settings.block_n if name == "keys" else settings.block_m


def uneven(rows: int, longest: int) -> list[int]:
    """Lengths of sequences, as clips have them: an eighth of the longest and its multiples, while there are rows."""
    lengths: list[int] = []
    while longest and rows - sum(lengths) >= longest:
        lengths.append(max(1, longest * (1 + len(lengths) % 8) // 8))
    return lengths


def tunings(device: torch.device, rows: int) -> Iterator[Tuning]:
    """Six heads over sequences of up to 30 s of Whisper's frames."""
    longest = min(WINDOW, rows)
    lengths = uneven(rows, longest)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
    for head_dim in (64, 80):
        qkv = torch.randn(sum(lengths), 3, 6, head_dim, dtype=torch.bfloat16, device=device)
        arguments = cu_seqlens, longest, head_dim**-0.5
        key = f"16 bits, heads of {head_dim}"

        def attend(qkv: Tensor = qkv, arguments: tuple = arguments) -> Tensor:
            return forward(qkv, *arguments, False)[0]

        yield Tuning("attention_forward", key, CANDIDATES["forward"], attend)
        out, lse = forward(qkv, *arguments, True)
        call = partial(backward, out, qkv, out, lse, *arguments)
        yield Tuning("attention_queries", key, CANDIDATES["queries"], call)
        yield Tuning("attention_keys", key, CANDIDATES["keys"], call)


def compilations(capability: int) -> Iterator[Compilation]:
    def attend(heads: int, head_dim: int, dtype: torch.dtype) -> None:
        qkv = torch.empty(4096, 3, heads, head_dim, dtype=dtype, device="meta")
        cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
        out, lse = forward(qkv, cu_seqlens, 1500, head_dim**-0.5, save_lse=True)
        backward(out, qkv, out, lse, cu_seqlens, 1500, head_dim**-0.5)

    yield from recorded(
        capability,
        {
            f"{heads} heads of {head_dim}, {name}": lambda h=heads, d=head_dim, t=dtype: attend(h, d, t)
            for heads, head_dim in ((8, 32), (6, 64), (16, 80), (8, 96), (8, 128))
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        },
    )
