"""A pool of Whisper encoders on packed rows with what torch has for it: grouped_mm, and varlen_attn under compile on a
GPU. Features and plan are the library's, so that nothing but the layers differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, grouped_mm, layer_norm, pad, scaled_dot_product_attention

from benchmarks.providers import Outputs, Provider, Run, shared_pool
from benchmarks.workloads import Workload
from mowe.audio import AudioBatch
from mowe.families import ClipFeatures
from mowe.families.whisper import WhisperFamily
from mowe.pool import PoolOutput
from mowe_kernels import FamilyPlan, Level, PackPlan

Attend = Callable[[Tensor, Tensor, int], Tensor]


def packed_by_torch(workload: Workload) -> Run:
    pool, waveforms = shared_pool(workload), workload.waveforms()
    (family,) = pool.families
    indices, device, host = torch.tensor(workload.indices), torch.device(workload.device), torch.device("cpu")
    on_gpu = device.type == "cuda"
    encode = torch.compile(_encode, dynamic=True) if on_gpu else _encode

    def run() -> Outputs:
        features = ClipFeatures(AudioBatch.from_waveforms(waveforms, device), workload.context)
        lengths = pool.lengths(features)
        plan = PackPlan.build(indices.to(device, non_blocking=on_gpu), lengths, pool.layout(device))
        part = plan.family(0)
        frames, starts = family.inputs(features)
        rows = encode(family, frames.to(family.dtype), starts[part.clip], part, varlen if on_gpu else by_sequence)
        plan_on_host = partial(PackPlan.build, indices, lengths, pool.layout(host)) if on_gpu else None
        return PoolOutput((rows,), plan, plan_on_host).pairs()

    return run


def varlen(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Attention of packed sequences, qkv [R, 3, H, Dh] in 16 bits -> [R, H * Dh]."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest).flatten(1)


def by_sequence(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """The same, one call a sequence."""
    heads = qkv.split(cu_seqlens.diff().tolist())
    attended = [scaled_dot_product_attention(*part.permute(1, 2, 0, 3)[:, None]) for part in heads]
    return torch.cat([part[0].transpose(0, 1).flatten(1) for part in attended])


GROUPED = {
    "packed_by_torch": Provider(
        packed_by_torch, None, "torch's grouped_mm and attention on packed rows, from waveforms"
    ),
}


def _encode(family: WhisperFamily, frames: Tensor, starts: Tensor, plan: FamilyPlan, attend: Attend) -> Tensor:
    inner, rows = plan.levels
    width, heads = family.hidden_size, family.layers[0].heads
    x = _convolve(frames, starts, inner.lengths, inner, family.conv1, stride=1)
    x = _convolve(x, inner.starts, inner.lengths, rows, family.conv2, stride=2)
    encoder = _owners(rows.group_offsets, rows.num_rows)
    sequence = _owners(rows.cu_seqlens, rows.num_rows)
    place = torch.arange(rows.num_rows, device=x.device) - rows.cu_seqlens[sequence]
    x = x + family.embed_positions[encoder, place.clamp(max=family.max_frames - 1)]

    def linear(x: Tensor, layer) -> Tensor:
        return grouped_mm(x, layer.weight.mT, offs=rows.group_offsets[1:]) + layer.bias[encoder]

    def norm(x: Tensor, layer) -> Tensor:
        return layer_norm(x, (width,), eps=layer.eps) * layer.weight[encoder] + layer.bias[encoder]

    for layer in family.layers:
        qkv = linear(norm(x, layer.attention_norm), layer.qkv).view(rows.num_rows, 3, heads, -1)
        x = x + linear(attend(qkv, rows.cu_seqlens, rows.max_seqlen), layer.out)
        x = x + linear(gelu(linear(norm(x, layer.mlp_norm), layer.fc1)), layer.fc2)
    return norm(x, family.layer_norm)


def _convolve(x: Tensor, starts: Tensor, lengths: Tensor, out: Level, layer, stride: int) -> Tensor:
    """Three taps and GELU as one grouped product over the windows of every frame, zeros at each sequence's own ends."""
    sequence = _owners(out.cu_seqlens, out.num_rows)
    frame = torch.arange(out.num_rows, device=x.device) - out.cu_seqlens[sequence]
    seen = stride * frame[:, None] + torch.arange(-1, 2, device=x.device)
    inside = (seen >= 0) & (seen < lengths[sequence, None])
    windows = pad(x, (0, 0, 0, 1))[torch.where(inside, starts[sequence, None] + seen, len(x))].flatten(1)
    y = grouped_mm(windows, layer.weight.flatten(2).mT, offs=out.group_offsets[1:])
    return gelu(y + layer.bias[_owners(out.group_offsets, out.num_rows)])


def _owners(offsets: Tensor, count: int) -> Tensor:
    """[count] the group of each row, the last one's of rows that are nobody's."""
    rows = torch.arange(count, device=offsets.device, dtype=offsets.dtype)
    # Not in offsets[1:]: Inductor's code for a GPU names the storage, not where in it that view begins.
    return torch.searchsorted(offsets, rows, right=True).sub(1).clamp(max=len(offsets) - 2)
