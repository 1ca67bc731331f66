"""Models in 4 bits: what is quantised and what never is, files, training, and bad input."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, HubertConfig, WhisperConfig

import mowe
from mowe.families.nf4 import Nf4StackedLinear
from mowe.families.stacked import StackedLinear
from tests.mowe.attach.tools import attached
from tests.mowe.audio_llm import CLIPS, PROMPTS, answers, language_model, processor_of, tiny_model, tiny_pool
from tests.mowe.encoders import alone, clip, hubert, whisper

WAVES = [clip(16_000, 1), clip(9_000, 3)]
CHOICES = [[0, 1], [2, 3]]
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def kinds(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def inputs(model):
    return processor_of(model)(text=PROMPTS, audio=CLIPS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model quantised in memory, and its folder."""
    folder = tmp_path_factory.mktemp("nf4")
    model = mowe.quantize(tiny_model())
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def run_with_bitsandbytes(encoder, wave, double_quant):
    """The same encoder with every linear layer that a family stacks as a Linear4bit."""
    for name, module in list(encoder.named_modules()):
        if type(module) is torch.nn.Linear:
            sizes = module.in_features, module.out_features, module.bias is not None
            linear = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compress_statistics=double_quant)
            linear.load_state_dict(module.state_dict())
            linear.support_avx512bf16_for_cpu = False
            encoder.set_submodule(name, linear.to("cpu"))
    return alone(encoder, wave)


