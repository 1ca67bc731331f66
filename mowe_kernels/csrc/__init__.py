"""The compiled library: loaded where it was built, never compiled here. Its ops run on CPU tensors alone."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

OPS = ("nf4_quantize", "nf4_dequantize_grouped")
"""What the library computes."""
DTYPES = (torch.float32, torch.bfloat16)
LIBRARY = Path(__file__).parents[1] / "_csrc.so"


@cache
def available() -> bool:
    """Whether the library could be loaded; warns once where it could not."""
    reason = "it was not built"
    if LIBRARY.is_file():
        try:
            torch.ops.load_library(LIBRARY)
            return True
        except OSError as error:
            reason = " ".join(str(error).split())
    warnings.warn(
        f"mowe_kernels runs without its compiled library ({reason}), which is slower: "
        "install with a C++ compiler and `pip install --no-build-isolation`",
        stacklevel=2,
    )
    return False
