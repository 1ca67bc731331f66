"""Single ops on the rows of a workload, beside what others offer for the same thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import conv1d, embedding, gelu, grouped_mm, layer_norm, linear, scaled_dot_product_attention

from benchmarks import rivals
from benchmarks.workloads import Workload
from mowe_kernels import (
    FamilyPlan,
    PackLayout,
    PackPlan,
    grouped_conv1d,
    grouped_layer_norm,
    grouped_linear,
    grouped_mlp,
    route_topk,
    use_backend,
    varlen_attention,
)
from mowe_kernels.plan import device_lengths

WIDTH, HEADS, MELS = 384, 6, 80  # Whisper-tiny's
NUM_OPS = 7


@dataclass(frozen=True)
class OpCase:
    """An op and its rivals on the same inputs, which give the same rows; the first is the baseline.

    inputs: what gradients are asked of. own: the inputs of a rival that takes them in another shape, and how the
    gradients of those become the others'. flops, moved: multiplications and additions, and bytes read and written,
    that no implementation of the forward can do without; times: how much more of them the backward alone needs. beside:
    what is timed with the forward though it gives something else: the same arithmetic at its simplest.
    """

    subject: str
    runs: dict[str, Callable[[], Tensor]]
    inputs: Sequence[Tensor]
    flops: float
    moved: float
    times: float = 2.0
    own: dict[str, tuple[Sequence[Tensor], Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    beside: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def backward(self, name: str) -> Callable[[], Sequence[Tensor]]:
        """The gradients of all inputs, of a forward that has already run."""
        inputs, convert = self.own.get(name, (self.inputs, lambda grad: grad))
        for tensor in inputs:
            tensor.requires_grad_()
        with torch.enable_grad():
            out = self.runs[name]()
        slope = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)

        def gradients() -> Sequence[Tensor]:
            with _backend(name):
                return [convert(grad) for grad in torch.autograd.grad(out, inputs, slope, retain_graph=True)]

        return gradients


def _backend(name: str) -> AbstractContextManager[None]:
    """What the library computes with when it is its own rival."""
    return use_backend("reference") if name == "reference" else nullcontext()


def cases(workload: Workload) -> Iterator[OpCase]:
    """The ops of one layer of a pool of Whisper-tiny, on the workload's own frames."""
    torch.manual_seed(0)
    plan = _plan(workload)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=workload.device, dtype=workload.torch_dtype) * scale

    frames, rows = plan.levels
    num_frames, count = (int(level.cu_seqlens[-1]) for level in plan.levels)
    encoders, size = workload.num_encoders, workload.torch_dtype.itemsize
    offsets = rows.group_offsets
    bounds = list(pairwise(offsets.tolist()))
    x = randn(count, WIDTH)
    fc1, fc1_bias = randn(encoders, 4 * WIDTH, WIDTH, scale=0.05), randn(encoders, 4 * WIDTH)
    fc2, fc2_bias = randn(encoders, WIDTH, 4 * WIDTH, scale=0.05), randn(encoders, WIDTH)
    scale, shift = randn(encoders, WIDTH), randn(encoders, WIDTH)

    def by_encoder(run: Callable[[int, Tensor], Tensor]) -> Tensor:
        return torch.cat([run(e, x[first:last]) for e, (first, last) in enumerate(bounds)])

    def norm(e: int, part: Tensor) -> Tensor:
        return layer_norm(part, (WIDTH,), scale[e], shift[e])

    def mlp(e: int, part: Tensor) -> Tensor:
        return part + linear(gelu(linear(norm(e, part), fc1[e], fc1_bias[e])), fc2[e], fc2_bias[e])

    yield _linear(x, fc1, fc1_bias, offsets, "gelu")
    yield _linear(x, randn(encoders, 3 * WIDTH, WIDTH, scale=0.05), randn(encoders, 3 * WIDTH), offsets, "")
    experts = rivals.experts(fc1, fc1_bias, fc2, fc2_bias, offsets)
    yield OpCase(
        f"grouped_mlp, {count} rows, {WIDTH} to {4 * WIDTH} and back",
        {
            "loop": lambda: by_encoder(mlp),
            "experts_grouped_mm": lambda: x + experts(by_encoder(norm)),
            "packed": lambda: grouped_mlp(x, scale, shift, fc1, fc1_bias, fc2, fc2_bias, offsets, eps=1e-5),
        },
        (x, scale, shift, fc1, fc1_bias, fc2, fc2_bias),
        flops=2 * 2 * count * 4 * WIDTH * WIDTH,
        moved=size * (2 * count * WIDTH + 2 * fc1.numel()),
    )
    yield OpCase(
        f"grouped_layer_norm, {count} rows of {WIDTH}",
        {
            "loop": lambda: by_encoder(norm),
            "packed": lambda: grouped_layer_norm(x, scale, shift, offsets, eps=1e-5),
        },
        (x, scale, shift),
        flops=0.0,
        moved=size * 2 * count * WIDTH,
        times=1.5,
    )
    yield _attention(randn(count, 3, HEADS, WIDTH // HEADS), rows.cu_seqlens, rows.max_seqlen)
    mel = randn(num_frames, MELS)
    stem, stem_bias = randn(encoders, WIDTH, 3, MELS, scale=0.05), randn(encoders, WIDTH)
    clips = list(zip(frames.cu_seqlens.tolist(), frames.cu_seqlens.tolist()[1:], strict=False))
    yield OpCase(
        f"grouped_conv1d with GELU, {num_frames} frames, {MELS} to {WIDTH}, 3 taps",
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
                cu_seqlens=frames.cu_seqlens, num_rows=num_frames, padding=1, activation="gelu",
            ),
        },
        (mel, stem, stem_bias),
        flops=2 * 3 * num_frames * MELS * WIDTH,
        moved=size * (num_frames * (MELS + WIDTH) + stem.numel()),
    )  # fmt: skip
    yield _routing(randn(len(workload.seconds), encoders).float(), workload)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str) -> OpCase:
    """One linear layer of every encoder on its own rows."""
    (encoders, n, k), count = weight.shape, len(x)
    encoder = torch.arange(encoders, device=x.device).repeat_interleave(offsets.diff())
    bounds = list(pairwise(offsets.tolist()))
    act = gelu if activation else (lambda y: y)
    others = rivals.linears(x, weight, bias, offsets) if activation else {}
    return OpCase(
        f"grouped_linear{' with GELU' if activation else ''}, {count} rows, {k} to {n}",
        {
            "loop": lambda: torch.cat([act(linear(x[a:b], weight[e], bias[e])) for e, (a, b) in enumerate(bounds)]),
            # By `embedding`, as the gradient of an index adds up in 16 bits and is wrong after some thousand rows.
            "grouped_mm": lambda: act(grouped_mm(x, weight.mT, offs=offsets[1:]) + embedding(encoder, bias)),
            **others,
            "packed": lambda: grouped_linear(x, weight, bias, offsets, activation=activation),
        },
        (x, weight, bias),
        flops=2 * count * n * k,
        moved=x.itemsize * (count * (n + k) + weight.numel()),
        beside={"dense": lambda: x @ weight[0].T},
    )


