"""Weights of several encoders in 4 bits, every encoder's matrix in exactly the format of bitsandbytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mowe_kernels.ops.nf4_dequantize_grouped import Nf4Matrix, nf4_dequantize_grouped
from mowe_kernels.ops.nf4_quantize import nf4_encode
from mowe_kernels.reference.nf4_nested import NESTED_BLOCKSIZE, quantize_absmax
from mowe_kernels.reference.nf4_quantize import NF4_CODE

_STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Nf4Weight:
    """A stack of E matrices [N, K] in 4 bits.

    codes: uint8 [E, ceil(N K / 2)], two values a byte, the first in the high bits. absmax: [E, blocks], the largest
    magnitude of every `blocksize` values in a row of memory, float32, or uint8 where it is quantised itself; then
    nested_absmax: float32 [E, ceil(blocks / 256)], nested_offset: float32 [E], nested_code: float32 [E, 256].
    shape: (N, K). dtype: that of the weights it was made of.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_code: Tensor | None = None

    def __post_init__(self) -> None:
        self.matrix.check("Nf4Weight")

    @property
    def matrix(self) -> Nf4Matrix:
        """The same as the ops take it."""
        return Nf4Matrix(
            self.codes,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.nested_code,
            *self.shape,
            self.blocksize,
        )

    def to(self, device: torch.device | str) -> Nf4Weight:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if _is_tensor(self, f.name)}
        return replace(self, **moved)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[E, N, K] in `dtype`, that of the original weights by default."""
        encoders = self.codes.shape[0]
        everyone = torch.arange(encoders + 1, dtype=torch.int32, device=self.codes.device)
        return nf4_dequantize_grouped([self.matrix], everyone, dtype or self.dtype)[0]

    def nbytes(self) -> int:
        """Bytes of storage, scales included."""
        return sum(getattr(self, f.name).nbytes for f in fields(self) if _is_tensor(self, f.name))

    def quant_state(self, encoder: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One encoder's data [bytes, 1] and its packed `QuantState.as_dict`, as bitsandbytes saves them."""
        settings = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {"absmax": self.absmax[encoder], "quant_map": NF4_CODE.to(self.codes.device, copy=True)}
        if self.nested_absmax is not None:
            state |= {"nested_absmax": self.nested_absmax[encoder], "nested_quant_map": self.nested_code[encoder]}
            settings |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset[encoder].item(),
            }
        packed = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device=self.codes.device)
        return self.codes[encoder][:, None], state | {_STATE: packed}

    @classmethod
    def from_quant_states(cls, entries: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> Nf4Weight:
        """A stack from each encoder's data and packed `QuantState.as_dict`.

        Raises ValueError for another quantisation than NF4, a wrong code table, settings that cannot be read, sizes
        that do not fit, and encoders that are not quantised alike.
        """
        if not entries:
            raise ValueError("Nf4Weight: expected the state of one encoder or more, got none")
        stack = [_read_state(data, state, e) for e, (data, state) in enumerate(entries)]
        first = stack[0]
        for e, other in enumerate(stack):
            for name in ("shape", "dtype", "blocksize"):
                mine, theirs = getattr(first, name), getattr(other, name)
                if mine != theirs:
                    raise ValueError(f"Nf4Weight: encoder {e} has {name} {theirs}, encoder 0 has {mine}")
            if (first.nested_absmax is None) != (other.nested_absmax is None):
                raise ValueError(f"Nf4Weight: encoder {e} and encoder 0 differ in double quantisation")
        names = [f.name for f in fields(cls) if _is_tensor(first, f.name)]
        return replace(first, **{name: torch.cat([getattr(one, name) for one in stack]) for name in names})


def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = False) -> Nf4Weight:
    """Quantise every encoder's matrix as `bitsandbytes.functional.quantize_4bit(..., quant_type="nf4")` does.

    weight: [E, N, K] float32, bfloat16 or float16. double_quant: whether the scales are quantised too, to 8 bits.
    Raises ValueError for another shape, type or block size.
    """
    codes, absmax = nf4_encode(weight, blocksize)
    nested = quantize_absmax(absmax) if double_quant else (absmax,)
    names = ("absmax", "nested_absmax", "nested_offset", "nested_code")
    return Nf4Weight(
        codes=codes,
        shape=tuple(weight.shape[1:]),
        dtype=weight.dtype,
        blocksize=blocksize,
        **dict(zip(names, nested, strict=False)),
    )


def _is_tensor(weight: Nf4Weight, name: str) -> bool:
    return isinstance(getattr(weight, name), Tensor)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_settings(packed: Tensor, who: str) -> dict:
    """The settings that bitsandbytes saves as the bytes of a JSON object."""
    try:
        if packed.dtype != torch.uint8:
            raise ValueError(f"{packed.dtype} values")
        settings = json.loads(bytes(packed.flatten().tolist()))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}")
    except ValueError as error:
        raise ValueError(f"{who}: expected {_STATE!r} to be a JSON object in uint8, got {error}") from None
    return settings


def _read_state(data: Tensor, state: Mapping[str, Tensor], encoder: int) -> Nf4Weight:
    """A stack of one from what bitsandbytes saves of a matrix."""
    who = f"Nf4Weight: encoder {encoder}"
    state = {key.split("weight.")[-1]: value for key, value in state.items()}
    if _STATE not in state:
        raise ValueError(f"{who}: expected {_STATE!r} in its state, got {sorted(state)}")
    try:
        settings = _read_settings(state[_STATE], who)
        if settings["quant_type"] != "nf4" or not torch.equal(state["quant_map"].cpu(), NF4_CODE):
            raise ValueError(f"{who}: its code table is not that of nf4 (quant_type {settings['quant_type']!r})")
        shape, blocksize, absmax = settings["shape"], settings["blocksize"], state["absmax"]
        dtype = _DTYPES.get(str(settings["dtype"]))
        if not isinstance(shape, list) or len(shape) != 2 or not all(_is_integer(n) and n > 0 for n in shape):
            raise ValueError(f"{who}: expected a shape of two positive integers, got {shape!r}")
        if not _is_integer(blocksize):
            raise ValueError(f"{who}: expected an integer as blocksize, got {blocksize!r}")
        if dtype is None:
            raise ValueError(f"{who}: expected a dtype of {', '.join(_DTYPES)}, got {settings['dtype']!r}")
        nested = {}
        if "nested_absmax" in state:
            if (settings["nested_blocksize"], settings["nested_dtype"]) != (NESTED_BLOCKSIZE, "float32"):
                raise ValueError(f"{who}: expected scales quantised in float32 blocks of {NESTED_BLOCKSIZE}")
            offset = settings["nested_offset"]
            if not isinstance(offset, int | float) or not math.isfinite(offset):
                raise ValueError(f"{who}: expected a finite number as nested_offset, got {offset!r}")
            nested = {
                "nested_absmax": state["nested_absmax"][None],
                "nested_offset": absmax.new_tensor([offset], dtype=torch.float32),
                "nested_code": state["nested_quant_map"][None],
            }
        codes = data.view(torch.uint8).flatten()[None]
        return Nf4Weight(codes, absmax[None], tuple(shape), dtype, blocksize, **nested)
    except KeyError as error:
        raise ValueError(f"{who}: its state has no usable {error}") from None
