"""Pools whose linear layers are in 4 bits (NF4), by this library and by bitsandbytes' own layers in transformers."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from torch import nn

import mowe
from benchmarks.providers import Outputs, Provider, Run, loop
from benchmarks.workloads import Workload
from mowe.families import Context


def packed_nf4(workload: Workload, context: Context | None = None) -> Run:
    pool = mowe.quantize(mowe.EncoderPool.from_encoders(workload.encoders()), double_quant=False)
    waveforms = workload.waveforms()

    def run() -> Outputs:
        return pool.encode(waveforms, workload.indices, context or workload.context).pairs()

    return run


def nf4_loop(workload: Workload, in_bf16: bool = False) -> Run:
    """in_bf16: bitsandbytes' own choice on a CPU that can, inputs and scales rounded to bfloat16."""
    encoders = [_in_4_bits(encoder, in_bf16) for encoder in workload.encoders()]
    return loop(workload, encoders, [lambda x, e=e: e(x).last_hidden_state for e in encoders])


def _needs_bitsandbytes() -> str | None:
    return None if find_spec("bitsandbytes") else "needs bitsandbytes, which is not installed"


def _needs_products_in_bf16() -> str | None:
    if reason := _needs_bitsandbytes():
        return reason
    from bitsandbytes.functional import has_avx512bf16

    return None if has_avx512bf16() else "bitsandbytes has such products where the CPU has AVX512-BF16"


NF4 = {
    "packed_nf4": Provider(
        packed_nf4, None, "one packed pass, weights in NF4, from waveforms", "packed_nf4", dtype="nf4"
    ),
    "nf4_loop": Provider(
        nf4_loop,
        "window",
        "transformers with bitsandbytes' Linear4bit, one batch an encoder, features given",
        "packed_nf4",
        missing=_needs_bitsandbytes,
        dtype="nf4",
    ),
    "nf4_loop_bf16": Provider(
        partial(nf4_loop, in_bf16=True),
        "window",
        "the same layers with bitsandbytes' products in bfloat16, features given",
        "packed_nf4",
        missing=_needs_products_in_bf16,
        dtype="nf4",
        tolerance=1e-2,
    ),
}


def _in_4_bits(encoder: nn.Module, in_bf16: bool) -> nn.Module:
    """The encoder with bitsandbytes' layers in the place of nn.Linear, which is all that the library quantises."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(encoder.named_modules()):
        if isinstance(linear, nn.Linear):
            how = {"compress_statistics": False, "quant_type": "nf4"}
            sizes = linear.in_features, linear.out_features
            layer = Linear4bit(*sizes, compute_dtype=linear.weight.dtype, **how)
            weight = Params4bit(linear.weight.data, requires_grad=False, **how)
            layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias
            layer.support_avx512bf16_for_cpu &= in_bf16
            encoder.set_submodule(name, layer)
    return encoder.eval()
