"""The model as transformers users meet it: generation, saving and loading, language models of many kinds, bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForMultimodalLM, AutoProcessor, WhisperForCausalLM

import mowe
from mowe.errors import AudioError, CheckpointError, ConfigError
from tests.mowe.audio_llm import language_model, processor_of, tiny_model, tiny_pool
from tests.mowe.encoders import assert_same, clip, hubert, whisper

PROMPTS = ["a <|audio|> b", "<|audio|> and <|audio|>?", "no audio"]
CLIPS = [[clip(16_000, 1)], [clip(40_000, 2), clip(9_000, 3)], []]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


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


def answers(model: Any, inputs: Any, **settings: Any) -> list[list[int]]:
    return model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :].tolist()


def calls_of_pool(model: Any) -> list[None]:
    """Grows with every run of the pool."""
    calls: list[None] = []
    model.model.mixture.pool.register_forward_hook(lambda *_: calls.append(None))
    return calls


@torch.no_grad()
def greedy_without_cache(model: Any, inputs: Any, steps: int) -> list[list[int]]:
    """What generation means, spelled out: the whole prompt through the model again for every token."""
    inputs = dict(inputs)
    for _ in range(steps):
        logits = model(**inputs).logits[:, -1]
        logits[:, 257] = float("-inf")  # as min_new_tokens does
        inputs["input_ids"] = torch.cat((inputs["input_ids"], logits.argmax(-1, keepdim=True)), 1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    return inputs["input_ids"][:, -steps:].tolist()


KINDS = ["llama", "gpt2", "gemma2", "gemma3_text", "qwen2", "phi", "phi3", "mistral", "opt", "bloom", "mixtral"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_language_model(kind: str) -> None:
    """The same as the language model alone on text; a batch of mixed prompts gives what each prompt gives."""
    lm = language_model(kind)
    model = tiny_model(lm)
    processor = processor_of(model)
    text = processor(["hello there", "you"])
    with torch.no_grad():
        assert torch.equal(model(**text).logits, lm(**text).logits)
    batch = answers(model, processor(PROMPTS, audio=CLIPS))
    single = [processor(prompt, audio=clips) for prompt, clips in zip(PROMPTS, CLIPS, strict=True)]
    assert batch == [answers(model, inputs)[0] for inputs in single]
    assert batch[1] == greedy_without_cache(model, single[1], 6)[0]


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "llama"])
def test_audio_enters_the_language_model_as_the_projector_gives_it(kind: str) -> None:
    """Gemma's embeddings are scaled by sqrt(hidden) inside the embedding, so the audio is not scaled on its way."""
    model = tiny_model(language_model(kind))
    inputs = processor_of(model)("a<|audio|>", audio=clip(16_000))
    seen: list[torch.Tensor] = []
    first = model.language_model.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]), with_kwargs=False)
    with torch.no_grad():
        model(**inputs)
        audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    hook.remove()
    assert torch.equal(seen[0][0, 1:], audio.pooler_output)
    row = model.get_input_embeddings().weight[inputs["input_ids"][0, 0]]
    assert_same(seen[0][0, 0], row * (32**0.5 if "gemma" in kind else 1))


def test_a_language_model_without_past_key_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="'mamba' language model has no past_key_values"):
        tiny_model(language_model("mamba"))


def test_audio_over_30_s_is_routed_window_by_window(model: Any, processor: mowe.MoweProcessor) -> None:
    wave = torch.cat((clip(480_000, 1), clip(300_000, 2, gain=0.01)))
    inputs = processor("<|audio|>?", audio=wave)
    assert inputs["input_features"].shape[0] == 2
    with torch.no_grad():
        out = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
        parts = [model.get_audio_features(part[None]) for part in wave.split(480_000)]
        assert_same(out.pooler_output, torch.cat([part.pooler_output for part in parts]))
        assert torch.equal(out.mixture.indices, torch.cat([part.mixture.indices for part in parts]))
        assert model(**inputs).router_indices.shape == (2, 2)


