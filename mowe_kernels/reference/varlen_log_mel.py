"""Plain torch `varlen_log_mel`."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(spectrum: Tensor, filters: Tensor, cu_frames: Tensor, cu_rows: Tensor, num_rows: int) -> Tensor:
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    rows = (power @ filters).clamp_(min=1e-10).log10_()
    # Without a look at the offsets, which would make a GPU wait.
    peaks = torch.segment_reduce(rows.amax(1), "max", offsets=cu_frames, unsafe=True)
    frames = rows.shape[0]
    if frames < num_rows:
        row = (cu_rows - cu_frames)[_owners(cu_frames, frames)] + torch.arange(frames, device=rows.device)
        rows = rows.new_full((num_rows, rows.shape[1]), -10.0).index_copy_(0, row, rows)
    rows.clamp_(min=(peaks - 8.0)[_owners(cu_rows, num_rows), None])
    return torch.add(1.0, rows, alpha=0.25, out=rows)


def _owners(offsets: Tensor, total: int) -> Tensor:
    """[total] int32: the clip of each row."""
    row = torch.arange(total, dtype=torch.int32, device=offsets.device)
    return torch.bucketize(row, offsets[1:], out_int32=True, right=True)
