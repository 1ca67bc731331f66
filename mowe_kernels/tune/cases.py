"""What every op is tried on: layers of an encoder, an empty group and rows of nobody among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mowe_kernels as mk
from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.tune.accuracy import Inputs

TAIL = 5  # rows of nobody
MANY = 40  # clips, where there are many
ANALYSIS, HOP = 400, 160  # samples of a clip that a frame sees, and from one frame to the next
EVEN_FOR_FEW_ROWS = {"tma_products": 0}  # blocks fetched through descriptors


@dataclass(frozen=True)
class Size:
    """rows: of each encoder, one sequence each. width, hidden, heads: of the encoders. channels: of their input."""

    rows: tuple[int, ...] = (700, 0, 513, 129)
    width: int = 384
    hidden: int = 1536
    heads: int = 6
    channels: int = 80

    @property
    def total(self) -> int:
        return sum(self.rows)


class Case(NamedTuple):
    """op: gives a tensor. inputs: float64. rows: how many rows of the result belong to somebody. frozen: inputs without
    a gradient. same: gives integer tensors that must be those of plain torch to the bit. settings: launch settings to
    try it under.
    """

    op: Callable[..., Tensor]
    inputs: Inputs
    rows: int
    frozen: tuple[str, ...] = ()
    same: Callable[[], tuple[Tensor, ...]] | None = None
    settings: Mapping[str, Any] = MappingProxyType({})


def cases(size: Size, device: torch.device) -> dict[str, list[Case]]:
    """By op, on a device."""
    from mowe_kernels.triton.grouped_linear import Tile

    made = partial(_Maker, size, device)  # every case draws its own numbers
    programs_stay = {"gemm_tile": Tile(64, 64, 32, 4, 3, per_sm=1), "row_tiles_to_stay": 0, "tma_products": 0}
    return {
        "grouped_linear": [
            *(made().linear(), made().linear(("bias",), "gelu"), made().linear(("bias", "residual"))),
            made().linear(("bias", "row_scale"), "gelu"),
            made().linear(("bias",), "gelu")._replace(settings=EVEN_FOR_FEW_ROWS),
            made().linear(("bias", "residual"), "gelu")._replace(settings=programs_stay),
        ],
        "grouped_linear_nf4": [made().linear_nf4(False), made().linear_nf4(True)],
        "grouped_layer_norm": [made().layer_norm("gelu")],
        "grouped_mlp": [
            *(made().mlp(size.width), made().mlp(2 * size.width)),
            made().mlp(size.width)._replace(settings=EVEN_FOR_FEW_ROWS),
            made().mlp(2 * size.width)._replace(settings=programs_stay),
        ],
        "varlen_attention": [made().attention(size.heads), made().attention(max(1, size.heads // 2))],
        "grouped_conv1d": [
            made().conv(size.channels, 3, 2, 1, 1, ("bias", "positions")),
            made().conv(size.width, 4, 1, 2, 2, ("bias", "residual")),
        ],
        "sequence_norm": [made().sequence_norm()],
        "sequence_mean": [made().sequence_mean()],
        "mixture_project": [made().project(3, 2, 1), made().project(4, 4, 0), made().project_of_many(3, 2, 1)],
        "varlen_stft": [made().stft(0), made().stft(max(size.rows) * HOP)],
        "varlen_log_mel": [made().log_mel(0), made().log_mel(50)],
        "route_topk": [made().route()],
        "pack_plan": [made().plan()],
    }


class _Maker:
    def __init__(self, size: Size, device: torch.device):
        self.size, self.device = size, device
        self.random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.device)

    def packed(self, *widths: int, count: int = 0) -> Tensor:
        """Rows, as many as the encoders have without `count`, then the tail."""
        count = count or self.size.total
        rows = self.normal(count + TAIL, *widths)
        rows[count:] = torch.nan
        return rows

    def int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @property
    def offsets(self) -> Tensor:
        return self.int32([0, *accumulate(self.size.rows)])

    def linear(self, epilogue: tuple[str, ...] = (), activation: str = "") -> Case:
        (e, d, n), offsets = (len(self.size.rows), self.size.width, self.size.hidden), self.offsets
        values = {"bias": self.normal(e, n), "residual": self.packed(n), "row_scale": self.packed()}
        inputs = {"x": self.packed(d), "weight": self.normal(e, n, d, scale=d**-0.5), "bias": None}
        inputs |= {name: values[name] for name in epilogue}
        return Case(partial(mk.grouped_linear, group_offsets=offsets, activation=activation), inputs, self.size.total)

    def linear_nf4(self, double_quant: bool) -> Case:
        (e, d, n), offsets = (len(self.size.rows), self.size.width, self.size.hidden), self.offsets
        matrix = mk.nf4_quantize(self.normal(e, n, d, scale=d**-0.5).float(), double_quant=double_quant).matrix
        inputs = {"x": self.packed(d), "bias": self.normal(e, n)}

        def op(x: Tensor, bias: Tensor) -> Tensor:
            return mk.grouped_linear_nf4(x, matrix, bias, offsets, activation="gelu")

        return Case(op, inputs, self.size.total, frozen=("x", "bias"))

    def layer_norm(self, activation: str) -> Case:
        e, d = len(self.size.rows), self.size.width
        inputs = {"x": self.packed(d), "weight": self.normal(e, d), "bias": self.normal(e, d)}
        op = partial(mk.grouped_layer_norm, group_offsets=self.offsets, activation=activation)
        return Case(op, inputs, self.size.total)

    def mlp(self, d: int) -> Case:
        e, f = len(self.size.rows), self.size.hidden
        inputs = {
            "x": self.packed(d), "norm_weight": self.normal(e, d), "norm_bias": self.normal(e, d),
            "fc1_weight": self.normal(e, f, d, scale=d**-0.5), "fc1_bias": self.normal(e, f),
            "fc2_weight": self.normal(e, d, f, scale=f**-0.5), "fc2_bias": self.normal(e, d),
        }  # fmt: skip
        return Case(partial(mk.grouped_mlp, group_offsets=self.offsets), inputs, self.size.total)

    def attention(self, heads: int) -> Case:
        inputs = {"qkv": self.packed(3, heads, self.size.width // heads)}
        op = partial(mk.varlen_attention, cu_seqlens=self.offsets, max_seqlen=max(self.size.rows))
        return Case(op, inputs, self.size.total)

    def conv(self, c: int, taps: int, stride: int, padding: int, groups: int, epilogue: tuple[str, ...]) -> Case:
        lengths, (e, n) = self.size.rows, (len(self.size.rows), self.size.width)
        frames = [(t + 2 * padding - taps) // stride + 1 if t else 0 for t in lengths]
        total = sum(frames)
        inputs = {
            "x": self.packed(c), "weight": self.normal(e, n, taps, c // groups, scale=(taps * c) ** -0.5),
            "bias": self.normal(e, n), "positions": None, "residual": None,
        }  # fmt: skip
        values = {
            "bias": inputs["bias"],
            "positions": self.normal(e, max(frames), n),
            "residual": self.normal(total, n),
        }
        inputs |= {name: values[name] for name in epilogue}
        op = partial(
            mk.grouped_conv1d, starts=self.offsets[:-1], lengths=self.int32([*lengths]),
            encoder=self.int32([*range(e)]), cu_seqlens=self.int32([0, *accumulate(frames)]), num_rows=total,
            stride=stride, padding=padding, groups=groups, activation="gelu",
        )  # fmt: skip
        return Case(op, inputs, total)

    def sequence_norm(self) -> Case:
        e, n = len(self.size.rows), self.size.width
        inputs = {"x": self.packed(n), "weight": self.normal(e, n), "bias": self.normal(e, n)}
        encoder = self.int32([*range(e)])
        op = partial(mk.sequence_norm, encoder=encoder, cu_seqlens=self.offsets, activation="gelu")
        return Case(op, inputs, self.size.total)

    def sequence_mean(self) -> Case:
        op = partial(mk.sequence_mean, starts=self.offsets[:-1], lengths=self.int32([*self.size.rows]))
        return Case(op, {"x": self.packed(self.size.width)}, len(self.size.rows))

    def project_of_many(self, taps: int, stride: int, padding: int) -> Case:
        """Short clips, enough of them for the error of the slots' weights not to be the luck of a few."""
        lengths = (max(1, self.size.total // MANY),) * MANY
        return self.project(taps, stride, padding, lengths)._replace(frozen=())

    def project(self, taps: int, stride: int, padding: int, lengths: tuple[int, ...] = ()) -> Case:
        """Clip b chose encoder b (of E, modulo E) and the one after it. lengths: of the clips, in frames; the rows of
        each encoder without.
        """
        lengths, (e, d) = lengths or self.size.rows, (len(self.size.rows), self.size.width)
        base_width, n = self.size.channels, self.size.hidden
        indices = torch.tensor([[b % e, (b + 1) % e] for b in range(len(lengths))])
        plan = mk.PackPlan.build(indices, [lengths], mk.PackLayout.build([0] * e, [1]))
        rows = plan.family(0).rows
        frames = [max(0, (t + 2 * padding - taps) // stride + 1) if t else 0 for t in lengths]
        inputs = {
            "base": self.packed(base_width, count=sum(lengths)), "rows": self.normal(rows.num_rows, d),
            "weights": self.normal(len(lengths), 2),
            "base_weight": self.normal(n, taps, base_width, scale=(taps * base_width) ** -0.5),
            "row_weights": self.normal(2, n, taps, d, scale=(taps * d) ** -0.5), "bias": self.normal(n),
        }  # fmt: skip
        clock = mk.FrameClock(320, 0)
        layout = {
            "base_starts": self.int32([0, *accumulate(lengths)])[:-1], "base_lengths": self.int32([*lengths]),
            "row_offsets": [rows.cu_seqlens.to(self.device)], "position": plan.position.to(self.device),
            "base_clock": clock, "row_clocks": [clock], "cu_seqlens": self.int32([0, *accumulate(frames)]),
            "num_rows": sum(frames), "stride": stride, "padding": padding, "activation": "gelu",
        }  # fmt: skip

        def op(rows: Tensor, row_weights: Tensor, **others: Tensor) -> Tensor:
            return mk.mixture_project(rows=[rows], row_weights=[row_weights], **others, **layout)

        return Case(op, inputs, sum(frames), frozen=("weights",))

    def stft(self, padded_to: int) -> Case:
        """Clips of as many frames as each encoder has rows, which padding gives a few more."""
        clips = [t * HOP + HOP // 2 for t in self.size.rows if t]
        frames = [n // HOP if n >= padded_to else min(padded_to // HOP, n // HOP + 2) for n in clips]
        layout = {
            "cu_samples": self.int32([0, *accumulate(clips)]), "cu_frames": self.int32([0, *accumulate(frames)]),
            "num_frames": sum(frames), "hop": HOP, "padded_to": padded_to,
        }  # fmt: skip

        def op(samples: Tensor) -> Tensor:
            samples = samples.to(accumulation_dtype(samples.dtype))
            window = torch.hann_window(ANALYSIS, dtype=samples.dtype, device=samples.device)
            return torch.view_as_real(mk.varlen_stft(samples, window, **layout))

        return Case(op, {"samples": self.normal(sum(clips))}, sum(frames), frozen=("samples",))

    def log_mel(self, padding: int) -> Case:
        """padding: rows of every clip after its frames."""
        frames = [t for t in self.size.rows if t]
        rows, k, n = [t + padding for t in frames], ANALYSIS // 2 + 1, self.size.channels
        layout = {
            "cu_frames": self.int32([0, *accumulate(frames)]), "cu_rows": self.int32([0, *accumulate(rows)]),
            "num_rows": sum(rows),
        }  # fmt: skip
        # A peak's rounding is that of all it bounds. So that the error is not this one number's, it bounds one frame of
        # each clip alone, and no padding: then clips are so faint that silence is above what it gives.
        parts = self.normal(sum(frames), k, 2, scale=1e-3 if padding else 1.0)
        parts[layout["cu_frames"][:-1].long()] *= 1e-6
        inputs = {"parts": parts, "filters": self.normal(k, n).abs()}

        def op(**inputs: Tensor) -> Tensor:
            parts, filters = (x.to(accumulation_dtype(x.dtype)) for x in inputs.values())
            return mk.varlen_log_mel(torch.view_as_complex(parts), filters, **layout)

        return Case(op, inputs, sum(rows), frozen=("parts", "filters"))

    def route(self) -> Case:
        batch, e = 33, 8
        layout = {
            "lengths": self.int32([*range(2 * batch)]).view(2, batch), "rank": self.int32([*reversed(range(e))]),
            "level_bounds": self.int32([0, e, e // 2, e]).view(2, 2), "top_k": 2, "top_k_independent": 1,
        }  # fmt: skip
        inputs = {"logits": self.normal(batch, e), "learned_logits": self.normal(e)}
        ties = {name: value.round().float() for name, value in inputs.items()}

        def same() -> tuple[Tensor, ...]:
            _, indices, plan = mk.route_topk(**ties, **layout)
            return indices, *plan

        def op(**logits: Tensor) -> Tensor:
            """Weights; those of the learned logits, one for all clips, for less: their error is the luck of one."""
            weights = mk.route_topk(**logits, **layout)[0]
            return weights * weights.new_tensor([1 / 8, 1, 1])

        return Case(op, inputs, batch, same=same)

    def plan(self) -> Case:
        indices = torch.randint(-1, 8, (33, 3), generator=self.random).to(self.device)
        lengths = self.int32([*range(66)]).view(2, 33)
        rank, bounds = self.int32([*reversed(range(8))]), self.int32([0, 8, 4, 8]).view(2, 2)
        return Case(lambda: None, {}, 0, same=lambda: mk.pack_plan(indices, lengths, rank, bounds))
