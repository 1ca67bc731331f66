"""Attached mixtures in detail, on a model type of each kind."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

import mowe
from mowe.attach.configuration import AdapterConfig
from mowe.attach.mixture import AttachedMixture
from tests.mowe.attach.audio_llms import AUDIO, WINDOW
from tests.mowe.attach.models import heard, inputs, tiny, tiny_pool, weak_inputs
from tests.mowe.attach.tools import (
    KINDS,
    LONG,
    OVER_A_WINDOW,
    SHORT,
    TINY_CLIP,
    attached,
    awaken,
    logits,
    plain,
    same_state,
    state,
    step_logits,
)
from tests.mowe.encoders import assert_same

each_kind = pytest.mark.parametrize("model_type", KINDS)


@pytest.fixture(scope="module")
def qwen2_audio() -> PreTrainedModel:
    return attached("qwen2_audio")


@each_kind
@pytest.mark.parametrize("fusion", ["concat", "residual"])
def test_against_a_loop_over_clips(model_type: str, fusion: str) -> None:
    """What the mixture adds, frame by frame: weight times columns times the weak frame nearest in time."""
    model = attached(model_type, fusion=fusion)
    layout, clips = model.mowe.layout, [SHORT, TINY_CLIP]
    path = layout.linear[0] if fusion == "concat" else layout.features or layout.tower
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    batch = inputs(model_type, [[clip] for clip in clips])
    model.get_submodule(path).register_forward_hook(keep)
    mixture, module = model(**batch).mixture, model.mowe
    mowe.detach(model)(**plain(batch))
    added = (seen[0] - seen[1]).flatten(0, -2)

    expected = [_naive(module, mixture, clip, wave) for clip, wave in enumerate(clips)]
    frames = [len(rows) for rows in expected]
    starts = [0, frames[0]] if callable(layout.rows) else [0, len(added) // 2]
    for start, count, rows in zip(starts, frames, expected, strict=True):
        assert_same(added[start : start + count], rows)
        added[start : start + count] = 0
    assert not added.any()


def _naive(module: AttachedMixture, mixture: mowe.MixtureOutput, clip: int, wave: Tensor) -> Tensor:
    hop, stack = module.layout.hop, module.fusion.stack
    frames = -(-len(wave) // hop)
    if callable(module.layout.rows):
        mel = -(-len(wave) // 160)
        frames = 13 * (mel // 100) + -(-(mel % 100) // 8) if module.layout.hop.denominator > 1 else mel // 4
    out = torch.zeros(-(-frames // stack), module.config.fusion_width)
    weak = module.pool.encode([wave], mixture.indices[clip][None])
    for slot, encoder in enumerate(mixture.indices[clip].tolist()):
        family = next(f for f, members in enumerate(module.pool.members) if encoder in members)
        clock, rows = module.pool.families[family].clock, weak.pair(0, slot)
        columns = module.fusion.slot_weights[family][slot]
        for frame in range(frames):
            time = module.layout.offset + frame * hop
            nearest = int((time - clock.offset) / clock.hop + 0.5) if time >= clock.offset - clock.hop / 2 else 0
            if nearest <= len(rows):
                row = rows[min(nearest, len(rows) - 1)]
                out[frame // stack] += mixture.weights[clip, slot] * columns[:, frame % stack] @ row
    return out.detach()


@each_kind
def test_the_pool_runs_once_for_all_beams(model_type: str) -> None:
    model = attached(model_type)
    heard_by_pool: list[tuple[int, ...]] = []
    model.mowe.pool.register_forward_hook(lambda module, args, output: heard_by_pool.append(args[0].audio.lengths))
    prompts = [[SHORT], [LONG]]
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    both = model.generate(**inputs(model_type, prompts), **_answer(**beams))
    assert heard_by_pool == [(len(SHORT), len(LONG))]
    for number in range(len(prompts)):
        batch = inputs(model_type, prompts)
        real = batch["attention_mask"][number].bool()
        alone = inputs(model_type, [prompts[number]])
        alone |= {name: batch[name][number, real][None] for name in ("input_ids", "attention_mask")}
        scores = model.generate(**alone, **_answer(**beams)).sequences_scores
        torch.testing.assert_close(scores, both.sequences_scores[2 * number : 2 * number + 2], rtol=1e-4, atol=1e-4)


def _answer(**settings: Any) -> dict[str, Any]:
    return {
        "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "max_length": None,
        "return_dict_in_generate": True, **settings,
    }  # fmt: skip


@pytest.mark.parametrize(("model_type", "order"), [("voxtral", [0, 0, 1, 1]), ("meralion2", [0, 1, 0, 1])])
def test_repeated_rows_get_what_is_theirs(model_type: str, order: list[int]) -> None:
    """Models repeat the windows of a prompt for its beams each in their own order."""
    model = attached(model_type, fusion="residual")
    features: list[Tensor] = []
    model.model.audio_tower.register_forward_hook(lambda module, args, output: features.append(output[0]))
    batch = inputs(model_type, [[OVER_A_WINDOW]])
    model(**batch)
    model.generate(**batch, **_answer(num_beams=2))
    torch.testing.assert_close(features[1], features[0][order])


class _Stacked(nn.Module):
    """A projector that fills the frames of each row up to a whole number of stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8 * 16, 24)

    def forward(self, features: Tensor) -> Tensor:
        filled = nn.functional.pad(features, (0, 0, 0, -features.shape[1] % 8))
        return self.linear(filled.unflatten(1, (-1, 8)).flatten(2))


