"""Descriptors of matrices, which Hopper and newer fetch blocks by (TMA), and whether a launch gets them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mowe_kernels.triton._launch import Hardware, setting

TMA_SINCE = 90  # capability from which blocks are fetched through descriptors,
TMA_PRODUCTS = 2**33  # where there are so many products (our choice): Triton encodes a descriptor at every launch
MOST_KEPT = 10_000  # descriptors: addresses that change for ever must not fill the memory


class Memory(NamedTuple):
    """What a descriptor has to know of its tensor: to keep one for the next call keeps no tensor alive."""

    address: int
    dtype: torch.dtype
    device: torch.device

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return -1 if self.device.index is None else self.device.index


_kept: dict[tuple, TensorDescriptor] = {}


def worth_describing(device: Hardware, products: int) -> bool:
    """Whether a kernel that multiplies so often gets descriptors: the device must have them (sm_90 and newer), and they
    must be worth what they take the host.
    """
    return device.capability >= TMA_SINCE and products >= setting("tma_products", TMA_PRODUCTS)


def operands(*blocked: tuple[Tensor, tuple[int, int]]) -> tuple[tuple[Any, ...], bool]:
    """Descriptors of matrices, each with the block it is read by, and True; the matrices themselves, and False, where a
    descriptor cannot name one of them.

    It can where elements have 16 bits, rows start at multiples of 16 bytes, and there is a row. Stacked matrices
    [E, N, K] become [E * N, K].
    """
    if all(_fits(matrix) for matrix, _ in blocked):
        return tuple(_described(matrix, block) for matrix, block in blocked), True
    return tuple(matrix for matrix, _ in blocked), False


def descriptor(memory: Memory, shape: tuple[int, int], block: tuple[int, int]) -> TensorDescriptor:
    """Of the row-major matrix that lies there; made once for as long as matrices of a shape lie at an address, as
    weights do, and often activations.
    """
    key = memory, shape, block
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        found = _kept[key] = TensorDescriptor(memory, list(shape), [shape[1], 1], list(block))
    return found


def _fits(matrix: Tensor) -> bool:
    itemsize = matrix.itemsize
    return itemsize == 2 and not (matrix.shape[-1] * itemsize | matrix.data_ptr()) % 16 and matrix.numel() > 0


def _described(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    cols = matrix.shape[-1]
    if matrix.device.type == "cpu":  # Triton's interpreter reads the tensor itself
        return TensorDescriptor.from_tensor(matrix.view(-1, cols), list(block))
    return descriptor(Memory(matrix.data_ptr(), matrix.dtype, matrix.device), (matrix.numel() // cols, cols), block)
