"""The compiled libraries: loaded where they were built, never compiled here."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch

OPS = {
    "nf4_quantize": ("cpu", "cuda"),
    "nf4_dequantize_grouped": ("cpu", "cuda"),
    "pack_plan": ("cpu",),
    "route_topk": ("cpu",),
}
"""What is computed by the libraries, of route_topk the plan, and on which devices."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARIES = {
    device: Path(__file__).parents[1] / name for device, name in {"cpu": "_csrc.so", "cuda": "_csrc_cuda.so"}.items()
}
"""By type of device. That of CUDA adds to that of the CPU and is loaded at the first CUDA tensor."""


def computes(op: str, device: torch.device | None) -> bool:
    """Whether a library computes the op on tensors of a device, None where there are no tensors."""
    kind = "cpu" if device is None else device.type
    return kind in OPS.get(op, ()) and available(kind)


@cache
def available(device: str = "cpu") -> bool:
    """Whether the library for a type of device could be loaded; warns once where one was not built or is broken."""
    if device not in LIBRARIES or (device != "cpu" and not available()):
        return False
    reason, library = "it was not built", LIBRARIES[device]
    if library.is_file():
        try:
            torch.ops.load_library(library)
            ops = torch.ops.mowe
            if hasattr(ops, "launch_layers") and all(  # called otherwise where programs are written otherwise
                hasattr(getattr(ops, op), "csrc") for op in OPS if op != "route_topk"
            ):
                return True
            reason = "it was built from an older source"
        except OSError as error:
            reason = " ".join(str(error).split())
    warnings.warn(
        f"mowe_kernels runs without its compiled library for {device} ({reason}), which is slower: "
        f"install with {'nvcc' if device == 'cuda' else 'a C++ compiler'} and `pip install --no-build-isolation`",
        stacklevel=2,
    )
    return False