def test_stacks_that_do_not_come_out_even() -> None:
    pool = tiny_pool()
    layout = mowe.AudioLayout(tower="0", projector="1", width="", hop=320, linear=("1.linear",), stack=8)
    config = AdapterConfig(base_width=16, fusion="concat", fusion_width=24, fusion_stack=8, pool_config=pool.config)
    mixture, model = AttachedMixture(config, pool, layout), nn.Sequential(nn.Identity(), _Stacked())
    mixture.fusion.slot_weights[0].data.normal_()
    mixture.hook(model)
    features, waves = torch.randn(2, 100, 16), weak_inputs([SHORT, LONG])
    outputs = []
    for frames in (features, nn.functional.pad(features, (0, 0, 0, 4))):
        with mixture.hearing(waves["mowe_waveforms"], waves["mowe_waveforms_mask"]):
            outputs.append(model(frames))
    assert_same(outputs[0], outputs[1])


def test_the_pool_runs_once_without_a_cache(qwen2_audio: PreTrainedModel) -> None:
    runs: list[int] = []
    handle = qwen2_audio.mowe.pool.register_forward_hook(lambda *_: runs.append(1))
    batch = inputs("qwen2_audio", [[SHORT]])
    uncached = step_logits(qwen2_audio, batch, use_cache=False)
    handle.remove()
    assert len(runs) == 1
    torch.testing.assert_close(uncached, step_logits(qwen2_audio, batch), rtol=1e-4, atol=1e-5)


def test_an_answer_without_audio_leaves_nothing_behind(qwen2_audio: PreTrainedModel) -> None:
    silent = inputs("qwen2_audio", [[]])
    assert not hasattr(qwen2_audio(**silent), "mixture")
    qwen2_audio.generate(**inputs("qwen2_audio", [[SHORT]]), **_answer())
    with pytest.raises(mowe.AudioError, match="its processor was not wrapped"):
        qwen2_audio(**plain(inputs("qwen2_audio", [[SHORT]])))


