"""Pools of mixed families against each encoder run alone, one clip at a time."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from mowe import AudioError, ConfigError, EncoderPool, MowePoolConfig
from mowe.pool import _plan
from mowe_kernels import use_backend
from tests.mowe.encoders import LARGE, alone, assert_same, clip, hubert, wav2vec2, whisper

ENCODERS = [
    whisper(0),
    hubert(1),
    whisper(2, num_mel_bins=128, encoder_layers=1),
    wav2vec2(3, **LARGE),
    whisper(4),
    hubert(5),
]
LENGTHS = [16_000, 400, 9_777, 24_001]
UNUSED = -1


@pytest.fixture(scope="module")
def pool() -> EncoderPool:
    return EncoderPool.from_encoders(ENCODERS)


def clips(*lengths: int) -> list[torch.Tensor]:
    return [clip(samples, seed) for seed, samples in enumerate(lengths)]


def assert_alone(encoders, waves, indices, context, pool=None) -> None:
    """Every pair is what its encoder gives for its clip alone, and unused slots hold nothing."""
    pool = pool or EncoderPool.from_encoders(encoders)
    with torch.no_grad():
        out = pool.encode(waves, indices, context)
        expected = {
            (c, e): alone(encoders[e], waves[c], context) for c, row in enumerate(indices) for e in row if e != UNUSED
        }
    assert sum(len(rows) for rows in out.rows) == sum(len(rows) for rows in expected.values())
    for c, row in enumerate(indices):
        for slot, encoder in enumerate(row):
            if encoder == UNUSED:
                with pytest.raises(ConfigError, match=f"slot {slot} of clip {c} is unused"):
                    out.pair(c, slot)
            else:
                assert_same(out.pair(c, slot), expected[c, encoder])


INDICES = {
    "one slot": [[0], [1], [2], [3]],
    "every encoder": [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2], [2, 3, 4, 5, 0, 1]],
    "duplicates": [[1, 1], [0, 0], [4, 1], [3, 3]],
    "three of the same": [[2, 5, 2], [5, 5, 5], [0, 4, 0], [1, 0, 0]],
    "unused slots": [[UNUSED, 3], [UNUSED, UNUSED], [0, UNUSED], [1, 1]],
    "all clips to one": [[4], [4], [4], [4]],
    "one family alone": [[0, 4], [4, 0], [0, 0], [4, 4]],
    "nothing at all": [[UNUSED], [UNUSED], [UNUSED], [UNUSED]],
}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_valid(pool, indices):
    assert_alone(ENCODERS, clips(*LENGTHS), indices, "valid", pool)


@pytest.mark.parametrize("name", ["one slot", "duplicates", "unused slots"])
def test_window(pool, name):
    assert_alone(ENCODERS, clips(*LENGTHS), INDICES[name], "window", pool)


@pytest.mark.parametrize("context", ["valid", "window"])
def test_a_single_clip(pool, context):
    assert_alone(ENCODERS, clips(7_321), [[1, 0, 3, 1]], context, pool)


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_order_and_routing(seed):
    draw = random.Random(seed)
    encoders = draw.choices(ENCODERS, k=draw.randint(1, 6))
    slots = draw.randint(1, len(encoders))
    waves = clips(*(draw.randint(400, 20_000) for _ in range(draw.randint(1, 5))))
    indices = [draw.choices(range(UNUSED, len(encoders)), k=slots) for _ in waves]
    assert_alone(encoders, waves, indices, "valid")


def test_wave_encoders_take_more_than_30_s():
    encoders = [ENCODERS[e] for e in (1, 3, 5)]
    assert_alone(encoders, clips(496_000, 1_000), [[1, 0], [2, 1]], "window")


def test_a_mixed_pool_refuses_more_than_30_s_whatever_the_routing(pool):
    for context in ("valid", "window"):
        with pytest.raises(AudioError, match="clip 1: a Whisper encoder takes at most 480000 samples, got 496000"):
            pool.encode(clips(400, 496_000), [[0], [1]], context)


@pytest.mark.parametrize("context", ["valid", "window"])
def test_batch_equals_single(pool, context):
    waves, indices = clips(*LENGTHS), INDICES["three of the same"]
    with torch.no_grad():
        together = pool.encode(waves, indices, context)
        for c, wave in enumerate(waves):
            single = pool.encode([wave], [indices[c]], context)
            for slot in range(3):
                assert_same(together.pair(c, slot), single.pair(0, slot))


@pytest.mark.parametrize("context", ["valid", "window"])
def test_the_order_of_the_batch_does_not_matter(pool, context):
    waves, indices, order = clips(*LENGTHS), INDICES["duplicates"], [2, 0, 3, 1]
    with torch.no_grad():
        out = pool.encode(waves, indices, context)
        shuffled = pool.encode([waves[c] for c in order], [indices[c] for c in order], context)
        for place, c in enumerate(order):
            for slot in range(2):
                assert_same(shuffled.pair(place, slot), out.pair(c, slot))


@pytest.mark.parametrize("context", ["valid", "window"])
def test_loud_neighbours_do_not_matter(pool, context):
    waves, indices = clips(*LENGTHS[:3]), [[0, 1, 3]] * 3
    loud = [clip(12_345, 7, gain=100.0), waves[1], clip(401, 8, gain=100.0)]
    with torch.no_grad():
        quiet_out, loud_out = pool.encode(waves, indices, context), pool.encode(loud, indices, context)
        for slot in range(3):
            assert_same(loud_out.pair(1, slot), quiet_out.pair(1, slot))


def test_each_pair_is_computed_once(pool):
    out = pool.encode(clips(16_000), [[0, 0, 4, 0]], "valid")
    assert sum(len(rows) for rows in out.rows) == 2 * 50
    assert out.pair(0, 0).data_ptr() == out.pair(0, 3).data_ptr() != out.pair(0, 2).data_ptr()


def test_pairs_are_found_by_a_plan_on_the_host(pool):
    """As those of choices that were made there: the plan on the device need not be read."""
    out = pool.encode(clips(16_000, 9_777), [[0, UNUSED], [5, 2]], "valid")
    with use_backend("triton"):  # whose kernels do not run on the host
        assert _plan(torch.tensor([[0]]), [], pool.layout(torch.device("cpu"))) is None
    told = replace(out, plan=SimpleNamespace(position=out.plan.position), plan_on_host=lambda: out.plan)
    assert [[found is None for found in slots] for slots in told.pairs()] == [[False, True], [False, False]]
    assert all(torch.equal(told.pair(c, s), out.pair(c, s)) for c, s in ((0, 0), (1, 0), (1, 1)))


def test_encoders_of_one_architecture_are_one_family(pool):
    assert pool.members == ((0, 4), (1, 5), (2,), (3,))
    assert pool.widths == (32, 24, 32, 24)
    assert pool.num_encoders == 6


def test_the_context_of_the_pool_is_the_default():
    waves = clips(1_600)
    for context, frames in (("valid", 5), ("window", 1_500)):
        pool = EncoderPool.from_encoders([ENCODERS[0]], context=context)
        assert pool.encode(waves, [[0]]).pair(0, 0).shape[0] == frames
    assert EncoderPool.from_encoders([ENCODERS[0]]).config.context == "window"


def test_feature_extractors_decide_the_normalisation():
    normalized = Wav2Vec2FeatureExtractor(do_normalize=True)
    plain = Wav2Vec2FeatureExtractor(do_normalize=False)
    encoders = [hubert(0), whisper(1), hubert(2), wav2vec2(3), hubert(4)]
    extractors = [
        normalized, WhisperFeatureExtractor(), plain, SimpleNamespace(feature_extractor=normalized), None,
    ]  # fmt: skip
    pool = EncoderPool.from_encoders(encoders, extractors)
    assert pool.members == ((0,), (1,), (2, 4), (3,))
    waves = clips(4_000, 11_111)
    with torch.no_grad():
        out = pool.encode(waves, [[0, 1, 2, 3, 4]] * 2, "valid")
        for c, wave in enumerate(waves):
            for e, encoder in enumerate(encoders):
                assert_same(out.pair(c, e), alone(encoder, wave, "valid", do_normalize=e in (0, 3)))


def test_a_pool_of_what_another_gives_back_and_one_encoder_more():
    pool = EncoderPool.from_encoders(
        [hubert(0), whisper(1)], [Wav2Vec2FeatureExtractor(do_normalize=True), WhisperFeatureExtractor()]
    )
    encoders, extractors = (
        [give(index) for index in range(2)] for give in (pool.to_transformers, pool.feature_extractor)
    )
    larger = EncoderPool.from_encoders([*encoders, wav2vec2(2)], [*extractors, None])
    waves = [5 * wave + 1 for wave in clips(4_000)]
    with torch.no_grad():
        before, after = (p.encode(waves, [[0, 1]], "valid") for p in (pool, larger))
    for slot in range(2):
        assert_same(after.pair(0, slot), before.pair(0, slot))
    with pytest.raises(ConfigError, match="no encoder 2 in a pool of 2"):
        pool.feature_extractor(2)


@pytest.mark.parametrize(
    ("encoder", "extractor", "told"),
    [
        (0, WhisperFeatureExtractor(feature_size=128), "features of feature_size 80, its feature extractor has 128"),
        (0, WhisperFeatureExtractor(hop_length=320), "features of hop_length 160, its feature extractor has 320"),
        (1, Wav2Vec2FeatureExtractor(sampling_rate=8_000), "features of sampling_rate 16000, .* has 8000"),
        (1, WhisperFeatureExtractor(), "features of feature_size 1, its feature extractor has 80"),
    ],
)
def test_extractors_that_prepare_something_else(encoder, extractor, told):
    with pytest.raises(ConfigError, match=f"encoder 1: the encoder takes {told}"):
        EncoderPool.from_encoders([ENCODERS[3], ENCODERS[encoder]], [None, extractor])


def test_each_encoder_needs_an_extractor_or_none_of_them():
    with pytest.raises(ConfigError, match="2 encoders but 1 feature extractors"):
        EncoderPool.from_encoders(ENCODERS[:2], [None])


def test_encoders_and_checkpoints_come_in_lists():
    with pytest.raises(ConfigError, match="expected a list of encoders, got HubertModel"):
        EncoderPool.from_encoders(hubert())
    with pytest.raises(ConfigError, match="expected a list of checkpoints, got 'folder'"):
        EncoderPool.from_pretrained("folder")


def test_an_empty_pool():
    with pytest.raises(ConfigError, match="a pool needs at least one encoder, got none"):
        EncoderPool.from_encoders([])
    with pytest.raises(ConfigError, match="a pool needs at least one encoder, got none"):
        EncoderPool(MowePoolConfig())


def test_a_pool_is_its_configuration_and_its_parameters(pool):
    again = EncoderPool(MowePoolConfig(**pool.config.to_dict()))
    again.load_state_dict(pool.state_dict())
    waves, indices = clips(3_000), [[0, 1, 2, 3]]
    with torch.no_grad():
        for one, other in zip(
            pool.encode(waves, indices, "valid").rows, again.encode(waves, indices, "valid").rows, strict=True
        ):
            assert torch.equal(one, other)


def test_a_fresh_pool_is_in_evaluation_mode(pool):
    assert not any(module.training for module in pool.modules())


def test_frozen_encoders_receive_no_gradient():
    pool = EncoderPool.from_encoders(ENCODERS[:2]).requires_grad_(False)
    assert not any(rows.requires_grad for rows in pool.encode(clips(400), [[0, 1]], "valid").rows)


def test_torch_finds_the_features_in_what_a_pool_gives(pool):
    out = pool.encode(clips(400, 2_000), [[0], [1]], "valid")
    leaves = torch.utils._pytree.tree_leaves(out)
    assert all(any(leaf is rows for leaf in leaves) for rows in out.rows)


def test_some_encoders_of_a_family_learn_alone():
    pool = EncoderPool.from_encoders([whisper(0), hubert(1), whisper(2)]).requires_grad_(False)
    before = [pool.to_transformers(index).state_dict() for index in range(3)]
    assert pool.members == ((0, 2), (1,))
    learning = [p for p in pool.families[0].requires_grad_().parameters() if p.requires_grad]
    for parameter in learning:
        parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), 0.0))
    pool.encode(clips(4_000), [[0, 1, 2]], "valid").rows[0].square().sum().backward()
    torch.optim.Adam(learning).step()
    for index, state in enumerate(before):
        after = pool.to_transformers(index).state_dict()
        assert all(torch.equal(after[name], value) for name, value in state.items()) == (index != 2)


def test_encoders_that_nobody_chose_receive_no_gradient():
    pool = EncoderPool.from_encoders(ENCODERS)
    rows = pool.encode(clips(400, 2_000), [[0], [1]], "valid").rows
    sum(r.square().sum() for r in rows).backward()
    for family, members in zip(pool.families, pool.members, strict=True):
        for parameter in family.parameters():
            for place, encoder in enumerate(members):
                if encoder not in (0, 1):
                    assert parameter.grad is None or not parameter.grad[place].any()


@pytest.mark.parametrize("context", ["valid", "window"])
def test_bfloat16(context):
    torch.manual_seed(0)
    encoders = [model.bfloat16() for model in (whisper(encoder_layers=1), hubert(), wav2vec2(**LARGE))]
    pool = EncoderPool.from_encoders(encoders)
    assert all(parameter.dtype == torch.bfloat16 for parameter in pool.parameters())
    waves = clips(4_000, 400)
    with torch.no_grad():
        out = pool.encode(waves, [[0, 1, 2]] * 2, context)
        for c, wave in enumerate(waves):
            for e, encoder in enumerate(encoders):
                assert out.pair(c, e).dtype == torch.bfloat16
                assert_same(out.pair(c, e), alone(encoder.float(), wave, context), tolerance=0.05)


def test_autocast_changes_nothing(pool):
    waves, indices = clips(1_000, 400), [[0, 1, 3]] * 2
    with torch.no_grad():
        expected = pool.encode(waves, indices, "valid").rows
        with torch.autocast("cpu", torch.bfloat16):
            rows = pool.encode(waves, indices, "valid").rows
    assert all(torch.equal(one, other) for one, other in zip(rows, expected, strict=True))


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([[6], [0]], r"indices must lie in -1\.\.5, got 0\.\.6"),
        ([[0], [-2]], r"indices must lie in -1\.\.5, got -2\.\.0"),
        ([[0]], r"integers \[2 clips, slots\], got torch.int64 \[1, 1\]"),
        ([0, 1], r"integers \[2 clips, slots\], got torch.int64 \[2\]"),
        ([[], []], r"integers \[2 clips, slots\]"),
        (torch.zeros(2, 0, dtype=torch.long), r"integers \[2 clips, slots\], got torch.int64 \[2, 0\]"),
        ([[0.0], [1.0]], r"integers \[2 clips, slots\], got torch.float32"),
        ([[True], [False]], r"integers \[2 clips, slots\], got torch.bool"),
        ([[0], [1, 2]], "indices must be integers"),
        ([["a"], ["b"]], "indices must be integers"),
        (None, "indices must be integers"),
    ],
)
def test_indices_that_do_not_fit(pool, indices, told):
    with pytest.raises(ConfigError, match=told):
        pool.encode(clips(400, 400), indices)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_indices_of_any_integer_type(pool, dtype):
    indices = torch.tensor([[1], [3]], dtype=dtype)
    assert pool.encode(clips(400, 720), indices, "valid").pair(1, 0).shape == (2, 24)


def test_all_pairs_at_once(pool):
    """Encoders of several families, an encoder chosen twice, and a slot that nobody uses."""
    out = pool.encode(clips(700, 900), [[0, 3, 0], [5, -1, 1]], "valid")
    pairs = out.pairs()
    assert [[slot is None for slot in slots] for slots in pairs] == [[False] * 3, [False, True, False]]
    for c, slots in enumerate(pairs):
        for s, found in enumerate(slots):
            if found is not None:
                assert found.data_ptr() == out.pair(c, s).data_ptr() and torch.equal(found, out.pair(c, s))
    with pytest.raises(ConfigError, match="slot 1 of clip 1 is unused"):
        out.pair(1, 1)


def test_a_pickle_holds_nothing_of_the_devices_that_the_pool_was_on():
    pool = EncoderPool.from_encoders([hubert(0)])
    fresh = pickle.dumps(pool)
    expected = pool.encode(clips(700), [[0]]).rows[0]
    assert pickle.dumps(pool) == fresh
    assert torch.equal(pickle.loads(fresh).encode(clips(700), [[0]]).rows[0], expected)


def test_other_bad_input(pool):
    for context in ("banana", 3):
        with pytest.raises(ConfigError, match="context must be 'valid' or 'window'"):
            pool.encode(clips(400), [[1]], context)
    with pytest.raises(AudioError, match="clip 1: expected at least 400 samples"):
        pool.encode([clip(400), clip(399)], [[1], [1]])
    with pytest.raises(AudioError, match="expected at least one clip"):
        pool.encode([], [[1]])
    out = pool.encode(clips(400), [[1, 0]], "valid")
    for c, slot in ((1, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match=f"no clip {c}, slot {slot} in a batch of 1 clips with 2 slots"):
            out.pair(c, slot)
    for index in (6, -1):
        with pytest.raises(ConfigError, match=f"no encoder {index} in a pool of 6"):
            pool.to_transformers(index)