def test_audio_features(model: Any) -> None:
    waves = [clip(16_000, 1), clip(9_000, 2)]
    mask = torch.arange(16_000) < torch.tensor([[16_000], [9_000]])
    with torch.no_grad():
        out = model.get_audio_features(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), mask)
        alone = [model.get_audio_features(wave[None]) for wave in waves]
    assert out.last_hidden_state.shape == (50 + 28, 32) and out.pooler_output.shape == (7 + 4, 32)
    assert out.mixture.lengths == (7, 4) and out.mixture.router_logits.shape == (2, 4)
    for name in ("last_hidden_state", "pooler_output"):
        assert_same(getattr(out, name), torch.cat([getattr(one, name) for one in alone]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_batches_are_single_calls_and_the_pool_runs_once(settings: dict[str, Any]) -> None:
    model = tiny_model()
    processor = processor_of(model)
    calls = calls_of_pool(model)
    batch = answers(model, processor(PROMPTS, audio=CLIPS), **settings)
    assert len(calls) == 1
    single = [processor(prompt, audio=clips) for prompt, clips in zip(PROMPTS, CLIPS, strict=True)]
    assert batch == [row for inputs in single for row in answers(model, inputs, **settings)]
    assert len(calls) == 3


def test_beams_of_a_prompt_with_several_audios_hear_the_same(model: Any, processor: mowe.MoweProcessor) -> None:
    """The score that beam search reports is that of its answer under the model."""
    inputs = processor(PROMPTS[1], audio=CLIPS[1])
    out = model.generate(
        **inputs, **GREEDY, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        full = {**inputs, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        log_p = model(**full).logits[:, prompt - 1 : -1].log_softmax(-1)
    score = log_p.gather(2, out.sequences[:, prompt:, None]).sum()
    assert_same(out.sequences_scores, score[None], 1e-4)


def test_sampling(model: Any, processor: mowe.MoweProcessor) -> None:
    inputs = processor(PROMPTS, audio=CLIPS)
    settings = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    first = answers(model, inputs, **settings)
    torch.manual_seed(0)
    assert answers(model, inputs, **settings) == first
    assert len(first) == 6 and len({tuple(row) for row in first}) > 1


def test_assisted_decoding_is_for_text_alone(model: Any, processor: mowe.MoweProcessor) -> None:
    """transformers drops the candidates of the first step where a prompt is given as embeddings."""
    text = processor("abcabcab")
    assert answers(model, text, prompt_lookup_num_tokens=2) == answers(model, text)
    with pytest.raises(ConfigError, match="assisted decoding"):
        answers(model, processor(PROMPTS[0], audio=CLIPS[0]), prompt_lookup_num_tokens=2)


def test_vocabulary_can_grow() -> None:
    model = tiny_model(language_model(vocab_size=259, tie_word_embeddings=True))
    model.resize_token_embeddings(264)
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 264
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    inputs = processor_of(model)(PROMPTS, audio=CLIPS, answers=["x", "yy", "z"])
    assert model(**inputs).logits.shape[-1] == 264


def test_a_conversation_goes_on_from_its_cache(model: Any, processor: mowe.MoweProcessor) -> None:
    first = processor(PROMPTS[0], audio=CLIPS[0])
    turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    more = processor("<|audio|> more", audio=CLIPS[1][1])
    inputs = {
        "input_ids": torch.cat((turn.sequences, more["input_ids"]), 1),
        "input_features": torch.nn.utils.rnn.pad_sequence([CLIPS[0][0], CLIPS[1][1]], batch_first=True),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["input_features_mask"] = torch.arange(16_000) < torch.tensor([[16_000], [9_000]])
    assert answers(model, inputs, past_key_values=turn.past_key_values) == answers(model, inputs)


def test_output_names_the_router(model: Any, processor: mowe.MoweProcessor) -> None:
    out = model(**processor(PROMPTS, audio=CLIPS), output_hidden_states=True)
    assert out.router_logits.shape == (3, 4) and out.router_indices.shape == (3, 2) and out.aux_loss.dim() == 0
    assert len(out.hidden_states) == 3 and out.loss is None
    plain = model(**processor("text"))
    assert plain.router_logits is plain.router_indices is plain.aux_loss is None


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


def test_parts_follow_the_language_model_in_dtype() -> None:
    model = tiny_model(language_model().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_parts_that_cannot_be_joined() -> None:
    with pytest.raises(ConfigError, match="num_dependent_slots is 5 but the pool has 4"):
        tiny_model(num_dependent_slots=5)
    with pytest.raises(ConfigError, match=r"unknown keys \['slots'\]"):
        tiny_model(slots=5)
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


MASK = torch.ones(1, 800)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"input_features": torch.zeros(800)}, "must be [windows, samples], got [800]"),
        ({"input_features": torch.zeros(1, 800, 1)}, "must be [windows, samples], got [1, 800, 1]"),
        ({"input_features": torch.zeros(1, 800), "input_features_mask": MASK[:, 1:]}, "and [1, 799]"),
        ({"input_features": torch.zeros(0, 800)}, "needs 400 samples (25 ms) or more, got 0"),
        ({"input_features": torch.zeros(1, 0)}, "needs 400 samples (25 ms) or more, got 0"),
        ({"input_features": torch.zeros(1, 399)}, "needs 400 samples (25 ms) or more, got 399"),
        ({"input_features": torch.zeros(1, 800), "input_features_mask": MASK * 0}, "or more, got 0"),
        ({"input_features": torch.zeros(1, 800), "input_features_mask": MASK.roll(1, 1) * torch.arange(800)}, "first"),
        ({"input_features": torch.zeros(1, 800).long()}, "float"),
        ({"input_features": torch.zeros(1, 480_160)}, "at most 480000 samples, got 480160"),
    ],
)
def test_audio_of_the_wrong_form_is_refused(model: Any, inputs: dict[str, Any], told: str) -> None:
    with pytest.raises(AudioError) as error:
        model.get_audio_features(**inputs)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_placeholders_that_do_not_match_are_refused(model: Any, processor: mowe.MoweProcessor) -> None:
    inputs = processor("<|audio|> b", audio=clip(16_000))
    shorter = {**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": inputs["attention_mask"][:, 1:]}
    silent = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for call in (model, partial(model.generate, max_new_tokens=1)):
        with pytest.raises(AudioError, match="6 audio placeholders but the audio gives 7 tokens"):
            call(**shorter)
        with pytest.raises(AudioError, match="7 audio placeholders but no input_features"):
            call(**silent)


def test_one_kind_of_input_is_needed(model: Any, processor: mowe.MoweProcessor) -> None:
    ids = processor("hello")["input_ids"]
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ConfigError, match="either input_ids or inputs_embeds"):
            model(**inputs)


def test_embeddings_as_input(model: Any, processor: mowe.MoweProcessor) -> None:
    ids = processor("hello")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(input_ids=ids).logits)


def test_placeholder_outside_the_vocabulary(processor: mowe.MoweProcessor) -> None:
    model = tiny_model(language_model(vocab_size=259))
    inputs = processor(PROMPTS, audio=CLIPS, answers=["x", "yy", "z"])
    assert inputs["input_ids"].max() == 259
    assert model(**inputs).loss.isfinite()
    assert len(answers(model, processor(PROMPTS, audio=CLIPS))) == 3


def test_whisper_decoder_alone_is_no_encoder() -> None:
    with pytest.raises(ConfigError, match="holds 0 encoders"):
        tiny_model(base=WhisperForCausalLM(whisper(0).config))
