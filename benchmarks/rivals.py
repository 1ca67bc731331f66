"""Others' implementations of single ops, and why one cannot run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu
from transformers.integrations.moe import grouped_mm_experts_forward

from benchmarks.grouped import varlen

MEANINGS = {
    "loop": "torch, one call an encoder or clip",
    "reference": "this library in plain torch",
    "dense": "torch.mm of all rows with one weight: no groups, no bias, no GELU",
    "grouped_mm": "torch.nn.functional.grouped_mm, then bias and GELU",
    "scattermoe": "scattermoe's parallel_linear, then GELU",
    "megablocks": "megablocks' grouped_gemm, then bias and GELU",
    "experts_grouped_mm": "transformers' experts, grouped_mm",
    "experts_batched_mm": "transformers' experts, batched_mm",
    "torch_varlen": "torch.nn.attention.varlen",
    "flash_attn": "FlashAttention-2, varlen",
    "padded": "torch's attention, one padded and masked batch",
    "packed": "this library",
}
_PACKAGES = {"scattermoe": "scattermoe", "megablocks": "grouped_gemm", "flash_attn": "flash_attn"}


def missing(device: str) -> dict[str, str]:
    """Why a rival cannot run on a device, by its name."""
    reasons = {"experts_batched_mm": "copies both weight matrices for every row: made for few rows"}
    for name in (*_PACKAGES, "torch_varlen"):
        package = _PACKAGES.get(name)
        absent = package is not None and find_spec(package) is None
        wants = [f"{package}, which is not installed"] * absent + ["a CUDA GPU"] * (device == "cpu")
        if wants:
            reasons[name] = f"needs {' and '.join(wants)}"
    return reasons


def linears(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """gelu(x @ weight[e].T + bias[e]) of packed rows [R, K] by others, on a GPU in 16 bits."""
    absent = _absent(x)
    counts = offsets.diff().long()
    encoder = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts, output_size=len(x))
    rivals: dict[str, Callable[[], Tensor]] = {}
    if "scattermoe" not in absent:
        from scattermoe.parallel_experts import parallel_linear

        order, ends = torch.arange(len(x), device=x.device), counts.cumsum(0)
        rivals["scattermoe"] = lambda: gelu(
            parallel_linear(x, weight.mT, 1, encoder, order, ends, bias, grouped_in=True, grouped_out=True)
        )
    if "megablocks" not in absent:
        from grouped_gemm.ops import gmm

        on_host = counts.cpu()
        rivals["megablocks"] = lambda: gelu(gmm(x, weight, on_host, trans_b=True) + embedding(encoder, bias))
    return rivals


def experts(
    fc1: Tensor, fc1_bias: Tensor, fc2: Tensor, fc2_bias: Tensor, offsets: Tensor
) -> Callable[[Tensor], Tensor]:
    """fc2(gelu(fc1(h))) of packed rows by transformers, each row routed on its own as in its language models."""
    layers = {"up_proj": fc1, "up_proj_bias": fc1_bias, "down_proj": fc2, "down_proj_bias": fc2_bias}
    module = _Experts(**layers, act_fn=gelu, num_experts=len(fc1), has_bias=True)
    encoder = torch.arange(len(fc1), device=fc1.device).repeat_interleave(offsets.diff())[:, None]
    one = torch.ones(encoder.shape, dtype=fc1.dtype, device=fc1.device)
    return lambda h: grouped_mm_experts_forward(module, h, encoder, one)


class _Experts(SimpleNamespace):
    """A module of transformers' experts; whatever else a version asks of it is off."""

    def __getattr__(self, name: str) -> bool:
        return False


def attentions(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> dict[str, Callable[[], Tensor]]:
    """Attention over packed sequences by others, on a GPU in 16 bits."""
    absent = _absent(qkv)
    rivals: dict[str, Callable[[], Tensor]] = {}
    if "torch_varlen" not in absent:
        rivals["torch_varlen"] = lambda: varlen(qkv, cu_seqlens, longest)
    if "flash_attn" not in absent:
        from flash_attn import flash_attn_varlen_qkvpacked_func

        rivals["flash_attn"] = lambda: flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest).flatten(1)
    return rivals


def _absent(x: Tensor) -> set[str]:
    """Rivals that are not there, or not for these numbers: they take 16 bits alone."""
    everyone = {*_PACKAGES, "torch_varlen"}
    return everyone if x.dtype == torch.float32 else set(missing(x.device.type))
