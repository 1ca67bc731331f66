"""Trying the kernels on a device: are they right, which launch settings are fastest, who computes attention."""

from __future__ import annotations

import subprocess
from functools import cache


@cache  # results are written after every step, with what they were made with
def driver() -> str:
    """Version of the NVIDIA driver, "unknown" where nothing tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.split("\n")[0].strip() or "unknown"
