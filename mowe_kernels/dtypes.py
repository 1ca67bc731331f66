"""The numbers ops compute in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every input type but float64, which stays itself (gradient checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
