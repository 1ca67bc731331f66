"""The model: the authors' key names, the documented architecture, generation, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM, Gemma2Model

from mowe.configuration_mowe import CACHE
from mowe.errors import AudioError, CheckpointError, ConfigError
from mowe.meralion import Meralion2Config, MeralionConfig, MeralionForConditionalGeneration
from mowe.meralion.modeling_meralion import MeralionProjector
from tests.mowe.encoders import assert_same
from tests.mowe.meralion.family import FRAMES, PAD, SPEECH_TOKEN, TYPES, audio_tokens, logits, write

VARIANTS = [
    *({"model_type": model_type} for model_type in TYPES),
    {"model_type": "meralion2", "speech_mlp_use_projection": False},
    {"model_type": "meralion3", "speech_mlp_scale_factor": None, "fixed_speech_embeds_length": 12},
]


def load(folder: Path, **settings: Any) -> MeralionForConditionalGeneration:
    return MeralionForConditionalGeneration.from_pretrained(folder, **settings).eval()


def features(chunks: int, seed: int = 3) -> Tensor:
    return torch.randn(chunks, 80, 2 * FRAMES, generator=torch.Generator().manual_seed(seed))


def prompt(chunks: int, tokens: int = 4, text: int = 5) -> list[int]:
    return [256, 7, *[SPEECH_TOKEN] * (tokens * chunks), *range(20 + chunks, 20 + chunks + text)]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def new_tokens(model: MeralionForConditionalGeneration, inputs: dict[str, Any], **settings: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, **settings}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_checkpoints_load_and_save_under_their_names(tmp_path: Path, variant: dict[str, Any]) -> None:
    state = write(tmp_path / "theirs", **variant)
    model, info = MeralionForConditionalGeneration.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "ours")
    again = saved_tensors(tmp_path / "ours")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == variant["model_type"]
    assert all(written[name] == value for name, value in variant.items() if value is not None)


@pytest.mark.parametrize("model_type", TYPES)
def test_auto_class_knows_every_type(tmp_path: Path, model_type: str) -> None:
    write(tmp_path, model_type)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert type(model) is MeralionForConditionalGeneration and model.config.model_type == model_type


def test_shards(tmp_path: Path) -> None:
    state = write(tmp_path / "theirs", "meralion2", shards=3)
    model = load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = saved_tensors(tmp_path / "ours")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    reloaded = load(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, reloaded[name]) for name, value in model.state_dict().items())


def test_a_model_made_here_is_saved_under_their_names_too(tmp_path: Path) -> None:
    state = write(tmp_path / "theirs", "meralion")
    made = MeralionForConditionalGeneration(load(tmp_path / "theirs").config)
    made.save_pretrained(tmp_path / "made")
    assert saved_tensors(tmp_path / "made").keys() == state.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own(tmp_path: Path, tied: bool) -> None:
    """The authors leave the tied head out of their checkpoints; one that has it loads as well."""
    state = write(tmp_path, "meralion2", tie_word_embeddings=tied)
    head = state["text_decoder.model.embed_tokens.weight"] * (1 if tied else 2)
    save_file(state | {"text_decoder.lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, head)
    model.save_pretrained(tmp_path / "ours")
    again = saved_tensors(tmp_path / "ours")
    assert again.keys() - state.keys() == (set() if tied else {"text_decoder.lm_head.weight"})
    assert tied or torch.equal(again["text_decoder.lm_head.weight"], head)


def test_widths_of_the_published_adapters() -> None:
    """[out, in] of the linear layers, with the smaller of the decoders."""
    first = {"mlp_adapter.0": [1280, 19200], "speech_llm_proj.0": [5120, 1280], "speech_llm_proj.3": [2304, 5120]}
    later = {"mlp_adapter.0": [6400, 19200], "gate_proj": [6400, 6400], "pool_proj": [6400, 6400]}
    with torch.device("meta"):
        for config, expected in ((MeralionConfig(), first), (Meralion2Config(), {**later, "out_proj": [2304, 6400]})):
            linear = {name: list(m.weight.shape) for name, m in MeralionProjector(config).adapter.named_modules()
                      if isinstance(m, torch.nn.Linear)}  # fmt: skip
            assert linear == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_are_those_of_the_documented_architecture(tmp_path: Path, variant: dict[str, Any]) -> None:
    state = write(tmp_path, **variant)
    model = load(tmp_path)
    tokens = model.config.fixed_speech_embeds_length
    ids, chunks = torch.tensor([prompt(1, tokens, 9 + tokens), prompt(2, tokens, 9)]), features(3)
    with torch.no_grad():
        got = model(input_ids=ids, input_features=chunks).logits
        text = model(input_ids=ids[:, -8:]).logits
        audio = model.get_audio_features(chunks)
    expected = logits(state, ids, chunks)
    assert_same(got, expected)
    assert_same(text, logits(state, ids[:, -8:], None))
    assert audio.last_hidden_state.shape == (3, FRAMES, 16)
    assert_same(audio.pooler_output, audio_tokens(state, chunks))
    # What this must not be mistaken for.
    for other in [{"scale_audio": False}, {"attention": "sdpa"}][: 1 + Gemma2Model._supports_sdpa]:
        assert (logits(state, ids, chunks, **other) - expected).abs().max() > 1e-2


def test_a_tuple_where_one_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    model = load(tmp_path)
    ids = torch.tensor([prompt(1)])
    with torch.no_grad():
        expected = model(ids, features(1)).logits
        assert torch.equal(model(ids, features(1), return_dict=False)[0], expected)
        model.config.return_dict = False
        assert torch.equal(model(ids, features(1))[0], expected)


def test_attention_is_what_is_asked_for(tmp_path: Path) -> None:
    state = write(tmp_path, "meralion2")
    if not Gemma2Model._supports_sdpa:  # since transformers 5.21: the cap would be left out
        with pytest.raises(CheckpointError, match="Gemma2Model does not support"):
            load(tmp_path, attn_implementation="sdpa")
        return
    model = load(tmp_path, attn_implementation="sdpa")
    ids = torch.tensor([prompt(1)])
    with torch.no_grad():
        assert_same(model(ids, features(1)).logits, logits(state, ids, features(1), attention="sdpa"))


def test_lower_precision(tmp_path: Path) -> None:
    state = write(tmp_path, "meralion2")
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.tensor([prompt(1)])
    with torch.no_grad():
        got = model(ids, features(1)).logits.float()
    expected = logits(state, ids, features(1))
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.98


@pytest.mark.parametrize("model_type", ["meralion", "meralion2"])
def test_generate_of_a_batch_is_that_of_its_prompts(tmp_path: Path, model_type: str) -> None:
    write(tmp_path, model_type)
    model = load(tmp_path)
    calls = []
    model.audio_tower.register_forward_hook(lambda *_: calls.append(1))
    chunks = features(3)
    rows = [prompt(2), prompt(0, text=7), prompt(1)]
    for settings in ({}, {"num_beams": 3}, {"use_cache": False}):
        calls.clear()
        got = new_tokens(model, {**padded(rows), "input_features": chunks}, **settings)
        assert settings.get("use_cache") is False or len(calls) == 1
        alone = [
            new_tokens(model, {**padded([row]), "input_features": audio}, **settings)[0]
            for row, audio in zip(rows, (chunks[:2], None, chunks[2:]), strict=True)
        ]
        assert got == alone
    assert got[0] != new_tokens(model, {**padded(rows[:1]), "input_features": chunks[[1, 0]]})[0]


def test_a_conversation_goes_on_from_its_cache(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    model = load(tmp_path)
    inputs = {**padded([prompt(1)]), "input_features": features(1)}
    turn = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat((turn.sequences, torch.tensor([[5, 6, 7]])), 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert new_tokens(model, more, **{CACHE: turn[CACHE]}) == new_tokens(model, {**more, "input_features": features(1)})


def test_beams_keep_the_chunks_of_a_prompt_together(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    model = load(tmp_path)
    inputs = {**padded([prompt(2)]), "input_features": features(2)}
    model.prepare_inputs_for_generation = spy = Spy(model.prepare_inputs_for_generation)
    new_tokens(model, inputs, num_beams=2)
    assert torch.equal(spy.first["input_features"], features(2).repeat(2, 1, 1))


class Spy:
    """Keeps what the first call returns."""

    def __init__(self, function: Any):
        self.function, self.first = function, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        self.first = self.first or result
        return result


def test_generation_defaults(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    generation = load(tmp_path).generation_config
    assert generation.no_repeat_ngram_size == 6 and generation.do_sample is False
    assert generation.eos_token_id == [257, 107] and generation.pad_token_id == PAD
    assert generation.suppress_tokens == [SPEECH_TOKEN] and generation.cache_implementation is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3, "eos_token_id": 9}))
    generation = load(tmp_path).generation_config
    assert (generation.no_repeat_ngram_size, generation.eos_token_id) == (3, 9)


def test_embeddings_as_a_prompt(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    model = load(tmp_path)
    text = {"input_ids": torch.tensor([[256, 7, 20, 21, 22]])}
    embeds = model.get_input_embeddings()(text["input_ids"])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "no_repeat_ngram_size": 0}
    assert model.generate(inputs_embeds=embeds, **settings).tolist() == new_tokens(model, text, no_repeat_ngram_size=0)


def test_loss_reaches_every_part(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    model = load(tmp_path)
    batch = padded([prompt(1), prompt(0)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == SPEECH_TOKEN, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, input_features=features(1), labels=labels)
    shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert_same(output.loss[None], torch.nn.functional.cross_entropy(*shifted)[None])
    summed = model(**batch, input_features=features(1), labels=labels, num_items_in_batch=1000).loss
    assert_same(summed[None], torch.nn.functional.cross_entropy(*shifted, reduction="sum")[None] / 1000)
    output.loss.backward()
    for part in (model.audio_tower, model.multi_modal_projector, model.language_model):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("rows", "chunks", "told"),
    [
        ([[256, *[SPEECH_TOKEN] * 3]], 1, "prompt 0 has 3 audio placeholders, expected 4 for every chunk"),
        ([prompt(1)], 2, "have 4 audio placeholders, 1 chunks, but input_features has 2 chunks"),
        ([prompt(2)], 1, "have 8 audio placeholders, 2 chunks, but input_features has 1 chunks"),
        ([[256, *[SPEECH_TOKEN] * 2, 5, 6], [256, 5, 6, 7, *[SPEECH_TOKEN] * 6]], 2, "prompt 0 has 2"),
    ],
)
def test_placeholders_must_be_those_of_the_audio(tmp_path: Path, rows: list[list[int]], chunks: int, told: str) -> None:
    write(tmp_path, "meralion2")
    model = load(tmp_path)
    for call in (model, lambda **inputs: new_tokens(model, inputs, num_beams=2)):
        with pytest.raises(AudioError, match=told):
            call(**padded(rows), input_features=features(chunks))


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write(tmp_path, "meralion2")
    model, ids = load(tmp_path), torch.tensor([prompt(1)])
    with pytest.raises(AudioError, match=r"must be \[chunks, 80, 120\], got \[1, 128, 120\]"):
        model(input_ids=ids, input_features=torch.zeros(1, 128, 120))
    with pytest.raises(AudioError, match="4 audio placeholders, 1 chunks, but input_features has 0"):
        model(input_ids=ids)
    for inputs in ({}, {"inputs_embeds": torch.zeros(1, 2, 32), "input_features": features(1)}):
        with pytest.raises(ConfigError, match="either inputs_embeds or input_ids"):
            model(**inputs)


def without(name: str) -> Any:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("ln_speech.bias"), "missing keys of the model: model.multi_modal_projector.ln_speech.bias"),
        (without("text_decoder.model.norm.weight"), "missing keys of the model: model.language_model.norm.weight"),
        (lambda s: s.update({"speech_audio_adapter.extra": torch.ones(1)}), "surplus keys of the model: .*extra"),
        (lambda s: s.update({"ln_speech.bias": torch.ones(3)}), "misshapen keys of the model: .*ln_speech.bias"),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path: Path, change: Any, told: str) -> None:
    state = write(tmp_path, "meralion2")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=told) as error:
        load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the folder has no config.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "no where")
    write(tmp_path, "meralion2")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(CheckpointError, match="cannot read the parameters"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(ConfigError, match=r"model_type must be one of meralion, .* got 'whisper'"):
        load(tmp_path)
