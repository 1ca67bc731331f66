"""Plain torch `varlen_log_mel`."""

from __future__ import annotations

import torch
from torch import Tensor

from mowe_kernels.reference._rows import numbered


def forward(spectrum: Tensor, filters: Tensor, cu_frames: Tensor, cu_rows: Tensor, num_rows: int) -> Tensor:
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    rows = (power @ filters).clamp_(min=1e-10).log10_()
    # Without a look at the offsets, which would make a GPU wait.
    peaks = torch.segment_reduce(rows.amax(1), "max", offsets=cu_frames, unsafe=True)
    if rows.shape[0] < num_rows:
        frame, clip = numbered(cu_frames, rows.shape[0])
        row = (cu_rows - cu_frames).index_select(0, clip) + frame
        rows = rows.new_full((num_rows, rows.shape[1]), -10.0).index_copy_(0, row.long(), rows)
    _, clip = numbered(cu_rows, num_rows)
    rows.clamp_(min=(peaks - 8.0).index_select(0, clip)[:, None])
    return torch.add(1.0, rows, alpha=0.25, out=rows)
