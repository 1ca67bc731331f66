"""A mixture captured for the longest clips, replayed under other lengths and another routing.

There is no CUDA graph on the CPU: in its place the captured function runs again over the same buffers, in the shapes
of the longest clips, without a look at any length on the host. The real thing is tried in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe import AudioError, ConfigError, EncoderPool, MixtureOfWeakEncoders, MoweConfig, graphs
from mowe.graphs import MixtureGraph
from tests.mowe.encoders import assert_same, clip, hubert, whisper

WIDTH, OUT, CLIPS, SAMPLES, FRAMES = 32, 20, 3, 16_000, 50
BATCHES = ((16_000, 16_000, 16_000), (9_000, 400, 12_321), (480, 15_999, 640))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> list[list[torch.Size]]:
    """Runs the function again; the shapes of every run."""
    shapes = []

    def capture(run, device):
        def replay():
            out = run()
            shapes.append(out.tokens.shape)
            return out

        replay()
        return replay

    monkeypatch.setattr(graphs, "_capture", capture)
    return shapes


def mixture(context: str = "valid", encoders=(whisper, whisper, hubert), **settings: object) -> MixtureOfWeakEncoders:
    torch.manual_seed(0)
    pool = EncoderPool.from_encoders([encoder(seed) for seed, encoder in enumerate(encoders)], context=context)
    config = MoweConfig(
        audio_config=whisper().config,
        text_config={"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 2},
        pool_config=pool.config,
        projector_hidden_size=16,
        **settings,
    )
    made = MixtureOfWeakEncoders(config, pool)
    torch.nn.init.normal_(made.router.dependent.weight, std=0.4)
    return made.eval()


def inputs(lengths: tuple[int, ...], padding: int = 0) -> tuple[Tensor, list[Tensor], list[int]]:
    """Base features padded to the longest clip and beyond, waveforms, and how many base frames are real."""
    frames = [-(-(samples // 160) // 2) for samples in lengths]
    base = torch.randn(len(lengths), max(frames) + padding, WIDTH)
    return base, [clip(n, i) for i, n in enumerate(lengths)], frames


SETTINGS = {
    "two families": {},
    "one family": {"encoders": (whisper, whisper, whisper)},
    "windows": {"context": "window"},
    "stack": {"projector_type": "stack", "projector_stride": 5},
}


@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
@torch.no_grad()
def test_replay_is_the_mixture(settings, stand_in):
    made = mixture(**settings)
    graph = made.capture(CLIPS, SAMPLES, FRAMES)
    assert isinstance(graph, MixtureGraph)
    kept = []
    for lengths in BATCHES:
        made.router.dependent.weight.neg_()
        made.router.independent_logits.copy_(torch.randn(3))
        given = inputs(lengths, padding=3)
        out, expected = graph(*given), made(*given)
        kept.append((out, expected))
        assert out.lengths == expected.lengths
        assert out.plan.lengths == expected.plan.lengths
    for out, expected in kept:  # later replays have left the results alone
        assert_same(out.tokens, expected.tokens)
        assert torch.equal(out.indices, expected.indices)
        assert torch.equal(out.plan.cu_seqlens, expected.plan.cu_seqlens)
        assert_same(out.aux_loss[None], expected.aux_loss[None])
        assert_same(out.clip(2), expected.clip(2))
    assert len({str(out.indices) for out, _ in kept}) > 1
    assert len(set(stand_in)) == 1


@torch.no_grad()
def test_parameters_are_read_where_they_lie():
    made = mixture()
    graph, given = made.capture(CLIPS, SAMPLES, FRAMES), inputs(BATCHES[1])
    before = graph(*given).tokens
    made.multi_modal_projector.linear.weight.mul_(2)
    after = graph(*given).tokens
    assert not torch.allclose(before, after)
    assert_same(after, made(*given).tokens)


def test_what_lies_beyond_a_clip_is_not_read():
    """Buffers keep the ends of longer clips from before, and base features may hold anything there."""
    graph = mixture().capture(CLIPS, SAMPLES, FRAMES)
    base, waves, frames = inputs(BATCHES[2])
    expected = graph(base, waves, frames).tokens
    graph(*inputs(BATCHES[0]))
    for clip_base, count in zip(base, frames, strict=True):
        clip_base[count:] = torch.nan
    assert torch.equal(graph(base, waves, frames).tokens, expected)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((400, 400), "captured for 3 clips, got 2"),
        ((400, 16_001, 400), "clip 1: captured for up to 16000 samples and 50 base frames, got 16001 and 50"),
    ],
)
def test_more_than_was_captured_for(lengths, said):
    graph = mixture().capture(CLIPS, SAMPLES, FRAMES)
    with pytest.raises(AudioError, match=said):
        graph(*inputs(lengths))


@pytest.mark.parametrize(
    ("bounds", "error", "said"),
    [
        ((0, SAMPLES, FRAMES), ConfigError, "at least one clip and one base frame, got 0 and 50"),
        ((CLIPS, SAMPLES, 0), ConfigError, "at least one clip and one base frame, got 3 and 0"),
        ((CLIPS, 399, FRAMES), AudioError, "expected at least 400 samples"),
        ((CLIPS, 500_000, FRAMES), AudioError, "at most 480000 samples, got 500000"),
    ],
)
def test_bounds_that_cannot_be(bounds, error, said):
    with pytest.raises(error, match=said):
        mixture().capture(*bounds)


def test_there_is_no_cuda_graph_elsewhere(monkeypatch):
    monkeypatch.undo()  # the stand-in
    with pytest.raises(ConfigError, match="needs the mixture on a CUDA device, it is on cpu"):
        mixture().capture(CLIPS, SAMPLES, FRAMES)