def test_frames_after_the_audio_are_left_alone() -> None:
    """Voxtral's windows are always whole: where the clip has ended, its features stay its own."""
    model = attached("voxtral", fusion="residual")
    features: list[Tensor] = []
    model.model.audio_tower.register_forward_hook(lambda module, args, output: features.append(output[0]))
    batch = inputs("voxtral", [[OVER_A_WINDOW]])
    model(**batch)
    mowe.detach(model)(**plain(batch))
    changed = (features[0] != features[1]).any(-1)
    seconds = (OVER_A_WINDOW.numel() - WINDOW) / 320
    assert changed[0].all() and changed[1, : int(seconds)].all() and not changed[1, int(seconds) + 1 :].any()


def test_router_loss() -> None:
    model = attached("audioflamingo3")
    batch = inputs("audioflamingo3", [[SHORT], []])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == AUDIO, -100)
    predicted = int((labels[:, 1:] != -100).sum())
    silent = model(**batch)
    alone = torch.nn.functional.cross_entropy(silent.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    outputs = model(**batch, labels=labels)
    assert outputs.aux_loss.item() != 0
    torch.testing.assert_close(outputs.loss, alone + outputs.aux_loss)
    # One of several accumulated batches, which have 1000 tokens between them.
    share = model(**batch, labels=labels, num_items_in_batch=torch.tensor(1000)).loss
    torch.testing.assert_close(share, (alone + outputs.aux_loss) * predicted / 1000)
    as_tuple = model(**batch, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], outputs.loss)


def test_what_the_outputs_tell(qwen2_audio: PreTrainedModel) -> None:
    outputs = qwen2_audio(**inputs("qwen2_audio", [[SHORT], [LONG, TINY_CLIP]]))
    assert outputs.router_logits.shape == (3, 4) and outputs.router_indices.shape == (3, 2)
    assert outputs.mixture.weights.shape == (3, 2)
    assert not {"aux_loss", "router_logits", "router_indices", "mixture"} & outputs.keys()


def test_router_logits_of_the_language_model_stay_its_own() -> None:
    model = attached("qwen3_omni_moe_thinker")
    batch = inputs("qwen3_omni_moe_thinker", [[SHORT]])
    outputs = model(**batch, output_router_logits=True)
    assert outputs.mixture.router_logits.shape == (1, 4)
    assert not torch.equal(outputs.aux_loss, outputs.mixture.aux_loss)
    assert torch.equal(model(**batch).aux_loss, outputs.mixture.aux_loss)


def test_settings_of_the_routers() -> None:
    model = mowe.attach(
        tiny("qwen2_audio"), tiny_pool(), num_independent_slots=0, num_dependent_slots=3, router_losses={"z_loss": 0.5}
    )
    outputs = model(**inputs("qwen2_audio", [[SHORT]]))
    assert outputs.router_indices.shape == (1, 3)
    torch.testing.assert_close(outputs.aux_loss, 0.5 * outputs.router_logits.logsumexp(-1).square().mean())


def test_in_bfloat16() -> None:
    model = tiny("qwen2_audio").to(torch.bfloat16)
    batch = inputs("qwen2_audio", [[SHORT], [LONG]])
    expected = logits(model, plain(batch))
    mowe.attach(model, tiny_pool().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.mowe.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(awaken(model), batch), expected)


