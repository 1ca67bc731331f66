"""`mowe::nf4_quantize`: matrices to 4 bits, two a byte, with a scale a block."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.ops._op import Op, check, check_shape

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def sizes(rows: int, columns: int, blocksize: int) -> tuple[int, int]:
    """Bytes and blocks of one matrix."""
    return (rows * columns + 1) // 2, -(-rows * columns // blocksize)


def _fake(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    encoders, *matrix = weight.shape
    nbytes, blocks = sizes(*matrix, blocksize)
    return weight.new_empty(encoders, nbytes, dtype=torch.uint8), weight.new_empty(
        encoders, blocks, dtype=torch.float32
    )


_op = Op(
    "nf4_quantize",
    "(Tensor weight, int blocksize) -> (Tensor, Tensor)",
    _fake,
    module="nf4_quantize",
    function="forward",
)


def nf4_encode(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Codes uint8 [E, ceil(N K / 2)] and absmax float32 [E, ceil(N K / blocksize)] of weights [E, N, K].

    Raises ValueError for another shape, type or block size.
    """
    check_shape("nf4_quantize", "weight", weight, (None, None, None), "stacked weights [E, N, K]")
    check(weight.numel() > 0, "nf4_quantize", f"weight must not be empty, got {list(weight.shape)}")
    check(blocksize in BLOCKSIZES, "nf4_quantize", f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    types = (torch.float32, torch.bfloat16, torch.float16)
    check(weight.dtype in types, "nf4_quantize", f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    return _op(weight.detach().contiguous(), blocksize)
