"""SpecAugment blanks stripes of what the base encoder hears, anew every time, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mowe.errors import ConfigError
from mowe.training.augment import add_spec_augment
from mowe.training.config import SpecAugmentConfig
from tests.mowe.audio_llm import tiny_model
from tests.mowe.encoders import clip, hubert

CLIPS = [clip(12_000, 1), clip(7_000, 2)]


def heard(model: Any) -> dict[str, list[torch.Tensor]]:
    """What went into each encoder family during one pass: base encoder first."""
    found: dict[str, list[torch.Tensor]] = {}
    families = {"base": model.audio_tower, "weak": model.model.mixture.pool.families[0]}
    own = {name: family.encode for name, family in families.items()}
    for name, family in families.items():
        family.encode = lambda x, *rest, name=name: found.setdefault(name, []).append(x) or own[name](x, *rest)
    mask = torch.tensor([[True] * 12_000, [True] * 7_000 + [False] * 5_000])
    model.get_audio_features(torch.nn.utils.rnn.pad_sequence(CLIPS, batch_first=True), mask)
    for family in families.values():
        del family.encode
    return {name: [torch.cat(parts)] for name, parts in found.items()}


@pytest.mark.parametrize("context", ["valid", "window"])
def test_stripes_are_in_the_base_encoders_input_alone(context: str) -> None:
    model = tiny_model(context=context)
    (plain,) = heard(model)["base"]
    add_spec_augment(model, SpecAugmentConfig(time_stripes=1, time_frames=8, mel_stripes=1, mel_bins=6))
    model.eval()
    assert torch.equal(heard(model)["base"][0], plain)
    model.train()
    model.audio_tower.eval()  # as a frozen encoder is
    torch.manual_seed(0)
    runs = [heard(model) for _ in range(4)]
    assert len({run["base"][0].eq(0).sum().item() for run in runs}) > 1
    for run in runs:
        assert torch.equal(run["weak"][0], runs[0]["weak"][0]) and not run["weak"][0].eq(0).all(0).any()
        (base,) = run["base"]
        assert torch.equal(base[base != 0], plain[base != 0])
        starts = (0, 75) if context == "valid" else (0, 3_000)
        for start, frames in zip(starts, (75, 43), strict=True):
            blank = base[start : start + frames] == 0
            assert blank.all(1).sum() <= 8 and blank.all(0).sum() <= 6
            assert (blank == blank.all(1)[:, None] | blank.all(0)).all()
        if context == "window":
            assert not (base[75:3_000] == 0).any() and not (base[3_043:] == 0).any()


def test_a_stripe_leaves_most_of_a_short_clip() -> None:
    model = tiny_model().train()
    add_spec_augment(model, SpecAugmentConfig(time_stripes=1, time_frames=1_000, mel_stripes=0))
    blank = [(heard(model)["base"][0] == 0).all(1) for _ in range(20)]
    assert max(b[:75].sum() for b in blank) <= 15 and max(b[75:].sum() for b in blank) <= 8
    assert max(b.sum() for b in blank) > 8


def test_a_base_encoder_of_waveforms_is_refused() -> None:
    with pytest.raises(ConfigError, match="spec_augment: is for a base encoder that takes log-mel frames"):
        add_spec_augment(tiny_model(base=hubert(0)), SpecAugmentConfig())
