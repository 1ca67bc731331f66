"""Device functions the kernels share."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e**x of x up to 88, float32, to its last bit or so, NaN for NaN; 0 below 1e-38. `tl.exp` takes a power of two of
    a product that is rounded, the more bits off the larger x is.
    """
    x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))  # x - n ln 2, the first product exact
    y = 1.9875691500e-4  # Cephes' expf
    y = y * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    return y * tl.exp2(n)


@triton.jit
def normal_tail(a):
    """Phi(-a) for a in 0..6, float32, within 1e-5 of itself.

    Two to the power of a polynomial, fitted by us to the logarithm for the least largest error: few enough
    instructions to hide behind matrix products, which those of erf are not.
    """
    power = -1.8347722e-06
    power = power * a + 6.1597464e-05
    power = power * a - 9.305179e-04
    power = power * a + 8.507862e-03
    power = power * a - 5.3960003e-02
    power = power * a - 4.5846447e-01
    power = power * a - 1.1512510e00
    power = power * a - 9.9999529e-01
    return tl.exp2(power)


@triton.jit
def gelu(x, NARROW: tl.constexpr = False):
    """x * Phi(x), Phi being the normal distribution function, float32. NARROW: for a result kept in 16 bits."""
    if NARROW:
        a = tl.minimum(tl.abs(x), 6.0, propagate_nan=tl.PropagateNan.ALL)  # a GPU's plain minimum of NaN and 6 is 6
        y = tl.maximum(x, 0.0) - a * normal_tail(a)
    else:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return y


@triton.jit
def gelu_grad(x, NARROW: tl.constexpr = False):
    """Derivative of `gelu`: Phi(x) + x * phi(x), float32. NARROW: for a result kept in 16 bits."""
    density = tl.exp2(-0.7213475204444817 * x * x) * 0.3989422804014327
    if NARROW:
        a = tl.minimum(tl.abs(x), 6.0)
        tail = normal_tail(a) - a * density
        y = tl.where(x < 0.0, tail, 1.0 - tail)
    else:
        y = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    return y


@triton.jit
def add_product(acc, a, b):
    """acc + a @ b, float32.

    In float32 one long chain of additions would lose more than BLAS does, so the product is summed up on its own first;
    a plain addition of it Triton would make part of the chain again.
    """
    narrow: tl.constexpr = a.dtype != tl.float32
    return tl.dot(a, b, acc) if narrow else tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)


@triton.jit
def find_tile(p_offsets, tile, tile_rows, E: tl.constexpr, BE: tl.constexpr):
    """(group, first row, one past the group's last row) of a tile; first >= last where the tile has no rows.

    p_offsets: int32 [E+1], p_offsets[0] = 0. BE: a power of two, at least E.
    Group e owns the tiles from p_offsets[e] // tile_rows + e on. That is never fewer than ceil(its rows / tile_rows)
    and at least one, and it needs neither a scan nor a table: all tiles of R rows are R // tile_rows + E.
    """
    groups = tl.arange(0, BE)
    first_rows = tl.load(p_offsets + groups, mask=groups < E, other=0)
    owned = (groups < E) & (first_rows // tile_rows + groups <= tile)
    group = tl.sum(owned.to(tl.int32), 0) - 1
    group_start = tl.load(p_offsets + group)
    start = group_start + (tile - group_start // tile_rows - group) * tile_rows
    return group, start, tl.load(p_offsets + group + 1)
