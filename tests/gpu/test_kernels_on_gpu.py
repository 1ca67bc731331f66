"""The kernels on a CUDA device beside the mixture: offsets past 2^31 elements, peak memory, and the memory checker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mowe_kernels as mk
from mowe_kernels import attention as attention_of_device
from mowe_kernels import csrc, use_backend
from mowe_kernels.triton import _layers, grouped_mlp, varlen_attention
from mowe_kernels.triton._descriptors import TMA_PRODUCTS
from mowe_kernels.triton._launch import hardware, override
from mowe_kernels.tune.accuracy import differentiate
from mowe_kernels.tune.cases import ANALYSIS, HOP, cases
from tests.mowe_kernels.triton.accuracy import DEVICE
from tests.mowe_kernels.triton.test_tune import TINY

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
PAST_2_31 = 2**31 + 2**20
LAST = 100  # rows of the last sequence, and of the last encoder, which lie past all others
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def zeros(elements: int, *widths: int) -> Tensor:
    """So many elements or a few more; all zeros but the last rows."""
    x = torch.zeros(elements // prod(widths) + LAST, *widths, dtype=DTYPE, device=DEVICE)
    x[-LAST:] = torch.randn(LAST, *widths, dtype=DTYPE, device=DEVICE)
    return x


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE) / shape[-1] ** 0.5


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return mk.grouped_linear(x, weight, bias, bounds(x), activation="gelu")


def mlp(x: Tensor, norm: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor) -> Tensor:
    return mk.grouped_mlp(x, norm, norm, fc1, b1, fc2, norm, bounds(x))


def fused_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    """By the fused kernel, though a table may find the parts to be faster."""
    untuned = hardware(x.device)._replace(tuned={})
    with override(mlp_block=grouped_mlp.fused_block(untuned, x.dtype, x.shape[1])):
        return mlp(x, *parameters)


def conv(x: Tensor, weight: Tensor) -> Tensor:
    last = x.shape[0] - LAST
    pairs = {"starts": ints(0, last), "lengths": ints(last, LAST), "encoder": ints(0, 1)}
    return mk.grouped_conv1d(x, weight, None, **pairs, cu_seqlens=bounds(x), num_rows=x.shape[0], padding=1)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return mk.sequence_norm(x, weight, weight, encoder=ints(0, 1), cu_seqlens=bounds(x))


def mean(x: Tensor) -> Tensor:
    last = x.shape[0] - LAST
    return mk.sequence_mean(x, ints(0, last), ints(last, LAST))[1:].expand(LAST, -1)


def attention(qkv: Tensor) -> Tensor:
    """Sequences of at most 1500 rows before the last one."""
    last = qkv.shape[0] - LAST
    return mk.varlen_attention(qkv, ints(*range(0, last, 1500), last, qkv.shape[0]), 1500)


def project(rows: Tensor, base_weight: Tensor, row_weight: Tensor) -> Tensor:
    """One clip, served by the last pair; its base features are the same rows."""
    last, clock = rows.shape[0] - LAST, mk.FrameClock(320, 0)
    return mk.mixture_project(
        rows, [rows], torch.ones(1, 2, device=DEVICE), base_starts=ints(last), base_lengths=ints(LAST),
        row_offsets=[bounds(rows)], position=ints(1, 1)[None], base_weight=base_weight, row_weights=[row_weight],
        bias=None, base_clock=clock, row_clocks=[clock], cu_seqlens=ints(0, LAST), num_rows=LAST, stride=1,
    )  # fmt: skip


def bounds(x: Tensor) -> Tensor:
    return ints(0, x.shape[0] - LAST, x.shape[0])


def far_cases(width: int) -> dict[str, tuple]:
    """The op, the width of its packed rows, its parameters."""
    n = width
    return {
        "grouped_linear": (linear, (n,), (random(2, n, n), random(2, n))),
        "grouped_mlp, fused": (fused_mlp, (n // 4,), _mlp_parameters(n // 4)),
        "grouped_mlp": (mlp, (n,), _mlp_parameters(n)),
        "grouped_layer_norm": (
            lambda x, weight: mk.grouped_layer_norm(x, weight, weight, bounds(x)), (n,), (random(2, n),)
        ),
        "varlen_attention": (attention, (3, 2, 64), ()),
        "grouped_conv1d": (conv, (n,), (random(2, n, 3, n),)),
        "sequence_norm": (norm, (n,), (random(2, n),)),
        "sequence_mean": (mean, (n,), ()),
        "mixture_project": (project, (n,), (random(64, 1, n), random(2, 64, 1, n))),
    }  # fmt: skip


def _mlp_parameters(d: int) -> tuple[Tensor, ...]:
    return random(2, d), random(2, 4 * d, d), random(2, 4 * d), random(2, d, 4 * d)


FAR_WIDTH = 1536 if DEVICE.type == "cuda" else 16


@pytest.mark.parametrize("case", far_cases(16))
def test_rows_past_2_31_elements(case):
    """The last rows, and the gradient that they give, are what they are alone."""
    check_far(case, PAST_2_31)


def check_far(case: str, elements: int) -> None:
    op, widths, parameters = far_cases(FAR_WIDTH)[case]
    tensors = 12 if "mlp" in case else 6  # of the size of x, the hidden values of an MLP being four times as wide
    with memory(tensors * elements * DTYPE.itemsize):
        x = zeros(elements, *widths)
        grad = None
        results = []
        for rows in (x, x[-LAST:].clone()):
            leaf = rows.requires_grad_()
            with use_backend("triton"):
                out = op(leaf, *parameters)
                grad = torch.randn_like(out[-LAST:]) if grad is None else grad
                whole = torch.zeros_like(out)
                whole[-LAST:] = grad
                (grad_x,) = torch.autograd.grad(out, leaf, whole)
            results.append((out[-LAST:].detach().clone(), grad_x[-LAST:].clone()))
            del out, whole, grad_x, leaf
    for far, alone in zip(*results, strict=True):
        assert far.norm() > 0
        torch.testing.assert_close(far, alone, rtol=2 * torch.finfo(DTYPE).eps, atol=4 * torch.finfo(DTYPE).eps)


@contextmanager
def memory(needed: int) -> Iterator[None]:
    """Skip where the device has fewer bytes left, or other tests take them meanwhile."""
    if room() < needed:
        pytest.skip(f"{needed >> 30} GiB of device memory are needed")
    try:
        yield
    except torch.OutOfMemoryError:
        if room() >= needed:
            raise
        pytest.skip(f"others took the {needed >> 30} GiB of device memory that are needed")


def room() -> int:
    """Bytes of device memory that this process may have, those it has included."""
    return sys.maxsize if DEVICE.type == "cpu" else torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


@torch.no_grad()
def test_clips_past_2_31_elements():
    check_far_clip(PAST_2_31)


def check_far_clip(elements: int) -> None:
    """The log-mel rows of a clip after one whose frames have so many elements are what they are alone."""
    lengths = elements // ANALYSIS * HOP, LAST * HOP

    def rows(samples: Tensor, *lengths: int) -> Tensor:
        cu_samples = ints(*accumulate(lengths, initial=0))
        cu_frames = cu_samples // HOP
        layout = {"cu_samples": cu_samples, "cu_frames": cu_frames, "num_frames": len(samples) // HOP, "hop": HOP}
        with use_backend("triton"):
            spectrum = mk.varlen_stft(samples, torch.hann_window(ANALYSIS, device=DEVICE), **layout)
            return mk.varlen_log_mel(
                spectrum, filters, cu_frames=cu_frames, cu_rows=cu_frames, num_rows=len(spectrum)
            )[-LAST:]  # fmt: skip

    with memory(12 * sum(lengths) * torch.float32.itemsize):
        samples = torch.zeros(sum(lengths), device=DEVICE)
        samples[-lengths[1] :] = torch.randn(lengths[1], device=DEVICE)
        filters = torch.rand(ANALYSIS // 2 + 1, 80, device=DEVICE)
        far, alone = rows(samples, *lengths), rows(samples[-lengths[1] :], lengths[1])
    assert alone.std() > 0
    torch.testing.assert_close(far, alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("op", "floats"), [("mlp", 2), ("attention", 1)])
def test_peak_memory(op, floats):
    """What a narrow encoder's fused feed-forward half and its attention hold beside their input: no hidden values, no
    scores. floats: outputs of the input's rows and width.
    """
    rows, d = 48_000, 384
    x = torch.randn(rows, d, dtype=torch.bfloat16, device=DEVICE)
    qkv = torch.randn(rows, 3, 6, 64, dtype=torch.bfloat16, device=DEVICE)
    parameters = [p.bfloat16() for p in _mlp_parameters(d)]
    call = partial(attention, qkv) if op == "attention" else partial(fused_mlp, x, *parameters)
    with use_backend("triton"):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
    assert torch.cuda.max_memory_allocated() - before <= floats * out.nbytes + 2**20


@pytest.mark.skipif(not csrc.available(), reason="the compiled library was not built")
@pytest.mark.parametrize("tma_products", [TMA_PRODUCTS, 0], ids=["addresses", "descriptors"])
@pytest.mark.parametrize("pre_norm", [True, False], ids=["before", "after"])
def test_a_repeated_layer_gives_what_its_parts_do(monkeypatch, pre_norm, tma_products):
    """The layers after the first are launched by addresses alone, forward and backward, with other numbers of rows."""
    d, hidden, encoders = 384, 1536, 2
    narrow, wide = (encoders, d), [(encoders, 3 * d, d), (encoders, 3 * d), (encoders, d, d)]
    shapes = [narrow, narrow, *wide, narrow, narrow, narrow]
    shapes += [(encoders, hidden, d), (encoders, hidden), (encoders, d, hidden), narrow]

    def results(x: Tensor, parameters: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        with use_backend("triton"):
            rows = bounds(x)
            how = {"group_offsets": rows, "cu_seqlens": rows.clone(), "max_seqlen": LAST, "heads": 6}
            layer = mk.LayerParameters(*parameters)
            out = mk.encoder_layer(x, layer, pre_norm=pre_norm, **how)
            grads = torch.autograd.grad(out, [x, *parameters], grad)
            with torch.no_grad():
                one, three = (mk.encoder_layers(x, [layer] * n, pre_norm=pre_norm, **how) for n in (1, 3))
                return out, *grads, one, three

    # Else a table that finds another library's attention faster leaves nothing to repeat.
    monkeypatch.setattr(attention_of_device, "choose", lambda *args: varlen_attention)
    with override(tma_products=tma_products):  # which begins and ends with nothing kept
        for more in (4, 0, 12):
            packed = LAST + more, d
            x, grad, *parameters = (random(*shape).requires_grad_() for shape in (packed, packed, *shapes))
            repeated = results(x, parameters, grad.detach())
            with monkeypatch.context() as patch:
                patch.setattr(_layers, "MOST_BYTES", dict.fromkeys(_layers.MOST_BYTES, 0))
                patch.setattr(_layers, "_kept", {})
                by_parts = results(x, parameters, grad.detach())
            assert all(map(torch.equal, repeated, by_parts))
        programs = [program for alike in _layers._kept.values() for program in alike]
        assert len(programs) == len(_layers._kept) == 3
        assert any(program.num_matrices for program in programs) == (not tma_products)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_no_access_out_of_bounds():
    """The small grid of `mowe_kernels.tune`, every allocation its own, under the memory checker."""
    small_grid()  # compiles the kernels
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c"]
    code = "from tests.gpu.test_kernels_on_gpu import small_grid; small_grid()"
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def small_grid() -> None:
    """The kernels of every op, forward and backward, on few rows; whether they are right `tune` finds out."""
    for case in chain.from_iterable(cases(TINY, DEVICE).values()):
        with use_backend("triton"), override(**case.settings):
            for dtype in (torch.float32, torch.bfloat16) if case.inputs else ():
                differentiate(case.op, case.inputs, case.rows, dtype, case.frozen)
            if case.same is not None:
                case.same()
