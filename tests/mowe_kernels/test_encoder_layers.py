"""Several layers are what one after the other gives."""

from __future__ import annotations

import pytest
import torch

from mowe_kernels import LayerParameters, encoder_layer, encoder_layer_nf4, encoder_layers
from tests.mowe_kernels.checks import normal, offsets
from tests.mowe_kernels.test_encoder_layer_nf4 import HEADS, D, make

SIZES = (4, 0, 3)
FULL, IN_4_BITS = [make(len(SIZES))[1] for _ in range(3)], [make(len(SIZES))[0] for _ in range(3)]


@pytest.mark.parametrize(
    "layers", [FULL, IN_4_BITS, [FULL[0], IN_4_BITS[0]], FULL[:1], []], ids=["full", "4 bits", "both", "one", "none"]
)
@pytest.mark.parametrize("pre_norm", [True, False])
def test_one_after_the_other(layers, pre_norm):
    x, at = normal(sum(SIZES), D).float(), offsets(SIZES)
    how = {"heads": HEADS, "pre_norm": pre_norm, "eps": 0.1}
    expected = x
    for layer in layers:
        one = encoder_layer if isinstance(layer, LayerParameters) else encoder_layer_nf4
        expected = one(expected, layer, at, at, max(SIZES), **how)
    assert torch.equal(encoder_layers(x, layers, at, at, max(SIZES), **how), expected)


def test_gradients_go_through_all():
    layers = [LayerParameters(*(part.clone().requires_grad_() for part in layer)) for layer in FULL]
    x, at = normal(sum(SIZES), D).float().requires_grad_(), offsets(SIZES)
    encoder_layers(x, layers, at, at, max(SIZES), heads=HEADS, key_bias=False).sum().backward()
    assert all(tensor.grad is not None for tensor in (x, *(part for layer in layers for part in layer)))
    of_keys = [layer.qkv_bias.grad.unflatten(1, (3, D))[:, 1] for layer in layers]
    assert not any(map(torch.count_nonzero, of_keys))


@pytest.mark.parametrize("layers", [FULL, IN_4_BITS], ids=["full", "4 bits"])
def test_layers_that_are_known_are_launched_together(layers, monkeypatch):
    asked = []
    op = "encoder_layer" if layers is FULL else "encoder_layer_nf4"
    again = f"mowe_kernels.reference.{op}.again"
    x, at = normal(sum(SIZES), D).float(), offsets(SIZES)
    monkeypatch.setattr(again, lambda *given: asked.append(given) or [torch.full_like(x, 7)], raising=False)
    assert (encoder_layers(x, layers, at, at, max(SIZES), heads=HEADS) == 7).all() and len(asked) == 1
    # Nobody keeps there what a gradient would need.
    if layers is FULL:
        monkeypatch.setattr(again, lambda x, saves, *given: asked.append(saves) or ())
        encoder_layers(x.requires_grad_(), layers, at, at, max(SIZES), heads=HEADS)
        assert asked[1:] == [True] * len(layers)
