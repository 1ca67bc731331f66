"""How many kernels a layer, and the features before the first one, launch: what the host is asked to do for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization

import mowe_kernels
from mowe.audio import AudioBatch
from mowe.families import stacked
from mowe.families.stacked import StackedLayer, through
from mowe.features import Spectrogram
from mowe_kernels import Level, use_backend
from mowe_kernels.triton import _launch


@pytest.fixture
def launches(monkeypatch) -> list[None]:
    """Kernels are counted instead of launched, with the settings of an H100."""
    counted: list[None] = []
    monkeypatch.setattr(_launch, "_describe", lambda *args: None)
    with _launch._changed(hardware=_launch.ARCHITECTURES[90], launches=counted), use_backend("triton"):
        yield counted


def layer(width: int, pre_norm: bool = True) -> StackedLayer:
    return (
        StackedLayer(4, width, width // 64, 4 * width, pre_norm=pre_norm, key_bias=False)
        .bfloat16()
        .requires_grad_(False)
    )


def rows() -> Level:
    return Level(torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([0, 4, 4, 8, 8], dtype=torch.int32), 8, 4)


@pytest.mark.parametrize(
    ("width", "pre_norm", "count"),
    [
        (384, True, 5),  # norm, queries keys values, attention, output, feed-forward half
        (768, True, 7),  # too wide for that in one: norm, up, down
        (768, False, 7),
    ],
)
@torch.no_grad()
def test_launches_of_a_layer(launches, width, pre_norm, count):
    layer(width, pre_norm)(torch.empty(8, width, dtype=torch.bfloat16), rows())
    assert len(launches) == count


@torch.no_grad()
def test_parameters_under_another_name():
    """Of a layer whose parts hold something in the place of a parameter, as parametrizations and wrappers do."""
    made, x = layer(64).float(), torch.randn(8, 64)
    expected = made(x, rows())
    register_parametrization(made.fc1, "weight", torch.nn.Identity())
    assert torch.equal(made(x, rows()), expected)


@torch.no_grad()
def test_layers_are_asked_for_together(monkeypatch):
    """Where nobody looks in between and they are alike."""
    asked, seen = [], []
    layers, x = [layer(64).float() for _ in range(3)], torch.randn(8, 64)

    def encoder_layers(x: torch.Tensor, parameters: list, *given: object, **how: object) -> torch.Tensor:
        asked.append(len(parameters))
        return mowe_kernels.encoder_layers(x, parameters, *given, **how)

    def together() -> bool:
        """Whether they were, for the same result; `seen` is what was seen meanwhile."""
        expected = layers[2](layers[1](layers[0](x, rows()), rows()), rows())
        asked.clear(), seen.clear()
        assert torch.equal(through(layers, x, rows()), expected)
        return asked == [3]

    monkeypatch.setattr(stacked, "encoder_layers", encoder_layers)
    assert together()
    with torch.enable_grad():
        assert not together()
    for register in (
        layers[1].register_forward_hook,
        layers[1].register_forward_pre_hook,
        register_module_forward_hook,
    ):
        hook = register(lambda module, *_: seen.append("a call") if module is layers[1] else None)
        assert not together() and seen == ["a call"]
        hook.remove()
    forward = layers[1].forward
    layers[1].forward = lambda *given: seen.append("instead") or forward(*given)
    assert not together() and seen == ["instead"]
    del layers[1].forward
    layers[2].eps = 0.5
    assert not together()
    layers[0].eps = layers[1].eps = 0.5
    assert together()
    layers[1].compile(backend=lambda graph, _: lambda *given: seen.append("compiled") or graph(*given))
    assert not together() and "compiled" in seen
    layers[1]._compiled_call_impl = None
    register_parametrization(layers[0].fc1, "weight", torch.nn.Identity())
    assert not together()


@pytest.mark.parametrize("context", ["valid", "window"])
def test_launches_of_log_mel_features(launches, context):
    """The frames of all clips, then filters and what needs the peak of a clip for every bank; the transform besides."""
    spectra = Spectrogram(AudioBatch.from_waveforms([torch.zeros(400), torch.zeros(7_321)]), context)
    for bins, count in ((80, 3), (128, 5)):
        spectra.log_mel(bins)
        assert len(launches) == count
