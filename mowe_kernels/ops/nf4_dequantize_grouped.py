"""`mowe::nf4_dequantize_grouped`: all matrices of a layer out of 4 bits, for the encoders that have rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mowe_kernels.ops._op import Op, check, check_offsets, check_shape
from mowe_kernels.ops.nf4_quantize import BLOCKSIZES, sizes
from mowe_kernels.reference.nf4_nested import NESTED_BLOCKSIZE


class Nf4Matrix(NamedTuple):
    """E matrices [rows, columns] in 4 bits, as `Nf4Weight` describes them."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_code: Tensor | None
    rows: int
    columns: int
    blocksize: int

    def check(self, op: str) -> None:
        """Raise ValueError where sizes or types do not fit each other."""
        check(self.blocksize in BLOCKSIZES, op, f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        nbytes, blocks = sizes(self.rows, self.columns, self.blocksize)
        check_shape(
            op, "codes", self.codes, (None, nbytes), f"two values of a {self.rows} x {self.columns} matrix a byte"
        )
        encoders = self.codes.shape[0]
        nested = self.nested_absmax is not None
        check(self.codes.dtype == torch.uint8, op, f"codes must be uint8, got {self.codes.dtype}")
        scale = torch.uint8 if nested else torch.float32
        check(self.absmax.dtype == scale, op, f"absmax must be {scale}, got {self.absmax.dtype}")
        check_shape(op, "absmax", self.absmax, (encoders, blocks), f"a scale every {self.blocksize} values")
        if nested:
            count = -(-blocks // NESTED_BLOCKSIZE)
            for name, shape in (
                ("nested_absmax", (encoders, count)),
                ("nested_offset", (encoders,)),
                ("nested_code", (encoders, 256)),
            ):
                tensor = getattr(self, name)
                check(tensor is not None and tensor.dtype == torch.float32, op, f"{name} must be float32")
                check_shape(op, name, tensor, shape, "scales of the scales")


class Nf4Stacks(NamedTuple):
    """Matrices as the op takes them: whoever asks for the same ones again and again makes them once."""

    codes: list[Tensor]
    absmax: list[Tensor]
    nested_absmax: list[Tensor]
    nested_offset: list[Tensor]
    nested_code: list[Tensor]
    sizes: list[int]

    @classmethod
    def of(cls, matrices: Sequence[Nf4Matrix]) -> Nf4Stacks:
        """Raises ValueError for sizes or types that do not fit each other, other numbers of matrices, and for none."""
        op = "nf4_dequantize_grouped"
        check(len(matrices) > 0, op, "matrices must be one or more, got none")
        for matrix in matrices:
            matrix.check(op)
        counts = [len(matrix.codes) for matrix in matrices]
        check(len(set(counts)) == 1, op, f"matrices must be of as many encoders each, got {counts}")
        absent = matrices[0].absmax.new_empty(0, dtype=torch.float32)
        stacks = ([absent if t is None else t for t in column] for column in list(zip(*matrices, strict=True))[:5])
        return cls(*stacks, [n for m in matrices for n in (m.rows, m.columns, m.blocksize)])


def _fake(codes, absmax, nested_absmax, nested_offset, nested_code, sizes, group_offsets, dtype):
    shapes = zip(codes, sizes[::3], sizes[1::3], strict=True)
    return [c.new_empty((c.shape[0], rows, columns), dtype=dtype) for c, rows, columns in shapes]


_op = Op(
    "nf4_dequantize_grouped",
    "(Tensor[] codes, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] nested_offset, Tensor[] nested_code,"
    " int[] sizes, Tensor group_offsets, ScalarType dtype) -> Tensor[]",
    _fake,
    module="nf4_dequantize_grouped",
    function="forward",
)


def nf4_dequantize_grouped(
    matrices: Sequence[Nf4Matrix] | Nf4Stacks, group_offsets: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Weights [E, rows, columns] in `dtype` of every stack, those of encoders without rows unspecified.

    group_offsets: int32 or int64 [E+1], first row of each encoder. The product of value and scale is taken in float32.
    The results are tensors like others: when the last that sees their memory is gone, the next layer's take its place
    (on the CPU the compiled library keeps up to 256 MiB for that).
    Floor: 0.5 bytes read and one element written for each weight of the encoders in use.
    Raises ValueError for sizes or types that do not fit each other, and for no matrices at all.
    """
    stacks = matrices if isinstance(matrices, Nf4Stacks) else Nf4Stacks.of(matrices)
    check_offsets("nf4_dequantize_grouped", "group_offsets", group_offsets, stacks.codes[0].shape[0] + 1, "[E+1]")
    return list(_op(*stacks, group_offsets, dtype))
