"""Every kind of encoder against the transformers module it was made from."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, HubertForCTC, Wav2Vec2FeatureExtractor, WhisperForConditionalGeneration

from mowe import AudioError, CheckpointError, ConfigError, EncoderPool
from mowe.audio import AudioBatch
from mowe.families import FAMILIES, ClipFeatures, family_class, find_encoder
from mowe.families.whisper import WhisperFamily
from mowe_kernels import PackPlan
from tests.mowe.encoders import (
    LARGE,
    alone,
    assert_same,
    assert_same_gradients,
    clip,
    hubert,
    is_whisper,
    wav2vec2,
    whisper,
)
from tests.mowe.naive import encoder_gradients

KINDS = {
    "whisper": (whisper, {}),
    "whisper, 128 mel bins": (whisper, {"num_mel_bins": 128, "encoder_layers": 1}),
    "hubert-base": (hubert, {}),
    "hubert-large": (hubert, LARGE),
    "hubert, group norm, stable": (hubert, {"do_stable_layer_norm": True}),
    "hubert, layer norm, post-norm": (hubert, {"feat_extract_norm": "layer", "conv_bias": True}),
    "hubert, conv bias": (hubert, {"conv_bias": True}),
    "hubert, no projection norm": (hubert, {"feat_proj_layer_norm": False}),
    "hubert, no masks": (hubert, {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}),
    "hubert, odd positions, eps": (hubert, {"num_conv_pos_embeddings": 9, "layer_norm_eps": 1e-3}),
    "hubert, another stem": (
        hubert,
        {"conv_dim": [8, 12, 16], "conv_kernel": [9, 4, 3], "conv_stride": [8, 5, 2], "num_feat_extract_layers": 3},
    ),
    "wav2vec2-base": (wav2vec2, {}),
    "wav2vec2-large": (wav2vec2, LARGE),
    "wav2vec2, no masks": (wav2vec2, {"mask_time_prob": 0.0}),
}
CLIPS = [clip(samples, seed) for seed, samples in enumerate([5_000, 400, 16_123])]
kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, seed: int = 0) -> nn.Module:
    make, config = KINDS[kind]
    return make(seed, **config)


def encoder_of(model: nn.Module) -> nn.Module:
    return model.encoder if is_whisper(model) else model


@kinds
def test_valid_frames_are_those_of_the_encoder_alone(kind):
    encoders = [build(kind, seed) for seed in range(2)]
    pool = EncoderPool.from_encoders(encoders)
    assert len(pool.families) == 1
    with torch.no_grad():
        out = pool.encode(CLIPS, [[1, 0]] * len(CLIPS), context="valid")
        for c, wave in enumerate(CLIPS):
            for slot, encoder in enumerate(reversed(encoders)):
                assert_same(out.pair(c, slot), alone(encoder, wave, "valid"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("whisper")])
def test_window_frames_are_those_of_the_whole_window(kind):
    encoder = build(kind)
    pool = EncoderPool.from_encoders([encoder])
    with torch.no_grad():
        out = pool.encode(CLIPS, [[0]] * len(CLIPS), context="window")
        for c, wave in enumerate(CLIPS):
            assert out.pair(c, 0).shape[0] == 1_500
            assert_same(out.pair(c, 0), alone(encoder, wave, "window"))


def test_a_clip_of_30_s_is_its_own_window():
    wave, encoder = clip(480_000), whisper()
    pool = EncoderPool.from_encoders([encoder])
    with torch.no_grad():
        expected = alone(encoder, wave)
        for context in ("window", "valid"):
            assert_same(pool.encode([wave], [[0]], context).pair(0, 0), expected)


@pytest.mark.parametrize("kind", ["hubert-base", "wav2vec2-large"])
def test_normalised_waves(kind):
    encoder = build(kind)
    pool = EncoderPool.from_encoders([encoder], [Wav2Vec2FeatureExtractor(do_normalize=True)])
    with torch.no_grad():
        out = pool.encode(CLIPS, [[0]] * len(CLIPS))
        for c, wave in enumerate(CLIPS):
            assert_same(out.pair(c, 0), alone(encoder, wave, do_normalize=True))


@kinds
def test_gradients_are_those_of_the_encoder_alone(kind):
    encoders = [encoder_of(build(kind, seed)).double() for seed in range(2)]
    pool = EncoderPool.from_encoders(encoders)
    pairs = [(0, 1), (2, 0), (1, 1), (2, 1)]
    out = pool.encode([CLIPS[c] for c, _ in pairs], [[e] for _, e in pairs], context="valid")
    expected = [alone(encoders[e], CLIPS[c], "valid") for c, e in pairs]
    cotangents = [torch.randn_like(rows) for rows in expected]
    sum((out.pair(i, 0) * g).sum() for i, g in enumerate(cotangents)).backward()
    sum((rows * g).sum() for rows, g in zip(expected, cotangents, strict=True)).backward()
    for index, encoder in enumerate(encoders):
        theirs = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        assert_same_gradients(encoder_gradients(pool, index, encoder), theirs)


@kinds
def test_all_encoders_in_one_go(kind):
    """As on a GPU, where the host knows only a bound of the rows: the rest of the memory must not matter."""
    pool = EncoderPool.from_encoders([build(kind, seed).double() for seed in range(3)])
    (family,) = pool.families
    features = ClipFeatures(AudioBatch.from_waveforms(CLIPS), "valid")
    indices = torch.tensor([[2, 0, 0], [0, -1, 2], [-1, 2, -1]])
    plan = PackPlan.build(indices, pool.lengths(features), pool.layout(torch.device("cpu"))).family(0)
    bounded = replace(plan, levels=tuple(replace(level, num_rows=level.num_rows + 50) for level in plan.levels))
    x, starts = family.inputs(features)
    gradients = []
    in_one_go = family.encode(x.double(), starts[plan.clip], bounded)[: plan.rows.num_rows]
    for rows in (family(features, plan), in_one_go):
        family.zero_grad()
        rows.square().sum().backward()
        gradients.append({name: p.grad for name, p in family.named_parameters() if p.grad is not None})
        gradients[-1]["rows"] = rows.detach()
    assert_same(gradients[1]["rows"], gradients[0]["rows"])
    assert_same_gradients(gradients[1], gradients[0])


@kinds
def test_given_back_encoders_are_the_ones_put_in(kind):
    encoders = [encoder_of(build(kind, seed)) for seed in range(2)]
    pool = EncoderPool.from_encoders(encoders)
    for index, encoder in enumerate(encoders):
        given = pool.to_transformers(index)
        assert type(given) is type(encoder) and not given.training
        assert given.config.to_dict() == encoder.config.to_dict()
        expected = encoder.state_dict()
        assert given.state_dict().keys() == expected.keys()
        for name, value in given.state_dict().items():
            if "pos_conv_embed.conv.parametrizations" not in name:
                assert torch.equal(value, expected[name]), name
        if not is_whisper(encoder):
            assert_same(
                given.encoder.pos_conv_embed.conv.weight, encoder.encoder.pos_conv_embed.conv.weight, tolerance=1e-6
            )
        with torch.no_grad():
            assert_same(alone(given, CLIPS[0]), alone(encoder, CLIPS[0]), tolerance=2e-6)


def test_a_tap_of_zeros_is_given_back():
    """Weight norm divides by its norm."""
    encoder = encoder_of(build("hubert-base"))
    conv = encoder.encoder.pos_conv_embed.conv
    with torch.no_grad():
        conv.parametrizations.weight.original0[..., 1] = 0.0
    given = EncoderPool.from_encoders([encoder]).to_transformers(0)
    assert_same(given.encoder.pos_conv_embed.conv.weight, conv.weight, tolerance=1e-6)


@kinds
def test_a_pool_of_given_back_encoders_is_the_same_pool(kind):
    pool = EncoderPool.from_encoders([build(kind)])
    again = EncoderPool.from_encoders([pool.to_transformers(0)])
    for (name, value), other in zip(pool.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["whisper", "hubert-base", "wav2vec2-large"])
def test_training_mode_changes_nothing(kind):
    make, config = KINDS[kind]
    dropouts = (
        {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "encoder_layerdrop": 0.5}
        if make is whisper
        else {
            "hidden_dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "feat_proj_dropout": 0.5,
            "layerdrop": 0.5, "mask_time_prob": 0.5, "mask_time_length": 2, "mask_feature_prob": 0.5,
        }
    )  # fmt: skip
    encoder = make(**{**config, **dropouts})
    pool = EncoderPool.from_encoders([encoder])
    with torch.no_grad():
        evaluated = pool.encode(CLIPS, [[0]] * 3, "valid").rows[0]
        trained = pool.train().encode(CLIPS, [[0]] * 3, "valid").rows[0]
        assert torch.equal(trained, evaluated)
        assert_same(trained[: len(alone(encoder, CLIPS[0], "valid"))], alone(encoder, CLIPS[0], "valid"))


def test_whisper_keys_never_get_a_bias():
    pool = EncoderPool.from_encoders([whisper()])
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        pool.encode(CLIPS[:2], [[0], [0]], "valid").rows[0].square().mean().backward()
        for layer in pool.families[0].layers:
            assert not layer.qkv.bias.grad.chunk(3, dim=1)[1].any()
        optimizer.step()
    query, key, value = pool.families[0].layers[0].qkv.bias.chunk(3, dim=1)
    assert not key.any() and query.any() and value.any()
    assert "layers.0.self_attn.k_proj.bias" not in pool.to_transformers(0).state_dict()


def test_positions_of_whisper_and_the_mask_of_hubert_stay_as_they_are():
    pool = EncoderPool.from_encoders([whisper(), hubert()])
    frozen = {name for name, parameter in pool.named_parameters() if not parameter.requires_grad}
    assert frozen == {"families.0.embed_positions", "families.1.masked_spec_embed"}


def test_layers_of_whisper_that_would_overflow_in_float16():
    encoder = whisper()
    with torch.no_grad():
        encoder.encoder.layers[0].self_attn.out_proj.bias[0] = 60_000
        encoder.encoder.layers[0].fc2.bias[0] = 60_000
        rows = EncoderPool.from_encoders([encoder.half()]).encode(CLIPS[:1], [[0]]).pair(0, 0)
        assert_same(rows, alone(encoder, CLIPS[0]), tolerance=2e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("whisper")])
def test_a_wave_frame_happens_in_the_middle_of_what_it_sees(kind):
    encoder = build(kind)
    clock = family_class(encoder.config.model_type).frame_clock(encoder.config)
    # The convolutions alone: a group norm sees the whole clip.
    stem = nn.Sequential(*(layer.conv for layer in encoder.feature_extractor.conv_layers))
    wave = torch.randn(1, 1, 2_000, requires_grad=True)
    for frame in (0, 3):
        (seen,) = torch.autograd.grad(stem(wave)[0, :, frame].sum(), wave)
        first, last = seen[0, 0].nonzero()[[0, -1], 0].tolist()
        assert (first + last + 1) // 2 == clock.offset + frame * clock.hop


def test_a_whisper_frame_happens_at_the_middle_of_its_window():
    config = whisper().config
    clock = WhisperFamily.frame_clock(config)
    # Log-mel frame m is centred on sample 160 m; the second convolution's frame t on log-mel frame 2 t.
    assert (clock.hop, clock.offset) == (320, 0)


@kinds
@pytest.mark.parametrize("samples", [400, 719, 720, 1_040, 15_999, 16_000, 16_320])
def test_lengths_and_stages_agree_with_the_encoder(kind, samples):
    encoder = build(kind)
    family_type = family_class(encoder.config.model_type)
    family = family_type([encoder.config])
    expected = (
        (samples // 160 - 1) // 2 + 1
        if is_whisper(encoder)
        else int(encoder._get_feat_extract_output_lengths(torch.tensor(samples)))
    )
    assert family.level_lengths(samples, "valid")[-1] == expected
    steps = accumulate(
        family_type.stages(encoder.config), lambda n, stage: (n + stage[2] - stage[0]) // stage[1] + 1, initial=samples
    )
    assert list(steps)[-1] == expected


def test_fresh_whisper_positions_are_the_sinusoids_of_transformers():
    config = whisper().config
    family = WhisperFamily([config, config])
    family.reset_parameters()
    expected = type(encoder_of(whisper()))(config).embed_positions.weight
    for positions in family.embed_positions:
        torch.testing.assert_close(positions, expected.data, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_parameters_are_finite(kind):
    config = build(kind).config
    family = family_class(config.model_type)([config])
    for module in family.modules():
        if hasattr(module, "reset_parameters"):
            with torch.no_grad():
                for parameter in module.parameters(recurse=False):
                    parameter.fill_(torch.nan)
                module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in family.parameters())


def test_the_encoder_inside_a_model_is_found():
    for model in (WhisperForConditionalGeneration(whisper().config), HubertForCTC(hubert().config)):
        assert isinstance(find_encoder(model), tuple(family.encoder_class for family in FAMILIES.values()))


@pytest.mark.parametrize(
    ("module", "number"),
    [
        (nn.Linear(2, 2), 0),
        ("openai/whisper-tiny", 0),
        (nn.ModuleList([hubert(), wav2vec2()]), 2),
        (BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)), 0),
    ],
)
def test_modules_without_one_encoder(module, number):
    with pytest.raises(ConfigError, match=rf"holds {number} encoders of a supported type, expected one"):
        find_encoder(module)


@pytest.mark.parametrize(
    ("make", "config", "told"),
    [
        (whisper, {"activation_function": "relu"}, "activation_function must be 'gelu', got 'relu'"),
        (hubert, {"hidden_act": "gelu_new"}, "hidden_act must be 'gelu', got 'gelu_new'"),
        (hubert, {"feat_extract_activation": "relu"}, "feat_extract_activation must be 'gelu', got 'relu'"),
        (hubert, {"conv_pos_batch_norm": True}, "conv_pos_batch_norm is not supported, got True"),
        (wav2vec2, {"add_adapter": True, "output_hidden_size": 24}, "add_adapter is not supported, got True"),
        (wav2vec2, {"adapter_attn_dim": 4, **LARGE}, "adapter_attn_dim is not supported, got 4"),
    ],
)
def test_encoders_that_no_family_can_run(make, config, told):
    with pytest.raises(ConfigError, match=f"encoder 1: .*{told}"):
        EncoderPool.from_encoders([make(), make(**config)])


def test_whisper_takes_log_mels_that_are_normalised_already():
    config = whisper().config
    with pytest.raises(ConfigError, match="do_normalize is not supported"):
        WhisperFamily.signature(config, do_normalize=True)


def test_parameters_that_do_not_fit():
    changed = hubert()
    torch.nn.utils.parametrize.remove_parametrizations(changed.encoder.pos_conv_embed.conv, "weight")
    with pytest.raises(CheckpointError, match=r"encoder 1: missing keys .*original0.*surplus keys .*conv\.weight"):
        EncoderPool.from_encoders([whisper(), changed])
    misshapen = whisper()
    misshapen.encoder.layers[0].fc1 = nn.Linear(32, 40)
    with pytest.raises(CheckpointError, match=r"encoder 0: layers\.0\.fc1\.weight gives sizes \[40, 32\], expected \["):
        EncoderPool.from_encoders([misshapen])


def test_clips_that_an_encoder_cannot_take():
    pool = EncoderPool.from_encoders([whisper(max_source_positions=50)])
    assert pool.encode([clip(16_000)], [[0]], "valid").pair(0, 0).shape[0] == 50
    with pytest.raises(AudioError, match="clip 1: a Whisper encoder takes at most 16000 samples, got 16160"):
        pool.encode([clip(400), clip(16_160)], [[0], [0]], "valid")
    with pytest.raises(ConfigError, match=r"^context 'window' is 30 s, a Whisper encoder of 50 frames is not"):
        pool.encode([clip(400)], [[0]], "window")
    wide = EncoderPool.from_encoders([hubert(conv_kernel=[20, 3, 3, 3, 3, 2, 2])])
    with pytest.raises(AudioError, match="clip 0: a clip of 400 samples is shorter than the receptive field"):
        wide.encode([clip(400)], [[0]])


def test_attention_heads_must_divide_the_width():
    config = whisper().config
    config.encoder_attention_heads = 7
    with pytest.raises(ConfigError, match=f"width {config.d_model} cannot have 7 attention heads"):
        WhisperFamily([config])
