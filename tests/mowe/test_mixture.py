"""Router, pool and projector together against a loop over clips with transformers encoders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mowe import AudioError, ConfigError, EncoderPool, MixtureOfWeakEncoders, MixtureOutput, MoweConfig
from mowe_kernels import FrameClock
from tests.mowe.encoders import LARGE, assert_same, assert_same_gradients, clip, hubert, wav2vec2, whisper
from tests.mowe.naive import NaiveMixture, encoder_gradients

BASE_WIDTH, OUT = 32, 20
ENCODERS = [whisper(0), hubert(1), wav2vec2(2, **LARGE), whisper(3), hubert(4)]
LENGTHS = [9_000, 400, 16_321]
TEXT = {"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 2}


def mixture(context: str = "valid", encoders=ENCODERS, **settings: object) -> MixtureOfWeakEncoders:
    """In double precision, with routers that tell the clips apart."""
    torch.manual_seed(0)
    pool = EncoderPool.from_encoders([encoder.double() for encoder in encoders], context=context)
    settings = {"audio_config": whisper().config, "text_config": TEXT, "projector_hidden_size": 16, **settings}
    made = MixtureOfWeakEncoders(MoweConfig(pool_config=pool.config, **settings), pool).double()
    for parameter in (*made.router.parameters(), *made.multi_modal_projector.parameters()):
        torch.nn.init.normal_(parameter, std=0.4)
    return made.eval()


class Inputs:
    """Clips and random base features of each, one frame in 20 ms."""

    def __init__(self, lengths: list[int] = LENGTHS, frames: list[int] | None = None):
        torch.manual_seed(1)
        self.waves = [clip(samples, seed) for seed, samples in enumerate(lengths)]
        frames = frames or [-(-(samples // 160) // 2) for samples in lengths]
        self.base = [
            (torch.randn(n, BASE_WIDTH, dtype=torch.float64) + torch.randn(BASE_WIDTH)).requires_grad_() for n in frames
        ]

    def mix(self, made: MixtureOfWeakEncoders) -> MixtureOutput:
        longest = max(map(len, self.base))
        loud = [1e3 * torch.randn(longest - len(frames), BASE_WIDTH) for frames in self.base]
        padded = torch.stack([torch.cat(pair) for pair in zip(self.base, loud, strict=True)])
        return made(padded, self.waves, [len(frames) for frames in self.base])

    def gradients(self) -> dict[str, Tensor]:
        gradients = {f"base {b}": frames.grad for b, frames in enumerate(self.base)}
        for frames in self.base:
            frames.grad = None
        return gradients


def paper_loss(independent: Tensor | None, dependent: Tensor | None) -> Tensor:
    def h(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(-1)

    loss = torch.zeros((), dtype=torch.float64)
    if independent is not None:
        loss = loss + h(independent.softmax(-1))
    if dependent is not None:
        p = dependent.softmax(-1)
        loss = loss + h(p).mean() - h(p.mean(0))
    return 0.1 * loss


def assert_naive(made: MixtureOfWeakEncoders, inputs: Inputs) -> MixtureOutput:
    """Tokens, choices, losses and the gradient of everything that has one equal those of the loop."""
    naive = NaiveMixture(made)
    tokens, choices, independent, dependent = naive(inputs.base, inputs.waves)
    loss = paper_loss(independent, dependent)
    cotangents = [torch.randn_like(t) for t in tokens]
    (sum((t * g).sum() for t, g in zip(tokens, cotangents, strict=True)) + 5 * loss).backward()
    expected = inputs.gradients()

    out = inputs.mix(made)
    assert out.indices.tolist() == choices
    assert out.aux_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert out.lengths == tuple(map(len, tokens))
    for b, rows in enumerate(tokens):
        assert_same(out.clip(b), rows)
    own = sum((out.clip(b) * g).sum() for b, g in enumerate(cotangents)) + 5 * out.aux_loss
    own.backward()
    assert_same_gradients(inputs.gradients(), expected)

    projector = made.multi_modal_projector
    gradients = {name: parameter.grad for name, parameter in projector.named_parameters()}
    naive_gradients = naive.projector.gradients(projector)
    routers = []
    for router, ours, theirs in (
        ("independent", made.router.independent_logits, naive.independent),
        ("dependent", made.router.dependent.weight if made.router.dependent else None, naive.dependent),
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.grad.shape == theirs.grad.shape, router
            routers.append((ours.grad.flatten(), theirs.grad.flatten()))
    # As one, and beside the projector's: a router's may be a small difference of large terms, whose float32 features
    # differ in their last bits from one run to the next.
    gradients["routers"], naive_gradients["routers"] = map(torch.cat, zip(*routers, strict=True))
    assert_same_gradients(gradients, naive_gradients)
    chosen = {encoder for row in choices for encoder in row}
    for index, encoder in enumerate(naive.encoders):
        ours = encoder_gradients(made.pool, index, encoder)
        if index in chosen:
            assert_same_gradients(ours, {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
        else:
            assert not any(gradient.any() for gradient in ours.values())
    return out


SETTINGS = {
    "the paper's": {},
    "stack": {"projector_type": "stack", "projector_stride": 5},
    "straight-through": {"router_straight_through": True},
    "stack, straight-through": {"projector_type": "stack", "router_straight_through": True},
    "not scaled": {"scale_by_weight": False},
    "temperature": {"router_temperature": 0.5},
    "two dependent slots": {"num_independent_slots": 0, "num_dependent_slots": 2},
    "two independent slots": {"num_independent_slots": 2, "num_dependent_slots": 0, "projector_type": "stack"},
    "two slots of each": {"num_independent_slots": 2, "num_dependent_slots": 2, "projector_stride": 4},
    "every encoder": {"num_independent_slots": 1, "num_dependent_slots": 5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_everything_equals_the_loop(settings):
    assert_naive(mixture(**settings), Inputs())


@pytest.mark.parametrize("projector_type", ["conv", "stack"])
@pytest.mark.parametrize("encoder", [0, 1, 2])
def test_both_routers_choose_the_same_encoder(projector_type, encoder):
    made, inputs = mixture(projector_type=projector_type), Inputs()
    with torch.no_grad():
        made.router.independent_logits[encoder] = 2.0
        made.router.dependent.weight *= 0.1
        made.router.dependent.weight[encoder] = 0.1
        for frames in inputs.base:
            frames += 0.5
    out = assert_naive(made, inputs)
    assert out.indices.tolist() == [[encoder, encoder]] * 3


def test_windows_of_whisper_beside_wave_frames():
    out = assert_naive(mixture(context="window", num_dependent_slots=5), Inputs([20_000], [70]))
    assert set(out.indices[0, 1:].tolist()) == set(range(5))


def test_30_s_of_1500_and_1499_frames():
    made = mixture(encoders=[whisper(5), hubert(6)], num_independent_slots=0, num_dependent_slots=2)
    out = assert_naive(made, Inputs([480_000]))
    assert sorted(len(out_rows) for out_rows in made.pool.encode([clip(480_000)], [[0, 1]]).rows) == [1_499, 1_500]
    assert out.lengths == (188,)


@pytest.mark.parametrize("projector_type", ["conv", "stack"])
def test_a_wave_encoder_as_base(projector_type):
    made = mixture(audio_config=hubert(hidden_size=BASE_WIDTH).config, projector_type=projector_type)
    assert_naive(made, Inputs(frames=[(samples - 80) // 320 for samples in LENGTHS]))


@pytest.mark.parametrize("joined", [2, 4])
def test_base_frames_that_were_joined(joined):
    """25 and 12.5 a second: each meets the weak frame in its middle, the later of two."""
    made = mixture(encoders=ENCODERS[:1], projector_type="stack", projector_stride=1, num_dependent_slots=0)
    base, waves = torch.randn(1, 10, BASE_WIDTH), [clip(joined * 3_200)]
    expected = made(base.repeat_interleave(joined, dim=1), waves).tokens[joined // 2 :: joined]
    made.base_clock = FrameClock(hop=320 * joined, offset=160 * (joined - 1))
    assert_same(made(base, waves).tokens, expected)


def test_a_single_encoder():
    assert_naive(mixture(encoders=[hubert(3)]), Inputs([5_000, 400]))


def test_normalised_waves():
    settings = {"audio_config": whisper().config, "text_config": TEXT}
    extractor = type("Extractor", (), {"do_normalize": True})
    pool = EncoderPool.from_encoders([hubert(1).double(), wav2vec2(2).double()], [extractor, None], "valid")
    made = MixtureOfWeakEncoders(MoweConfig(pool_config=pool.config, num_dependent_slots=2, **settings), pool)
    assert_naive(made.double(), Inputs())


@pytest.mark.parametrize("context", ["valid", "window"])
@pytest.mark.parametrize("projector_type", ["conv", "stack"])
def test_batch_equals_single_in_any_order(context, projector_type):
    made, inputs = mixture(context, projector_type=projector_type, num_dependent_slots=2).float(), Inputs()
    for frames in inputs.base:
        frames.data = frames.data.float()
    order = [2, 0, 1]
    shuffled = Inputs()
    shuffled.waves, shuffled.base = ([part[b] for b in order] for part in (inputs.waves, inputs.base))
    with torch.no_grad():
        out, shuffled_out = inputs.mix(made), shuffled.mix(made)
        for place, b in enumerate(order):
            single = made(inputs.base[b][None], [inputs.waves[b]])
            for one in (single.clip(0), shuffled_out.clip(place)):
                assert_same(one, out.clip(b))
            assert single.indices.tolist() == out.indices[b : b + 1].tolist()
            assert_same(single.weights[0], out.weights[b])


def test_loud_neighbours_do_not_matter():
    made, quiet, loud = mixture(num_dependent_slots=2), Inputs(), Inputs()
    loud.waves[0], loud.waves[2] = clip(12_000, 8, gain=50.0), clip(500, 9, gain=50.0)
    with torch.no_grad():
        loud.base[0] *= 1e3
        assert_same(loud.mix(made).clip(1), quiet.mix(made).clip(1))


def test_a_frozen_pool_leaves_the_other_gradients_as_they_are():
    free, frozen = mixture(), mixture()
    frozen.pool.requires_grad_(False)
    for made in (free, frozen):
        out = Inputs().mix(made)
        (out.tokens.square().sum() + out.aux_loss).backward()
    assert all(parameter.grad is None for parameter in frozen.pool.parameters())
    for part in ("router", "multi_modal_projector"):
        for one, other in zip(getattr(frozen, part).parameters(), getattr(free, part).parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        assert any(parameter.grad.any() for parameter in getattr(frozen, part).parameters())


def test_training_mode_without_noise_changes_nothing():
    made = mixture()
    evaluated = Inputs().mix(made)
    trained = Inputs().mix(made.train())
    assert torch.equal(trained.tokens, evaluated.tokens) and torch.equal(trained.aux_loss, evaluated.aux_loss)


def test_base_features_without_padding_need_no_lengths():
    made, inputs = mixture(), Inputs([5_000, 5_000])
    base = torch.stack(inputs.base)
    assert torch.equal(made(base, inputs.waves).tokens, inputs.mix(made).tokens)


def test_base_lengths_in_a_tensor():
    given = torch.randn(2, 9, BASE_WIDTH), [clip(3_000), clip(2_000)]
    out, expected = (mixture()(*given, lengths) for lengths in (torch.tensor([9, 6]), [9, 6]))
    assert torch.equal(out.tokens, expected.tokens)
    assert list(map(type, out.lengths)) == [int, int]


@torch.no_grad()
def test_a_clip_with_a_nan_spoils_no_other():
    made, waves = mixture().float(), [clip(n, n) for n in LENGTHS]
    base = torch.randn(3, 28, BASE_WIDTH)
    expected = made(base, waves)
    waves[1][100] = torch.nan
    out = made(base, waves)
    assert [bool(out.clip(b).isnan().any()) for b in range(3)] == [False, True, False]
    assert all(torch.equal(out.clip(b), expected.clip(b)) for b in (0, 2))


def test_outputs():
    made = mixture(num_dependent_slots=2)
    out = Inputs().mix(made)
    assert out.lengths == (4, 1, 7) and out.tokens.shape == (12, OUT)
    assert out.weights.shape == out.indices.shape == (3, 3)
    assert out.weights.dtype == torch.float32 and out.indices.dtype == torch.int64
    assert out.router_logits.shape == (3, 5) and out.independent_logits.shape == (5,)
    assert out.aux_loss.shape == () and out.aux_loss.dtype == torch.float32
    padded, mask = out.padded()
    assert padded.shape == (3, 7, OUT) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == list(out.lengths)
    assert torch.equal(padded[mask], out.tokens) and not padded[~mask].any()
    assert torch.equal(out.clip(2), padded[2])


def test_outputs_without_one_of_the_routers_or_losses():
    assert Inputs().mix(mixture(num_independent_slots=0)).independent_logits is None
    assert Inputs().mix(mixture(num_dependent_slots=0)).router_logits is None
    assert Inputs().mix(mixture(router_losses={})).aux_loss is None


def test_half_precision():
    made = mixture(router_straight_through=True)
    inputs = Inputs()
    with torch.no_grad():
        expected = inputs.mix(made)
    made.bfloat16()
    for frames in inputs.base:
        frames.data = frames.data.bfloat16()
    out = inputs.mix(made)
    assert out.tokens.dtype == torch.bfloat16
    assert out.weights.dtype == out.router_logits.dtype == out.aux_loss.dtype == torch.float32
    assert torch.equal(out.indices, expected.indices)
    assert_same(out.tokens, expected.tokens, tolerance=0.05)
    (out.tokens.float().square().sum() + out.aux_loss).backward()
    gradients = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    assert all(gradient.dtype == torch.bfloat16 and gradient.isfinite().all() for gradient in gradients)


def test_autocast_changes_nothing():
    made = mixture().float()
    base, waves = torch.randn(2, 30, BASE_WIDTH), Inputs([9_000, 400]).waves
    with torch.no_grad():
        expected = made(base, waves).tokens
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(base, waves).tokens, expected)


def test_more_slots_than_encoders():
    pool = EncoderPool.from_encoders([hubert()])
    config = MoweConfig(audio_config=whisper().config, text_config=TEXT, num_dependent_slots=2)
    with pytest.raises(ConfigError, match="2 slots for one router but the pool has 1 encoders"):
        MixtureOfWeakEncoders(config, pool)


def test_replicas_of_data_parallel_are_refused():
    with pytest.raises(ConfigError, match="DataParallel cannot copy a mixture: start one process a GPU"):
        mixture()._replicate_for_data_parallel()


def test_a_base_encoder_of_no_family():
    config = MoweConfig(audio_config={"model_type": "bert"}, text_config=TEXT)
    with pytest.raises(ConfigError, match="encoders of type 'bert' are not supported"):
        MixtureOfWeakEncoders(config, EncoderPool.from_encoders([hubert()]))


@pytest.mark.parametrize(
    ("shape", "clips", "lengths", "told"),
    [
        ((2, 9, BASE_WIDTH + 1), 2, None, rf"base must be \[2, T, {BASE_WIDTH}\], .* got \[2, 9, {BASE_WIDTH + 1}\]"),
        ((9, BASE_WIDTH), 1, None, r"base must be \[1, T, 32\], .* got \[9, 32\]"),
        ((2, 9, BASE_WIDTH), 3, None, r"base must be \[3, T, 32\], .* got \[2, 9, 32\]"),
        ((2, 9, BASE_WIDTH), 2, [9], r"base_lengths must be 2 integers in 1\.\.9, got \[9\]"),
        ((2, 9, BASE_WIDTH), 2, [9, 0], r"base_lengths must be 2 integers in 1\.\.9, got \[9, 0\]"),
        ((2, 9, BASE_WIDTH), 2, [10, 1], r"base_lengths must be 2 integers in 1\.\.9, got \[10, 1\]"),
        ((2, 9, BASE_WIDTH), 2, [9.0, 1.0], r"must be 2 integers in 1\.\.9, got \[9\.0, 1\.0\]"),
        ((2, 9, BASE_WIDTH), 2, torch.ones(2), r"must be 2 integers in 1\.\.9, got \[1\.0, 1\.0\]"),
        ((2, 9, BASE_WIDTH), 2, torch.ones(2, 9), r"base_lengths must be \[2\], one entry a clip, got \[2, 9\]"),
        ((1, 9, BASE_WIDTH), 1, torch.tensor(9), r"base_lengths must be \[1\], one entry a clip, got \[\]"),
        ((2, 0, BASE_WIDTH), 2, None, r"base must be \[2, T, 32\], .* got \[2, 0, 32\]"),
        ((0, 9, BASE_WIDTH), 0, None, "expected at least one clip"),
    ],
)
def test_base_features_that_do_not_fit(shape, clips, lengths, told):
    with pytest.raises(AudioError, match=told):
        mixture()(torch.randn(shape), [clip(3_000)] * clips, lengths)