def _attention(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> OpCase:
    """Of packed sequences; the rival that pads gets them padded before the clock starts."""
    lengths = cu_seqlens.diff().tolist()
    padded = torch.nn.utils.rnn.pad_sequence(qkv.split(lengths), batch_first=True)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(qkv.device)[:, None, None]

    def cut(rows: Tensor) -> Tensor:
        return torch.cat([clip[:length] for clip, length in zip(rows, lengths, strict=True)])

    def in_one_batch() -> Tensor:
        q, k, v = padded.permute(2, 0, 3, 1, 4)
        return cut(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    count, width = len(qkv), qkv[0, 0].numel()
    return OpCase(
        f"varlen_attention, {len(lengths)} sequences, {qkv.shape[2]} heads of {qkv.shape[3]}",
        {
            "padded": in_one_batch,
            **rivals.attentions(qkv, cu_seqlens, longest),
            "packed": lambda: varlen_attention(qkv, cu_seqlens, longest).flatten(1),
        },
        (qkv,),
        flops=sum(4 * length**2 * width for length in lengths),
        moved=qkv.element_size() * 4 * count * width,
        own={"padded": ((padded,), cut)},
    )


def _routing(logits: Tensor, workload: Workload) -> OpCase:
    """The choice of every clip, and where its rows go."""
    layout, lengths = _layout(workload), device_lengths(_lengths(workload), logits.device)
    slots = {"top_k": workload.top_k, "top_k_independent": 0}
    plan = {"lengths": lengths, "rank": layout.rank, "level_bounds": layout.level_bounds}

    def by_torch() -> Tensor:
        with _backend("reference"):
            return route_topk(logits, None, **slots, **plan)[0]

    return OpCase(
        f"route_topk, {len(logits)} clips, {workload.top_k} of {workload.num_encoders} encoders",
        {"reference": by_torch, "packed": lambda: route_topk(logits, None, **slots, **plan)[0]},
        (logits,),
        flops=0.0,
        moved=4 * (logits.numel() + lengths.numel() + 8 * len(logits) * workload.top_k),
    )


def _plan(workload: Workload) -> FamilyPlan:
    """The plan of a pool of Whisper encoders for the workload's routing: log-mel frames, then frames at 50 Hz."""
    indices = torch.tensor(workload.indices, device=workload.device)
    return PackPlan.build(indices, _lengths(workload), _layout(workload)).family(0)


def _layout(workload: Workload) -> PackLayout:
    return PackLayout.build([0] * workload.num_encoders, [2], torch.device(workload.device))


def _lengths(workload: Workload) -> list[list[int]]:
    """Of each clip at each level."""
    frames = [round(seconds * 100) for seconds in workload.seconds]
    return [frames, [-(-f // 2) for f in frames]]
