"""The fastest launch settings, and the fastest attention, of those that give the right result."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

import mowe_kernels as mk
from mowe_kernels import attention
from mowe_kernels.tables import AttentionChoice
from mowe_kernels.triton import grouped_linear, grouped_linear_nf4, varlen_attention
from mowe_kernels.triton._launch import Tuning, override

Timer = Callable[[Callable[[], Any]], float]
# What a setting must gain over the one chosen without a table: less is within what two runs differ by.
GAIN = 0.03
UNCHANGED = object()
ROWS = 48_000  # of a batch of 32 clips of 30 s at 50 Hz
LONGEST = (256, 1024, None)
HEAD_DIMS = (64, 80)
ROWS_A_GROUP = (16, 64, 128, 256, 512, 1024, 2048)


def device_timer(call: Callable[[], Any]) -> float:
    """Milliseconds of a call on the current CUDA device, the median of many."""
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=40, return_mode="median")


def tunings(ops: Sequence[str], device: torch.device, rows: int = ROWS) -> Iterator[Tuning]:
    """Of those of the ops that name any."""
    for op in ops:
        module = importlib.import_module(f"mowe_kernels.triton.{op}")
        if hasattr(module, "tunings"):
            yield from module.tunings(device, rows)
    if {"grouped_linear", "grouped_linear_nf4"} <= set(ops):
        yield few_rows_in_4_bits(device)


def few_rows_in_4_bits(device: torch.device, width: int = 384, counts: Sequence[int] = ROWS_A_GROUP) -> Tuning:
    """Up to how many rows a group a product takes its weights out of 4 bits in its own loop.

    Timed is the first linear layer of the feed-forward half of eight Whisper-tiny (`width` 384), over all of these
    counts of rows a group, each the way the figure says.
    """
    weight = torch.randn(8, 4 * width, width, dtype=torch.bfloat16, device=device) / 20
    matrix, bias = mk.nf4_quantize(weight, double_quant=True).matrix, weight[:, :, 0].contiguous()
    x = torch.randn(8 * counts[-1], width, dtype=torch.bfloat16, device=device)
    offsets = torch.arange(9, dtype=torch.int32, device=device)

    def multiply(count: int) -> Tensor:
        rows, each = x[: 8 * count], count * offsets
        if count <= grouped_linear_nf4.few_rows(x):
            return grouped_linear_nf4.forward(rows, *matrix[:5], [*matrix[5:]], bias, each, None, "gelu")
        (full,) = mk.nf4_dequantize_grouped([matrix], each, x.dtype)
        return grouped_linear.forward(rows, full, bias, each, None, None, "gelu", False)[0]

    # A figure lies between two counts; past all of them nothing is known.
    figures = (0, *((a + b) // 2 for a, b in pairwise(counts)), counts[-1])
    return Tuning("nf4_few_rows", "16 bits", figures, lambda: torch.cat([multiply(count) for count in counts]))


def compile_candidates(ops: Sequence[str], device: torch.device) -> None:
    """Call every candidate of these ops once: what Triton compiles for one process, others find in its cache."""
    for tuning in tunings(ops, device):
        for candidate in tuning.candidates:
            with override(**{tuning.name: candidate}), suppress(Exception):  # `best` leaves those out that fail
                tuning.call()


def best(tuning: Tuning, timer: Timer, deadline: float = float("inf")) -> tuple[Any, float, float]:
    """The setting that is worth a place in the table or UNCHANGED; its time, and that without a table.

    deadline: on the clock `time.monotonic`, when to stop with what was found.
    """
    expected = tuning.call()
    plain = fastest = timer(tuning.call)
    chosen: Any = UNCHANGED
    for candidate in tuning.candidates:
        if time.monotonic() > deadline:
            break
        with override(**{tuning.name: candidate}):
            try:
                right = agree(tuning.call(), expected)
                took = timer(tuning.call) if right else float("inf")
            except Exception:  # more shared memory or registers than there are; whatever it is, it is not for the table
                continue
        if took < min(fastest, (1 - GAIN) * plain):
            chosen, fastest = candidate, took
    return chosen, fastest, plain


def agree(value: Tensor, expected: Tensor) -> bool:
    """Whether two computations in one type differ by their rounding alone."""
    difference = (value.float() - expected.float()).norm()
    return bool(difference <= 2 * torch.finfo(value.dtype).eps * expected.float().norm())


def attention_choices(device: torch.device, timer: Timer, rows: int = ROWS) -> Iterator[AttentionChoice]:
    """Who is fastest, for heads of each size, sequences of each length, and sequences of one length."""
    for head_dim in HEAD_DIMS:
        for longest in LONGEST:
            for equal in (False, True):
                yield _attention_choice(device, timer, rows, head_dim, longest, equal)


def _attention_choice(
    device: torch.device, timer: Timer, rows: int, head_dim: int, longest: int | None, equal: bool
) -> AttentionChoice:
    length = min(longest or varlen_attention.WINDOW, rows)
    lengths = [length] * (rows // length) if equal else varlen_attention.uneven(rows, length)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
    qkv = torch.randn(sum(lengths), 3, 384 // head_dim, head_dim, dtype=torch.bfloat16, device=device)
    arguments = cu_seqlens, length, head_dim**-0.5
    modules = {name: importlib.import_module(path) for name, path in attention.BACKENDS.items()}
    able = {name: m for name, m in modules.items() if m.supports(qkv, length, arguments[2], equal)}
    kernel = able.pop(attention.KERNEL)
    out, lse = kernel.forward(qkv, *arguments, True)
    grad = kernel.backward(out, qkv, out, lse, *arguments)
    found = {}
    for direction, expected, call in (
        ("forward", out, lambda m: m.forward(qkv, *arguments, True, equal)[0]),
        ("backward", grad, lambda m: m.backward(out, qkv, out, lse, *arguments, equal)),
    ):
        found[direction], fastest = attention.KERNEL, (1 - GAIN) * timer(lambda call=call: call(kernel))
        for name, module in able.items():
            try:
                right = agree(call(module), expected)
                took = timer(lambda call=call, module=module: call(module)) if right else float("inf")
            except Exception:  # not built for this device, say
                continue
            if took < fastest:
                found[direction], fastest = name, took
    return AttentionChoice(head_dim, longest, equal, **found)
