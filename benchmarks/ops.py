"""Single ops on the rows of a workload, beside what torch offers for the same thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import conv1d, gelu, grouped_mm, layer_norm, linear, scaled_dot_product_attention

from benchmarks.workloads import Workload
from mowe_kernels import (
    PackLayout,
    PackPlan,
    grouped_conv1d,
    grouped_layer_norm,
    grouped_linear,
    grouped_mlp,
    varlen_attention,
)

WIDTH, HEADS, MELS = 384, 6, 80  # Whisper-tiny's


@dataclass(frozen=True)
class OpCase:
    """An op and its rivals on the same inputs, which give the same rows; the first is the baseline.

    flops, moved: multiplications and additions, and bytes read and written, that no implementation can do without.
    """

    subject: str
    runs: dict[str, Callable[[], Tensor]]
    flops: float
    moved: float


def cases(workload: Workload) -> Iterator[OpCase]:
    """The ops of one layer of a pool of Whisper-tiny, on the workload's own frames."""
    torch.manual_seed(0)
    plan = _plan(workload)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=workload.device, dtype=workload.torch_dtype)

    frames, rows = plan.levels
    count, encoders, size = (rows.num_rows, workload.num_encoders, workload.torch_dtype.itemsize)
    bounds = list(zip(rows.group_offsets.tolist(), rows.group_offsets.tolist()[1:], strict=False))
    sequences = list(zip(rows.cu_seqlens.tolist(), rows.cu_seqlens.tolist()[1:], strict=False))
    x = randn(count, WIDTH)
    weight, bias = randn(encoders, 4 * WIDTH, WIDTH) * 0.05, randn(encoders, 4 * WIDTH)
    back, back_bias = randn(encoders, WIDTH, 4 * WIDTH) * 0.05, randn(encoders, WIDTH)
    scale, shift = randn(encoders, WIDTH), randn(encoders, WIDTH)

    def by_encoder(run: Callable[[int, Tensor], Tensor]) -> Tensor:
        return torch.cat([run(e, x[first:last]) for e, (first, last) in enumerate(bounds)])

    yield OpCase(
        f"grouped_linear with GELU, {count} rows, {WIDTH} to {4 * WIDTH}",
        {
            "loop": lambda: by_encoder(lambda e, part: gelu(linear(part, weight[e], bias[e]))),
            "grouped_mm": lambda: gelu(
                grouped_mm(x, weight.mT, offs=rows.group_offsets[1:])
                + bias.repeat_interleave(rows.group_offsets.diff(), 0)
            ),
            "packed": lambda: grouped_linear(x, weight, bias, rows.group_offsets, activation="gelu"),
        },
        flops=2 * count * 4 * WIDTH * WIDTH,
        moved=size * (count * 5 * WIDTH + weight.numel()),
    )
    yield OpCase(
        f"grouped_mlp, {count} rows, {WIDTH} to {4 * WIDTH} and back",
        {
            "loop": lambda: by_encoder(
                lambda e, part: (
                    part
                    + linear(
                        gelu(linear(layer_norm(part, (WIDTH,), scale[e], shift[e]), weight[e], bias[e])),
                        back[e],
                        back_bias[e],
                    )
                )
            ),
            "packed": lambda: grouped_mlp(x, scale, shift, weight, bias, back, back_bias, rows.group_offsets, eps=1e-5),
        },
        flops=2 * 2 * count * 4 * WIDTH * WIDTH,
        moved=size * (2 * count * WIDTH + 2 * weight.numel()),
    )
    yield OpCase(
        f"grouped_layer_norm, {count} rows of {WIDTH}",
        {
            "loop": lambda: by_encoder(lambda e, part: layer_norm(part, (WIDTH,), scale[e], shift[e])),
            "packed": lambda: grouped_layer_norm(x, scale, shift, rows.group_offsets, eps=1e-5),
        },
        flops=0.0,
        moved=size * 2 * count * WIDTH,
    )
    qkv = randn(count, 3, HEADS, WIDTH // HEADS)
    yield OpCase(
        f"varlen_attention, {len(sequences)} sequences, {HEADS} heads of {WIDTH // HEADS}",
        {
            "padded": _padded_attention(qkv, sequences),
            **_varlen_rivals(qkv, rows.cu_seqlens, rows.max_seqlen),
            "packed": lambda: varlen_attention(qkv, rows.cu_seqlens, rows.max_seqlen).flatten(1),
        },
        flops=sum(4 * (last - first) ** 2 * WIDTH for first, last in sequences),
        moved=size * 4 * count * WIDTH,
    )
    mel = randn(frames.num_rows, MELS)
    stem, stem_bias = randn(encoders, WIDTH, 3, MELS) * 0.05, randn(encoders, WIDTH)
    clips = list(zip(frames.cu_seqlens.tolist(), frames.cu_seqlens.tolist()[1:], strict=False))
    yield OpCase(
        f"grouped_conv1d with GELU, {frames.num_rows} frames, {MELS} to {WIDTH}, 3 taps",
        {
            "loop": lambda: torch.cat(
                [
                    gelu(conv1d(mel[first:last].T[None], stem[e].mT, stem_bias[e], padding=1))[0].T
                    for (first, last), e in zip(clips, plan.encoder.tolist(), strict=True)
                ]
            ),
            "packed": lambda: grouped_conv1d(
                mel, stem, stem_bias,
                starts=frames.starts, lengths=frames.lengths, encoder=plan.encoder,
                cu_seqlens=frames.cu_seqlens, num_rows=frames.num_rows, padding=1, activation="gelu",
            ),
        },
        flops=2 * 3 * frames.num_rows * MELS * WIDTH,
        moved=size * (frames.num_rows * (MELS + WIDTH) + stem.numel()),
    )  # fmt: skip


_VARLEN = {"torch_varlen": "torch.nn.attention.varlen", "flash_attn": "flash_attn"}
MEANINGS = {
    "loop": "torch, one call an encoder or clip",
    "grouped_mm": "torch.nn.functional.grouped_mm, then bias and GELU",
    "torch_varlen": "torch.nn.attention.varlen",
    "flash_attn": "FlashAttention-2, varlen",
    "padded": "torch's attention, one padded and masked batch",
    "packed": "this library",
}


def missing(device: str) -> dict[str, str]:
    """Why a rival cannot run on a device, by its name."""
    reasons = {name: f"needs {package} and a CUDA GPU" for name, package in _VARLEN.items()}
    return reasons if device == "cpu" else {n: r for n, r in reasons.items() if find_spec(_VARLEN[n]) is None}


def _varlen_rivals(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> dict[str, Callable[[], Tensor]]:
    """Attention over packed sequences by others, on a GPU; they take 16 bits alone."""
    if qkv.device.type != "cuda" or qkv.dtype == torch.float32:
        return {}
    absent = missing("cuda")
    q, k, v = (part.contiguous() for part in qkv.unbind(1))
    rivals: dict[str, Callable[[], Tensor]] = {}
    if "torch_varlen" not in absent:
        from torch.nn.attention.varlen import varlen_attn

        rivals["torch_varlen"] = lambda: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest).flatten(1)
    if "flash_attn" not in absent:
        from flash_attn import flash_attn_varlen_func

        rivals["flash_attn"] = lambda: flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest
        ).flatten(1)
    return rivals


def _plan(workload: Workload):
    """The plan of a pool of Whisper encoders for the workload's routing: log-mel frames, then frames at 50 Hz."""
    frames = [round(seconds * 100) for seconds in workload.seconds]
    layout = PackLayout.build([0] * workload.num_encoders, [2], workload.device)
    lengths = [frames, [-(-f // 2) for f in frames]]
    return PackPlan.build(torch.tensor(workload.indices, device=workload.device), lengths, layout).family(0)


def _padded_attention(qkv: Tensor, sequences: list[tuple[int, int]]) -> Callable[[], Tensor]:
    """Attention of sequences that were padded before the clock starts; their own rows are cut out again."""
    lengths = [last - first for first, last in sequences]
    padded = torch.nn.utils.rnn.pad_sequence([qkv[first:last] for first, last in sequences], batch_first=True)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(qkv.device)[:, None, None]

    def run() -> Tensor:
        q, k, v = padded.permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return torch.cat([clip[:length] for clip, length in zip(out, lengths, strict=True)])

    return run