def test_under_autocast() -> None:
    model = tiny("voxtral")
    batch = inputs("voxtral", [[SHORT]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, plain(batch))
        mowe.attach(model, tiny_pool())
        assert torch.equal(logits(model, batch), expected)
        loss = awaken(model)(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.mowe.fusion.parameters())


def test_a_frozen_tower_stays_in_evaluation_mode() -> None:
    model = mowe.attach(tiny("granite_speech"), tiny_pool())
    model.train()
    assert model.training and model.mowe.training and model.model.language_model.training
    assert not any(part.training for part in model.model.encoder.modules())
    model.model.encoder.requires_grad_(True)
    model.train()
    assert model.model.encoder.training
    model.eval()
    assert not any(part.training for part in model.modules())


def test_attached_again_after_detaching() -> None:
    model = attached("qwen2_audio")
    before = state(model)
    mixture = model.mowe
    mowe.detach(model)
    mowe.attach(model, mixture.pool)
    assert same_state(
        model.mowe.pool.state_dict(), {k[10:]: v for k, v in before.items() if k.startswith("mowe.pool.")}
    )


def test_an_attached_mixture_stands_in_for_no_projector(qwen2_audio: PreTrainedModel) -> None:
    """It takes part in another model's call and has none of its own."""
    assert not isinstance(qwen2_audio.mowe, mowe.MixtureOfWeakEncoders)
    assert not {"check", "capture"} & set(dir(qwen2_audio.mowe))


def test_a_layout_of_ones_own() -> None:
    model = tiny("qwen2_audio")
    batch = inputs("qwen2_audio", [[SHORT]])
    expected = logits(model, plain(batch))
    own = mowe.AudioLayout(
        tower="model.audio_tower", projector="model.multi_modal_projector", width="audio_config.d_model", hop=640
    )
    model.config.model_type = "something_new"
    with pytest.raises(
        mowe.ConfigError, match=r"'something_new' are not supported; supported: qwen2_audio, .*layout=mo"
    ):
        mowe.attach(model, tiny_pool())
    mowe.attach(model, tiny_pool(), layout=own)
    assert model.mowe.config.fusion == "residual"
    assert torch.equal(logits(model, batch), expected)
    assert not torch.allclose(logits(awaken(model), batch), expected, atol=1e-4)


def test_help_is_that_of_the_function() -> None:
    assert "fusion" in inspect.getdoc(mowe.attach) and "fusion" in inspect.signature(mowe.attach).parameters


def test_models_that_hold_a_supported_one() -> None:
    model = tiny("qwen2_audio")
    model.config.model_type = "qwen2_5_omni"
    with pytest.raises(mowe.ConfigError, match=r"'qwen2_5_omni' are not supported \(attach to its `thinker`\)"):
        mowe.attach(model, tiny_pool())


def test_skipped_modules_of_models_that_hold_a_supported_one() -> None:
    skipped = mowe.skip_modules("qwen2_5_omni")
    for name, module in tiny("qwen2_5_omni_thinker").named_modules():
        if not [*module.children()]:
            kept = {"audio_tower", "visual", "lm_head"} & set(name.split("."))
            assert should_convert_module(f"thinker.{name}", skipped) == (not kept), name
    assert not should_convert_module("talker.model.layers.0", skipped)


def _layout(**settings: Any) -> mowe.AudioLayout:
    given = {"tower": "model.audio_tower", "projector": "", "width": "audio_config.d_model", "hop": 640}
    return mowe.AudioLayout(**{**given, **settings})


def test_bad_layouts() -> None:
    with pytest.raises(mowe.ConfigError, match=r"hop must be a positive whole number .* or a Fraction, got 2133.3"):
        _layout(hop=2133.3)
    with pytest.raises(mowe.ConfigError, match="hop must be a positive whole number"):
        _layout(hop=0)
    with pytest.raises(mowe.ConfigError, match="rows must be 'clips' or 'windows' or a function, got 'packed'"):
        _layout(rows="packed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "sum"}, "fusion of a 'qwen2_audio' model must be 'auto' or 'concat' or 'residual', got 'sum'"),
        ({"num_dependent_slots": 9}, "num_dependent_slots is 9 but the pool has 4 encoders"),
        ({"router_temperature": 0.0}, "router_temperature must be positive"),
        ({"router_kind": 1, "top_k": 2}, r"unknown settings \['router_kind', 'top_k'\]; known: num_dependent_slots, "),
        ({"base_width": 8}, r"unknown settings \['base_width'\]"),
        ({"layout": _layout(tower="ears")}, "has no module 'ears', which its layout names"),
        ({"layout": _layout(width="audio_config.girth")}, "has no 'audio_config.girth', which its layout names"),
        ({"layout": _layout(), "fusion": "concat"}, "must be 'auto' or 'residual', got 'concat'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    model = tiny("qwen2_audio")
    own_class = type(model)
    with pytest.raises(mowe.ConfigError, match=message):
        mowe.attach(model, tiny_pool(), **settings)
    assert type(model) is own_class and not hasattr(model, "mowe")


def test_bad_models_and_pools(qwen2_audio: PreTrainedModel) -> None:
    with pytest.raises(mowe.ConfigError, match=r"has a mixture already; mowe.detach"):
        mowe.attach(qwen2_audio, tiny_pool())
    with pytest.raises(mowe.ConfigError, match="has no mixture to detach"):
        mowe.detach(tiny("qwen2_audio"))
    with pytest.raises(mowe.ConfigError, match="has no mixture attached"):
        mowe.save_adapter(tiny("qwen2_audio"), "nowhere")
    with pytest.raises(mowe.ConfigError, match=r"the pool is torch.float64 on cpu, .* pool.to\('cpu', torch.float32\)"):
        mowe.attach(tiny("qwen2_audio"), tiny_pool().double())
    with pytest.raises(mowe.ConfigError, match=r"the pool is torch.float32 on meta, the model's audio tower"):
        mowe.attach(tiny("qwen2_audio"), tiny_pool().to("meta"))
    with pytest.raises(mowe.ConfigError, match="the model's audio tower is offloaded"):
        mowe.attach(tiny("qwen2_audio").to("meta"), tiny_pool().to("meta"))
    compiled = tiny("qwen2_audio")
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    with pytest.raises(mowe.ConfigError, match=r"forward method of this Qwen2Audio\w+ was replaced \(compiled\?\)"):
        mowe.attach(compiled, tiny_pool())
    with pytest.raises(mowe.ConfigError, match="expected an EncoderPool, got list"):
        mowe.attach(tiny("qwen2_audio"), [])
    with pytest.raises(mowe.ConfigError, match="expected a model of transformers, got Linear"):
        mowe.attach(torch.nn.Linear(2, 2), tiny_pool())
    with pytest.raises(
        mowe.ConfigError, match=r"has no module 'model.audio_tower', which its layout names; a mixture at"
    ):
        mowe.attach(tiny("qwen2_audio").model, tiny_pool())


def test_what_is_fixed_never_learns() -> None:
    """Whatever is asked to learn with it: the mixture, the pool, the whole model."""
    model = attached("qwen2_audio")
    fixed = [getattr(family, name) for family in model.mowe.pool.families for name in family.fixed]
    fixed = [parameter for parameter in fixed if parameter is not None]
    assert fixed
    for module in (model, model.mowe, model.mowe.pool, *model.mowe.pool.families):
        assert module.requires_grad_(True) is module
        assert all(parameter.requires_grad for parameter in model.mowe.router.parameters())
        assert not any(parameter.requires_grad for parameter in fixed)


@each_kind
def test_waveforms_of_another_number_of_audios(model_type: str) -> None:
    model = attached(model_type)
    batch = inputs(model_type, [[SHORT], [LONG], [TINY_CLIP]])
    with pytest.raises(mowe.AudioError, match="encoded 3 rows of audio, mowe_waveforms has 2"):
        model(**{**batch, **weak_inputs(heard(model_type, [SHORT, LONG]))})


def test_bad_waveforms(qwen2_audio: PreTrainedModel) -> None:
    batch = inputs("qwen2_audio", [[SHORT]])
    with pytest.raises(
        mowe.AudioError, match=r"mowe_waveforms and their mask must be \[windows, samples\], got \[16000\]"
    ):
        qwen2_audio(**{**batch, "mowe_waveforms": SHORT, "mowe_waveforms_mask": None})
    with pytest.raises(mowe.AudioError, match="given mowe_waveforms but no audio features"):
        qwen2_audio(**inputs("qwen2_audio", [[]]), **weak_inputs([SHORT]))
    assert qwen2_audio.mowe.call is None
