"""`mowe::varlen_log_mel`: Whisper's log-mel rows of packed clips, from their short-time spectra."""

from __future__ import annotations

from torch import Tensor

from mowe_kernels.ops._op import Op, check, check_shape


def _fake(spectrum, filters, cu_frames, cu_rows, num_rows):
    return filters.new_empty(num_rows, filters.shape[1])


_op = Op(
    "varlen_log_mel",
    "(Tensor spectrum, Tensor filters, Tensor cu_frames, Tensor cu_rows, SymInt num_rows) -> Tensor",
    _fake,
    module="varlen_log_mel",
    function="forward",
)


def varlen_log_mel(spectrum: Tensor, filters: Tensor, *, cu_frames: Tensor, cu_rows: Tensor, num_rows: int) -> Tensor:
    """(max(x, peak - 8) + 4) / 4, x = log10(max(|spectrum|^2 @ filters, 1e-10)), peak the largest x of the clip.

    A clip's first rows are its frames, the rest of its rows are silence: x = -10.

    spectrum: complex [R, K] as of `varlen_stft`. filters: [K, N] float32 or float64, the type of the spectrum's parts.
    cu_frames, cu_rows: int32 [B+1], first frame and first row of each clip; no clip has fewer rows than frames.
    num_rows: cu_rows[-1], known to the host. Returns [num_rows, N] in the type of the filters. No gradient.
    Floor: 2 R K N FLOPs; 2 R K + num_rows N elements moved. Raises ValueError for shapes or types that do not fit.
    """
    op = "varlen_log_mel"
    check_shape(op, "spectrum", spectrum, (None, None), "spectra of packed frames [R, K]")
    check_shape(op, "filters", filters, (spectrum.shape[1], None), "filters [K, N]")
    check(
        not filters.is_complex() and filters.dtype.to_complex() == spectrum.dtype,
        op,
        f"filters must be real and spectrum complex of one precision, got {filters.dtype} and {spectrum.dtype}",
    )
    check_shape(op, "cu_frames", cu_frames, (None,), "first frame of each clip [B+1]")
    check_shape(op, "cu_rows", cu_rows, (cu_frames.shape[0],), "first row of each clip [B+1]")
    check(num_rows >= spectrum.shape[0], op, f"{num_rows} rows are fewer than the {spectrum.shape[0]} frames")
    return _op(spectrum, filters, cu_frames, cu_rows, num_rows)
