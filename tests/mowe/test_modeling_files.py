"""Saving, loading and assembling the model, and folders that are damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperForCausalLM,
)

import mowe
from mowe.errors import CheckpointError, ConfigError
from tests.mowe.audio_llm import CLIPS, PROMPTS, answers, language_model, processor_of, tiny_model, tiny_pool
from tests.mowe.encoders import alone, assert_same, clip, hubert, whisper


@pytest.fixture(scope="module")
def model() -> mowe.MoweForConditionalGeneration:
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model: mowe.MoweForConditionalGeneration) -> mowe.MoweProcessor:
    return processor_of(model)


@pytest.fixture(scope="module")
def saved(model: mowe.MoweForConditionalGeneration, processor: mowe.MoweProcessor, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_bfloat16_end_to_end(saved: Path, processor: mowe.MoweProcessor) -> None:
    model = mowe.MoweForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    full = mowe.MoweForConditionalGeneration.from_pretrained(saved)
    inputs = processor(PROMPTS, audio=CLIPS, answers=["x", "yy", "z"])
    out, expected = model(**inputs), full(**inputs)
    assert out.logits.dtype == torch.bfloat16
    real = inputs["attention_mask"].bool()
    assert_same(out.logits[real].float(), expected.logits[real], 0.2)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert len(answers(model, processor(PROMPTS, audio=CLIPS))) == 3


def test_what_is_fixed_stays_fixed(model: mowe.MoweForConditionalGeneration, saved: Path) -> None:
    """transformers' loading makes every parameter learn."""
    loaded = mowe.MoweForConditionalGeneration.from_pretrained(saved)
    learning = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (loaded, model)]
    assert learning[0] == learning[1] and len(learning[0]) < len(list(model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_shards_and_loaded(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(language_model(tie_word_embeddings=tied), router_noise=0.1, projector_hidden_size=16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    files = {path.name for path in tmp_path.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 3
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    loaded, info = mowe.MoweForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embedding) == tied
    a, b = json.loads(model.config.to_json_string()), json.loads(loaded.config.to_json_string())
    assert without_dtype(a) == without_dtype(b)
    inputs = processor_of(model)(PROMPTS, audio=CLIPS)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def without_dtype(config: Any) -> Any:
    """Configurations record the dtype when they are saved."""
    if not isinstance(config, dict):
        return config
    return {key: without_dtype(value) for key, value in config.items() if key not in ("dtype", "_name_or_path")}


def test_auto_classes(saved: Path) -> None:
    assert type(AutoConfig.from_pretrained(saved)) is mowe.MoweConfig
    assert type(AutoProcessor.from_pretrained(saved)) is mowe.MoweProcessor
    assert type(AutoFeatureExtractor.from_pretrained(saved)) is mowe.MoweFeatureExtractor
    assert type(AutoModelForMultimodalLM.from_pretrained(saved)) is mowe.MoweForConditionalGeneration
    assert type(AutoConfig.for_model("mowe_pool")) is mowe.MowePoolConfig


def test_attention_implementation_reaches_the_language_model(saved: Path, processor: mowe.MoweProcessor) -> None:
    inputs = processor("hello")
    for name in ("eager", "sdpa"):
        model = mowe.MoweForConditionalGeneration.from_pretrained(saved, attn_implementation=name)
        assert model.language_model.config._attn_implementation == name
    model.set_attn_implementation("eager")
    assert model.language_model.config._attn_implementation == "eager"
    assert model(**inputs, output_attentions=True).attentions[0].shape[0] == 1


@pytest.mark.parametrize("as_folders", [False, True], ids=["modules", "folders"])
def test_preset_of_the_paper(tmp_path: Path, as_folders: bool) -> None:
    """Whisper base, pool of two Whisper and two HuBERT, a slot of each router, strided convolutions."""
    parts = [whisper(0), whisper(1), whisper(2), hubert(3), hubert(4), language_model()]
    if as_folders:
        for i, part in enumerate(parts):
            part.save_pretrained(tmp_path / str(i))
        base, *pool, lm = [tmp_path / str(i) for i in range(6)]
    else:
        base, lm = parts[0], parts[5]
        pool = mowe.EncoderPool.from_encoders(parts[1:5])
    model = mowe.MoweForConditionalGeneration.from_parts(base, pool, lm, audio_token_id=259)
    config = model.config
    assert (config.num_independent_slots, config.num_dependent_slots, config.projector_stride) == (1, 1, 8)
    assert (config.context, config.pool_config.context, config.projector_type) == ("window", "window", "conv")
    assert config.router_losses == {"independent_entropy": 0.1, "dependent_entropy": 0.1, "diversity": 0.1}
    assert not model.training and {p.device.type for p in model.parameters()} == {"cpu"}
    for encoder, given in zip(
        [model.audio_tower.to_transformers(0), *map(model.model.mixture.pool.to_transformers, range(4))],
        parts[:5],
        strict=True,
    ):
        expected = getattr(given, "encoder", given) if given.config.model_type == "whisper" else given
        for name, value in encoder.state_dict().items():
            if "parametrizations" not in name:  # weight norm: only the product of the two is kept
                assert torch.equal(value, expected.state_dict()[name])
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, parts[5].state_dict()[name])
    assert len(answers(model, processor_of(model)(PROMPTS[0], audio=CLIPS[0]))) == 1


@pytest.mark.parametrize(("base", "context"), [(whisper(0), "window"), (whisper(0), "valid"), (hubert(0), "valid")])
def test_base_encoder_gives_what_it_gives_alone(base: Any, context: str) -> None:
    model = tiny_model(base=base, context=context)
    wave = clip(20_000)
    with torch.no_grad():
        assert_same(model.get_audio_features(wave[None]).last_hidden_state, alone(base, wave, context), 1e-4)


def test_base_encoder_from_a_folder_brings_its_normalisation(tmp_path: Path) -> None:
    base, wave = hubert(0), clip(20_000)
    base.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    model = tiny_model(base=tmp_path)
    assert model.config.audio_do_normalize
    with torch.no_grad():
        got = model.get_audio_features(wave[None]).last_hidden_state
        assert_same(got, alone(base, wave, do_normalize=True), 1e-4)


def test_parts_follow_the_language_model_in_dtype() -> None:
    model = tiny_model(language_model().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_settings_for_generation_are_those_of_the_language_model() -> None:
    lm = language_model()
    lm.generation_config.update(max_new_tokens=3, eos_token_id=[257, 5])
    generation = tiny_model(lm).generation_config
    assert (generation.max_new_tokens, generation.eos_token_id) == (3, [257, 5])


def test_a_pool_of_folders_has_the_context_that_is_asked_for(tmp_path: Path) -> None:
    whisper(1).save_pretrained(tmp_path)
    for context in ("valid", "window"):
        model = mowe.MoweForConditionalGeneration.from_parts(
            whisper(0), [tmp_path], language_model(), audio_token_id=259, context=context
        )
        assert model.config.pool_config.context == model.model.mixture.pool.config.context == context


def test_loaded_from_a_state_dict(model: Any, processor: mowe.MoweProcessor) -> None:
    load = mowe.MoweForConditionalGeneration.from_pretrained
    loaded = load(None, config=model.config, state_dict=model.state_dict())
    inputs = processor(PROMPTS, audio=CLIPS)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(CheckpointError, match=f"state_dict: missing keys of the model: {BIAS}"):
        load(None, config=model.config, state_dict={k: v for k, v in model.state_dict().items() if k != BIAS})


PARTS = ("audio_tower", "mixture", "language_model")


@pytest.mark.parametrize("offloaded", PARTS)
def test_only_the_language_model_can_be_offloaded(
    model: Any, processor: mowe.MoweProcessor, saved: Path, tmp_path: Path, offloaded: str
) -> None:
    device_map = {f"model.{part}": "disk" if part == offloaded else "cpu" for part in PARTS}

    def load() -> mowe.MoweForConditionalGeneration:
        return mowe.MoweForConditionalGeneration.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)

    if offloaded != "language_model":
        with pytest.raises(ConfigError, match=rf"device_map offloads parts of model\.{offloaded}; only"):
            load()
        return
    inputs = processor(PROMPTS, audio=CLIPS)
    with torch.no_grad():
        assert torch.equal(load()(**inputs).logits, model(**inputs).logits)


def test_parts_that_are_read_without_being_called_are_not_split(model: Any) -> None:
    for part in (model.audio_tower, model.model.mixture, *model.model.mixture.pool.families):
        assert type(part).__name__ in model._no_split_modules


def test_parts_that_cannot_be_joined() -> None:
    with pytest.raises(ConfigError, match="expected a list of checkpoints, got 'folder'"):
        tiny_model(pool="folder")
    with pytest.raises(ConfigError, match="num_dependent_slots is 5 but the pool has 4"):
        tiny_model(num_dependent_slots=5)
    with pytest.raises(ConfigError, match=r"MoweConfig: unknown keys \['slots', 'top_k'\]"):
        tiny_model(slots=5, top_k=2)
    short = whisper(0, max_source_positions=750)
    with pytest.raises(ConfigError, match="audio_config: context 'window' is 30 s, a Whisper encoder of 750 frames"):
        tiny_model(base=short, context="window")
    with pytest.raises(ConfigError, match="pool_config: context 'window' is 30 s, a Whisper encoder of 750 frames"):
        tiny_model(pool=mowe.EncoderPool.from_encoders([whisper(1), short]))
    with pytest.raises(ConfigError, match="audio_token_id is not set"):
        mowe.MoweForConditionalGeneration(mowe.MoweConfig(pool_config=tiny_pool().config))
    with pytest.raises(ConfigError, match="holds 0 encoders"):
        tiny_model(base=torch.nn.Linear(2, 2))


def test_language_model_from_a_damaged_folder(tmp_path: Path) -> None:
    def parts() -> None:
        mowe.MoweForConditionalGeneration.from_parts(whisper(0), tiny_pool(), tmp_path / "lm", audio_token_id=259)

    with pytest.raises(CheckpointError, match="lm: no such folder"):
        parts()
    language_model().save_pretrained(tmp_path / "lm")
    parts()
    edit(lambda tensors: tensors.pop("model.norm.weight"))(tmp_path / "lm")
    with pytest.raises(CheckpointError, match=r"missing keys of the language model: model\.norm\.weight"):
        parts()


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def configure(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


BIAS = "model.mixture.multi_modal_projector.bias"
DAMAGES = {
    "missing key": (edit(lambda t: t.pop(BIAS)), f"missing keys of the model: {BIAS}"),
    "surplus key": (edit(lambda t: t.update(more=torch.ones(2))), "surplus keys of the model: more"),
    "shape": (edit(lambda t: t.update({BIAS: torch.ones(2)})), f"misshapen keys of the model: {BIAS}"),
    "half a file": (cut(20_000), "cannot read the parameters"),
    "empty file": (cut(0), "cannot read the parameters"),
    "not safetensors": (write("model.safetensors", "x" * 99), "cannot read the parameters"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
    "no folder": (shutil.rmtree, "no such folder"),
    "config not JSON": (write("config.json", "{"), "not a valid JSON"),
    "config is a list": (write("config.json", "[1]"), "cannot read"),
    "index not JSON": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
        "cannot read the parameters",
    ),
}  # fmt: skip
MISTAKES = {
    "another model": (configure(lambda c: c.update(model_type="llama")), "model_type must be 'mowe', got 'llama'"),
    "unknown key": (configure(lambda c: c.update(routers=2)), "MoweConfig: unknown keys ['routers']"),
    "unknown key of the pool": (
        configure(lambda c: c["pool_config"].update(size=4)), "MowePoolConfig: unknown keys ['size']",
    ),
    "unknown key of an encoder": (
        configure(lambda c: c["pool_config"]["encoders"][1].update(normalise=True)), "encoder 1: expected keys",
    ),
    "type": (configure(lambda c: c.update(projector_stride="8")), "'projector_stride' expected int, got str"),
    "empty pool": (configure(lambda c: c["pool_config"].update(encoders=[])), "at least one encoder"),
    "unsupported encoder": (
        configure(lambda c: c["pool_config"]["encoders"][0]["config"].update(model_type="clap")), "'clap'",
    ),
    "too many slots": (configure(lambda c: c.update(num_dependent_slots=9)), "num_dependent_slots is 9"),
    "unknown language model": (configure(lambda c: c["text_config"].update(model_type="none")), "'none'"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*DAMAGES, *MISTAKES])
def test_damaged_folder_is_refused_in_one_line(saved: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage, told = {**DAMAGES, **MISTAKES}[case]
    damage(folder)
    with pytest.raises(CheckpointError if case in DAMAGES else ConfigError) as error:
        mowe.MoweForConditionalGeneration.from_pretrained(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}: ") and told in message and "\n" not in message


def test_lost_shard_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    lost = sorted(tmp_path.glob("model-0*"))[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        mowe.MoweForConditionalGeneration.from_pretrained(tmp_path)


def test_whisper_decoder_alone_is_no_encoder() -> None:
    with pytest.raises(ConfigError, match="holds 0 encoders"):
        tiny_model(base=WhisperForCausalLM(whisper(0).config))
