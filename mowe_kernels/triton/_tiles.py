"""The block of a program, from an op's table and the sizes of what it multiplies."""

from __future__ import annotations

from torch import Tensor

from mowe_kernels.triton._launch import cdiv, hardware, next_power_of_2, setting
from mowe_kernels.triton.grouped_linear import Tile, newest

Table = dict[tuple[int, int], tuple[Tile, Tile]]


def fitted_tile(name: str, table: Table, rows: int, cols: int, depth: int, like: Tensor, products: int = 1) -> Tile:
    """For `products` products [rows, depth] x [depth, cols] side by side, in the type of `like`.

    table: by bits of the type and capability, the block when there are enough for every multiprocessor, and the block
    when there are not. name: that of the setting.
    """
    device = hardware(like.device)
    large, small = newest(table, device, like.dtype)
    starved = cdiv(rows, large.rows) * cdiv(cols, large.cols) * products < device.num_sms
    key = f"{8 * like.itemsize} bits, {'few' if starved else 'many'} blocks"
    tile = setting(name, small if starved else large, device, key)
    narrow = at_most(tile.cols, cols)
    warps = tile.warps if narrow == tile.cols else max(4, tile.warps // 2)
    return tile._replace(cols=narrow, depth=at_most(tile.depth, depth), warps=warps)


def at_most(block: int, size: int) -> int:
    """The block, or a smaller one that holds `size`, a power of two and no smaller than matrix instructions take."""
    return min(block, max(16, next_power_of_2(size)))
