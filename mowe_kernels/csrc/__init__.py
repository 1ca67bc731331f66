"""The compiled libraries: loaded where they were built, never compiled here."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

OPS = ("nf4_quantize", "nf4_dequantize_grouped")
"""What the libraries compute."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARIES = {
    device: Path(__file__).parents[1] / name for device, name in {"cpu": "_csrc.so", "cuda": "_csrc_cuda.so"}.items()
}
"""By type of device. That of CUDA adds to that of the CPU and is loaded at the first CUDA tensor."""


@cache
def available(device: str = "cpu") -> bool:
    """Whether the library for a type of device could be loaded; warns once where one was not built or is broken."""
    if device not in LIBRARIES or (device != "cpu" and not available()):
        return False
    reason, library = "it was not built", LIBRARIES[device]
    if library.is_file():
        try:
            torch.ops.load_library(library)
            return True
        except OSError as error:
            reason = " ".join(str(error).split())
    warnings.warn(
        f"mowe_kernels runs without its compiled library for {device} ({reason}), which is slower: "
        f"install with {'nvcc' if device == 'cuda' else 'a C++ compiler'} and `pip install --no-build-isolation`",
        stacklevel=2,
    )
    return False