# bitsandbytes 0.50 on the CPU gives wrong values where rows are parts of a block, 32 columns say.
WHOLE_BLOCKS = {"d_model": 64, "encoder_ffn_dim": 128}
MAKERS = {"hubert": partial(hubert, conv_dim=[24] * 7), "whisper": partial(whisper, **WHOLE_BLOCKS)}


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_pool_error_is_that_of_bitsandbytes(make, double_quant):
    encoders = [make(seed) for seed in (2, 4)]
    pool = mowe.EncoderPool.from_encoders(encoders)
    full = pool.encode(WAVES, [[0], [1]])
    ours = mowe.quantize(pool, double_quant=double_quant).encode(WAVES, [[0], [1]])
    for b, (encoder, wave) in enumerate(zip(encoders, WAVES, strict=True)):
        exact = full.pair(b, 0)
        theirs = run_with_bitsandbytes(encoder, wave, double_quant)
        mine_error, their_error = (ours.pair(b, 0) - exact).norm(), (theirs - exact).norm()
        assert their_error > 0
        assert mine_error <= 1.05 * their_error
        if not double_quant:  # query, key and value share the scales of their scales here, and have their own there
            assert_close(ours.pair(b, 0), theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_is_single_in_4_bits():
    pool = mowe.quantize(tiny_pool())
    together = pool.encode(WAVES, CHOICES)
    for b, wave in enumerate(WAVES):
        alone = pool.encode([wave], [CHOICES[b]])
        for slot in range(2):
            assert_close(together.pair(b, slot), alone.pair(0, slot), rtol=1e-5, atol=1e-5)


def test_pool_keeps_norms_biases_and_convolutions():
    before = tiny_pool()
    pool = mowe.quantize(deepcopy(before))
    assert not kinds(pool, StackedLinear)
    kept = dict(pool.named_parameters())
    dropped = {name for name, _ in before.named_parameters()} - kept.keys()
    assert dropped == {f"{name}.weight" for name in kinds(before, StackedLinear)}
    for name, value in before.named_parameters():
        if name in kept:
            assert_close(kept[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("encoder", [WhisperConfig(), HubertConfig()], ids=["whisper-tiny", "hubert-base"])
def test_pool_storage(encoder):
    """Of encoders as large as real ones, without their numbers: the code table of an encoder counts less in those."""
    with torch.device("meta"):
        pool = mowe.EncoderPool(mowe.MowePoolConfig(encoders=[{"config": encoder, "do_normalize": False}] * 2))
    count = sum(m.weight.numel() for m in pool.modules() if isinstance(m, StackedLinear))
    stored = sum(m.quantized.nbytes() for m in mowe.quantize(pool).modules() if isinstance(m, Nf4StackedLinear))
    assert count > 10_000_000
    assert stored <= 0.53 * count


def test_encoder_given_back_has_the_dequantized_weights():
    pool = mowe.quantize(mowe.EncoderPool.from_encoders([whisper(1), whisper(3)]))
    layer = pool.families[0].layers[1].fc1
    assert_close(pool.to_transformers(1).layers[1].fc1.weight, layer.weight[1], rtol=0, atol=0)


def test_scales_stay_in_float32_when_the_pool_is_cast():
    pool = mowe.quantize(tiny_pool())
    before = pool.families[0].layers[0].qkv.nested_absmax.clone()
    linear = pool.to(torch.bfloat16).families[0].layers[0].qkv
    assert linear.weight.dtype == torch.bfloat16
    assert_close(linear.nested_absmax, before, rtol=0, atol=0)
    assert pool.encode(WAVES, CHOICES).rows[0].dtype == torch.bfloat16


def test_what_is_quantised_and_what_never_is(saved):
    model, _ = saved
    linears = kinds(model, bnb.nn.Linear4bit)
    assert linears and all(name.startswith("model.language_model.model.layers.") for name in linears)
    assert type(model.language_model.lm_head) is torch.nn.Linear
    assert not kinds(model.model.mixture.router, bnb.nn.Linear4bit)
    assert not kinds(model.multi_modal_projector, bnb.nn.Linear4bit)
    assert kinds(model.audio_tower, Nf4StackedLinear) and kinds(model.model.mixture.pool, Nf4StackedLinear)


def test_parts_are_chosen():
    model = mowe.quantize(tiny_model(), parts=["pool", "lm_head"])
    assert kinds(model, bnb.nn.Linear4bit) == {"model.language_model.lm_head"}
    assert not kinds(model.audio_tower, Nf4StackedLinear)
    assert kinds(model.model.mixture.pool, Nf4StackedLinear)


def test_files_give_the_same_model(saved):
    model, folder = saved
    again = mowe.MoweForConditionalGeneration.from_pretrained(folder)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert_close(theirs[name], value, rtol=0, atol=0, msg=name)
    assert answers(again, inputs(again)) == answers(model, inputs(model))


def test_saving_after_use_changes_no_bit(saved, tmp_path):
    model, folder = saved
    answers(model, inputs(model))
    model.save_pretrained(tmp_path)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_loaded_is_saved_again_to_the_bit(saved, tmp_path):
    folder = saved[1]
    mowe.MoweForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_loading_in_4_bits_is_quantising_after_loading(saved, tmp_path):
    model, _ = saved
    tiny_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = mowe.MoweForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    theirs = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert_close(theirs[name], value, rtol=0, atol=0, msg=name)


def test_a_list_of_modules_to_skip_adds_to_the_rules(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["q_proj"])
    model = mowe.MoweForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    linears = kinds(model, bnb.nn.Linear4bit)
    assert linears and not any("q_proj" in name or "lm_head" in name or "mixture" in name for name in linears)


def test_qlora_trains_adapter_router_and_projector(saved):
    from peft import get_peft_model

    model = mowe.quantize(tiny_model())
    processor = processor_of(model)
    batch = processor(text=PROMPTS, audio=CLIPS)
    modules = ["mixture.router", "multi_modal_projector"]
    trained = get_peft_model(model, model.lora_config(r=4, modules_to_save=modules))
    trained.train()
    loss = trained(**batch, labels=batch["input_ids"].clone()).loss
    loss.backward()
    learning = {name for name, p in trained.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("lora_B" in name for name in learning)
    assert any("multi_modal_projector" in name for name in learning)
    assert all(
        "lora_" in name or "modules_to_save" in name for name, p in trained.named_parameters() if p.requires_grad
    )


def damaged(folder, target, change):
    """A copy of a model folder with its tensors and its configuration changed."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def truncate(name):
    def change(tensors, config):
        tensors[name] = tensors[name][..., :-1].contiguous()

    return change


def retype(name, dtype):
    def change(tensors, config):
        tensors[name] = tensors[name].to(dtype)

    return change


def state(**settings):
    def change(tensors, config):
        name = f"{UP}.quant_state.bitsandbytes__nf4"
        entries = json.loads(bytes(tensors[name].tolist())) | settings
        tensors[name] = torch.tensor([*json.dumps(entries).encode()], dtype=torch.uint8)

    return change


QKV = "model.audio_tower.layers.0.qkv"
UP = "model.language_model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Newer versions of transformers look at the sizes themselves.
        (truncate(f"{QKV}.absmax"), r"qkv.absmax must have sizes \[1, 48\], got \[1, 47\]|misshapen .*qkv.absmax$"),
        (truncate(f"{QKV}.codes"), r"qkv.codes must have sizes|misshapen .*qkv.codes$"),
        (
            truncate(f"{UP}.absmax"),
            "up_proj: it must have a scale every 64",
        ),
        (lambda tensors, _: tensors[f"{UP}.quant_map"].neg_(), "up_proj: its code table is not that of nf4"),
        (
            lambda _, c: c["quantization_config"].update(quant_type="fp4"),
            "it is in nf4, expected fp4 as the configuration says",
        ),
        (lambda tensors, _: tensors.pop(f"{QKV}.nested_absmax"), "missing keys of the model"),
        (truncate(f"{UP}.nested_absmax"), "up_proj: it must have a scale of the scales every 256, got 0"),
        (truncate(f"{UP}.nested_quant_map"), "up_proj: the code table of its scales is not the dynamic one"),
        (lambda tensors, _: tensors[f"{UP}.nested_quant_map"].neg_(), "up_proj: the code table of its scales"),
        (state(shape=[32, 48]), r"up_proj: it must be of sizes \[48, 32\], got \[32, 48\]"),
        (state(nested_blocksize=64), "up_proj: it must have a scale of the scales every 256, got 1 of every 64"),
        (retype(f"{QKV}.codes", torch.int32), "qkv.codes must be torch.uint8, got torch.int32"),
        (lambda tensors, _: tensors[f"{QKV}.nested_code"].neg_(), "qkv has a code table of its scales"),
        (
            lambda _, c: c["quantization_config"].update(quant_method="gptq"),
            "was quantised by 'gptq', expected 'mowe_nf4'",
        ),
    ],
    ids=[
        "absmax",
        "codes",
        "bitsandbytes",
        "table",
        "mixed",
        "missing",
        "nested",
        "short table",
        "nested table",
        "shape",
        "nested blocks",
        "type",
        "table of a stack",
        "method",
    ],
)
def test_damaged_checkpoints_are_refused(saved, tmp_path, change, message):
    with pytest.raises(mowe.CheckpointError, match=message):
        mowe.MoweForConditionalGeneration.from_pretrained(damaged(saved[1], tmp_path, change))


def test_an_encoder_that_is_quantised_is_refused(tmp_path):
    whisper(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mowe.CheckpointError, match="quantised by 'bitsandbytes', expected full precision"):
        mowe.EncoderPool.from_pretrained([tmp_path])


@torch.no_grad()
def test_layers_multiplied_in_4_bits_are_the_same(monkeypatch):
    pool = mowe.quantize(tiny_pool("valid"))
    expected = pool.encode(WAVES, CHOICES)
    called = []
    for module in ("mowe.families.nf4", "mowe_kernels.ops.grouped_linear_nf4"):
        monkeypatch.setattr(f"{module}.multiplies_in_4_bits", lambda *args: called.append(args) or True)
    out = pool.encode(WAVES, CHOICES)
    assert called
    for b in range(2):
        for slot in range(2):
            assert_close(out.pair(b, slot), expected.pair(b, slot), rtol=1e-4, atol=1e-5)


def test_parts_are_quantised_one_after_the_other(saved):
    model = mowe.quantize(tiny_model(), parts=["language_model"])
    mowe.quantize(model, parts=["pool", "audio_tower"])
    expected = saved[0].state_dict()
    for name, value in model.state_dict().items():
        assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    assert sorted(model.config.quantization_config.parts) == sorted(mowe.quantization.DEFAULT_PARTS)
    with pytest.raises(mowe.ConfigError, match="double_quant is True in the parts already quantised, got False"):
        mowe.quantize(model, parts=["lm_head"], double_quant=False)


def test_bad_input_is_refused(saved):
    with pytest.raises(mowe.ConfigError, match="already quantised"):
        mowe.quantize(saved[0])
    with pytest.raises(mowe.ConfigError, match=r"parts to quantise must be among .* got \['router'\]"):
        mowe.quantize(tiny_model(), parts=["router"])
    with pytest.raises(mowe.ConfigError, match="got Linear"):
        mowe.quantize(torch.nn.Linear(2, 2))
    pool = mowe.quantize(tiny_pool())
    with pytest.raises(mowe.ConfigError, match="the EncoderPool is already quantised"):
        mowe.quantize(pool)


def test_what_cannot_be_quantised_stays_as_it_is():
    model = tiny_model().double()
    with pytest.raises(mowe.ConfigError, match=r"expected parameters in float32, .* got torch.float64"):
        mowe.quantize(model)
    assert not kinds(model, bnb.nn.Linear4bit) and {p.dtype for p in model.parameters()} == {torch.float64}
    model = tiny_model()
    model.add_adapter(model.lora_config(r=2))
    with pytest.raises(mowe.ConfigError, match="the model has adapters; quantise it before"):
        mowe.quantize(model)
    assert not kinds(model, bnb.nn.Linear4bit)


@pytest.mark.parametrize(
    "asked", [{"load_in_4bit": True, "quant_method": "bitsandbytes"}, {"quant_method": "mowe_nf4"}]
)
def test_a_configuration_as_a_dictionary(saved, tmp_path, asked):
    tiny_model().save_pretrained(tmp_path)
    model = mowe.MoweForConditionalGeneration.from_pretrained(tmp_path, quantization_config=asked)
    assert kinds(model, bnb.nn.Linear4bit) == kinds(saved[0], bnb.nn.Linear4bit)


def test_configurations_that_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    load = partial(mowe.MoweForConditionalGeneration.from_pretrained, tmp_path)
    with pytest.raises(mowe.ConfigError, match="or a BitsAndBytesConfig, got FineGrainedFP8Config"):
        load(quantization_config=FineGrainedFP8Config())
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    with pytest.raises(mowe.ConfigError, match=r"expected bnb_4bit_quant_storage torch.uint8, got torch.bfloat16"):
        load(quantization_config=storage)


def test_parts_to_skip_by_their_names(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    skipped = ["audio_tower", "model.language_model.model.layers.1.mlp.up_proj"]
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    model = mowe.MoweForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    assert not kinds(model.audio_tower, Nf4StackedLinear) and model.model.mixture.pool.quantized
    layers = [layer.mlp.up_proj for layer in model.language_model.model.layers]
    assert [isinstance(layer, bnb.nn.Linear4bit) for layer in layers] == [True, False]


def test_parts_that_are_quantised_are_refused(tmp_path):
    """Nothing in the files of a model made of them would tell how to read them."""
    with pytest.raises(mowe.ConfigError, match="the pool is quantised; give it in full precision"):
        tiny_model(pool=mowe.quantize(tiny_pool()))
    language_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    in_4_bits = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(mowe.ConfigError, match="the language model is quantised; give it in full precision"):
        tiny_model(in_4_bits)


def test_a_pool_quantised_by_itself_is_not_saved_in_a_model(tmp_path):
    model = tiny_model()
    mowe.quantize(model.model.mixture.pool)
    with pytest.raises(mowe.ConfigError, match="the pool was put in 4 bits by itself"):
        model.save_pretrained(tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_attached_model_is_not_quantised_in_part():
    model = attached("qwen2_audio")
    with pytest.raises(mowe.ConfigError, match=r"got Qwen2Audio.*; another model is loaded in 4 bits"):
        mowe.quantize(model)
    assert not model.mowe.pool.quantized
