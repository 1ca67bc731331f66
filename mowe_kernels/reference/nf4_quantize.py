"""Plain torch `nf4_quantize`."""

from __future__ import annotations

import torch
from torch import Tensor

NF4_CODE = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)  # fmt: skip
"""The quantiles of a normal distribution that 4 bits stand for (QLoRA, arXiv 2305.14314, appendix E)."""


def forward(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    code = NF4_CODE.to(weight.device)
    bounds = (code[:-1] + code[1:]) / 2
    encoded = [_matrix(matrix.flatten().float(), bounds, blocksize) for matrix in weight]
    codes, absmax = zip(*encoded, strict=True)
    return torch.stack(codes), torch.stack(absmax)


def _matrix(values: Tensor, bounds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """bitsandbytes multiplies a whole block by the reciprocal of its scale, and divides the last, shorter one."""
    full = values.numel() // blocksize * blocksize
    whole, rest = values[:full].view(-1, blocksize), values[full:]
    absmax = whole.abs().amax(1) if full else values.new_empty(0)
    scaled = (whole * (1.0 / absmax.clamp(min=1e-38))[:, None]).flatten()
    if rest.numel():
        last = rest.abs().max().clamp(min=1e-38)
        absmax, scaled = torch.cat((absmax, last[None])), torch.cat((scaled, rest / last))
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    index = torch.bucketize(scaled.clamp(-1, 1), bounds, out_int32=True).to(torch.uint8)
    return index[::2] << 4 | index[1::2], absmax
