"""The scales of NF4 blocks in 8 bits: bitsandbytes' dynamic type, as it quantises on the CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NESTED_BLOCKSIZE = 256
_TABLE = 65536  # values between -1 and 1 that bitsandbytes tells apart


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 [E, blocks] -> uint8 [E, blocks], nested absmax [E, ceil(blocks / 256)], offset [E], code [E, 256]."""
    encoders, blocks = absmax.shape
    offset = torch.stack([row.mean() for row in absmax])  # row by row: another order of summation, another last bit
    centred = torch.nn.functional.pad(absmax - offset[:, None], (0, -blocks % NESTED_BLOCKSIZE))
    grouped = centred.view(encoders, -1, NESTED_BLOCKSIZE)
    scale = grouped.abs().amax(-1)
    normed = (grouped * (1.0 / scale)[..., None]).nan_to_num(0.0).clamp(-1, 1)
    place = (((normed + 1.0) * 0.5).double() * (_TABLE - 1) + 0.5).float().int()  # a fused multiply-add there
    index = _nearest().to(absmax.device)[place].masked_fill(scale[..., None] == 0, 0)
    code = dynamic_code().to(absmax.device).repeat(encoders, 1)
    return index.view(encoders, -1)[:, :blocks].contiguous(), scale, offset, code


def dequantize_absmax(absmax: Tensor, nested_absmax: Tensor, offset: Tensor, code: Tensor) -> Tensor:
    """uint8 [blocks] of one encoder -> float32 [blocks]."""
    return code[absmax.int()] * nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()] + offset


@cache
def dynamic_code() -> Tensor:
    """The 256 values of the signed dynamic type: a decimal exponent of 0 to -6, the other bits a fraction.

    8-bit approximations for parallelism in deep learning, arXiv 1511.04561.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2
        magnitude = 10 ** (exponent - 6)
        values += (magnitude * means).tolist() + (-magnitude * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@cache
def _nearest() -> Tensor:
    """uint8 [65536]: index of the value nearest to each point from -1 to 1."""
    code = dynamic_code()
    points = 2.0 * torch.arange(_TABLE, dtype=torch.float32, device="cpu") / (_TABLE - 1) - 1.0
    return torch.searchsorted((code[:-1] + code[1:]) / 2, points).to(torch.uint8)
