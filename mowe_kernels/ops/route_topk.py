"""`mowe::route_topk`: from router logits to weights, choices and the packing plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mowe_kernels.dtypes import accumulation_dtype
from mowe_kernels.ops._op import DifferentiableOp, Op, check, check_shape, empty, optional
from mowe_kernels.ops.pack_plan import Plan, check_layout, plan_shapes


def _fake(logits, learned_logits, top_k, top_k_independent, lengths, rank, level_bounds):
    batch, encoders, slots = lengths.shape[1], rank.shape[0], top_k + top_k_independent
    source = logits if logits is not None else learned_logits
    weights = source.new_empty(batch, slots, dtype=accumulation_dtype(source.dtype))
    indices = source.new_empty(batch, slots, dtype=torch.int64)
    return weights, indices, *plan_shapes(lengths, batch, slots, lengths.shape[0], encoders)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, learned_logits, _, top_k_independent, *_ = inputs
    ctx.save_for_backward(logits, learned_logits, output[1])
    ctx.top_k_independent = top_k_independent
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_weights: Tensor, *_: Tensor) -> tuple:
    logits, learned_logits, indices = ctx.saved_tensors
    grads = _backward_op(grad_weights, logits, learned_logits, indices, ctx.top_k_independent)
    return *map(optional, grads), None, None, None, None, None


def _fake_backward(grad_weights, logits, learned_logits, indices, top_k_independent):
    return tuple(empty(grad_weights) if x is None else x.new_empty(x.shape) for x in (logits, learned_logits))


_backward_op = Op(
    "route_topk_backward",
    "(Tensor grad_weights, Tensor? logits, Tensor? learned_logits, Tensor indices, int top_k_independent)"
    " -> (Tensor, Tensor)",
    _fake_backward,
    module="route_topk",
    function="backward",
)
_op = DifferentiableOp(
    "route_topk",
    "(Tensor? logits, Tensor? learned_logits, int top_k, int top_k_independent, Tensor lengths, Tensor rank,"
    " Tensor level_bounds) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def route_topk(
    logits: Tensor | None,
    learned_logits: Tensor | None,
    *,
    top_k: int,
    top_k_independent: int,
    lengths: Tensor,
    rank: Tensor,
    level_bounds: Tensor,
) -> tuple[Tensor, Tensor, Plan]:
    """Softmax, top-k (ties to the lower index) and `pack_plan` in one step.

    logits: [B, E] of the data-dependent router, which fills `top_k` slots; None when top_k is 0.
    learned_logits: [E] of the data-independent router, which fills the `top_k_independent` slots before them; None
    when that is 0. lengths, rank, level_bounds: as in `pack_plan`.
    Returns weights float32 [B, k] (float64 for float64; the softmax over all E encoders, at the chosen ones), indices
    int64 [B, k] and the tensors of `pack_plan`. Only the weights carry a gradient: d logits = p * (g - sum(p * g)), g
    being the gradient scattered to the chosen encoders.
    Raises ValueError for shapes or types that do not fit and for more slots than encoders.
    """
    encoders = rank.shape[0]
    check(top_k or top_k_independent, "route_topk", "no slots: top_k and top_k_independent are both 0")
    for name, k, tensor, shape in (
        ("logits", top_k, logits, (lengths.shape[-1], encoders)),
        ("learned_logits", top_k_independent, learned_logits, (encoders,)),
    ):
        check(0 <= k <= encoders, "route_topk", f"{k} slots for {name} but only {encoders} encoders")
        check(
            (tensor is None) == (k == 0),
            "route_topk",
            f"{name} must be given exactly when it fills slots, it fills {k}",
        )
        if tensor is not None:
            check_shape("route_topk", name, tensor, shape, "one value per encoder")
    if logits is not None and learned_logits is not None:
        types = f"{logits.dtype} and {learned_logits.dtype}"
        check(logits.dtype == learned_logits.dtype, "route_topk", f"logits of one type expected, got {types}")
    check_layout("route_topk", lengths, rank, level_bounds, lengths.shape[-1])
    weights, indices, *plan = _op(logits, learned_logits, top_k, top_k_independent, lengths, rank, level_bounds)
    return weights, indices, tuple(plan)
