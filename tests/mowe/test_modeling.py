"""The model at work: language models of many kinds, generation, audio features, inputs that do not fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import mowe
from mowe.configuration_mowe import CACHE
from mowe.errors import AudioError, ConfigError
from tests.mowe.audio_llm import CLIPS, GREEDY, PROMPTS, answers, language_model, processor_of, tiny_model, tiny_pool
from tests.mowe.encoders import assert_same, clip


@pytest.fixture(scope="module")
def model() -> mowe.MoweForConditionalGeneration:
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model: mowe.MoweForConditionalGeneration) -> mowe.MoweProcessor:
    return processor_of(model)


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


def test_a_language_model_without_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"'openai-gpt' language model has no {CACHE}"):
        tiny_model(language_model("openai-gpt"))


def test_a_language_model_with_narrow_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="embeddings have width 16, expected its hidden_size 32"):
        tiny_model(language_model("opt", word_embed_proj_dim=16))


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
    assert answers(model, inputs, **{CACHE: turn[CACHE]}) == answers(model, inputs)


def test_output_names_the_router(model: Any, processor: mowe.MoweProcessor) -> None:
    out = model(**processor(PROMPTS, audio=CLIPS), output_hidden_states=True)
    assert out.router_logits.shape == (3, 4) and out.router_indices.shape == (3, 2) and out.aux_loss.dim() == 0
    assert len(out.hidden_states) == 3 and out.loss is None
    assert torch.equal(out.mixture.indices, out.router_indices) and out.mixture.weights.shape == (3, 2)
    plain = model(**processor("text"))
    assert plain.router_logits is plain.router_indices is plain.aux_loss is plain.mixture is None
    assert "mixture" not in out


def test_generation_needs_the_places_of_the_audio(model: Any) -> None:
    with pytest.raises(ConfigError, match="expected input_ids with the places of input_features, got none"):
        model.generate(input_features=torch.zeros(1, 800))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}], ids=str)
def test_the_placeholder_is_never_an_answer(settings: dict[str, Any]) -> None:
    """Of a language model that would say it, beside what the settings suppress."""
    model = tiny_model(language_model(tie_word_embeddings=False))
    inputs = processor_of(model)(PROMPTS[0], audio=CLIPS[0])
    (first,) = answers(model, inputs)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[259] = 3 * head[first[0]]
        assert model(**inputs).logits[0, -1].argmax() == 259
    expected = answers(model, inputs, suppress_tokens=[259, first[0]], **settings)
    assert answers(model, inputs, suppress_tokens=[first[0]], **settings) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_loss_of_a_batch_is_that_of_its_prompts(kind: str) -> None:
    """Whatever the positions of the language model are counted from."""
    model = tiny_model(language_model(kind), router_losses={})
    processor = processor_of(model)
    said = ["x", "yy", "z"]
    with torch.no_grad():
        loss = model(**processor(PROMPTS, audio=CLIPS, answers=said)).loss
        single = [
            model(**processor(prompt, audio=clips, answers=answer)).loss * (len(answer) + 1)
            for prompt, clips, answer in zip(PROMPTS, CLIPS, said, strict=True)
        ]
    assert loss.item() == pytest.approx(sum(single).item() / 7, rel=1e-5)


def test_outputs_as_a_tuple(processor: mowe.MoweProcessor) -> None:
    model = tiny_model()
    inputs = processor(PROMPTS, audio=CLIPS, answers=["x", "yy", "z"])
    expected = model(**inputs)
    loss, logits, *_ = model(**inputs, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[1], logits)
    assert torch.equal(model(**inputs, return_dict=True).logits, logits)


def test_base_and_pool_in_contexts_of_their_own() -> None:
    model = tiny_model(pool=tiny_pool("window"), context="valid")
    wave = clip(16_000)
    with torch.no_grad():
        out = model.get_audio_features(wave[None])
        assert out.last_hidden_state.shape[0] == 50
        expected = model.model.mixture(out.last_hidden_state[None], [wave])
        assert torch.equal(out.pooler_output, expected.tokens)
        other = tiny_model(pool=tiny_pool("valid"), context="valid").get_audio_features(wave[None])
    assert not torch.allclose(out.pooler_output, other.pooler_output)


MASK = torch.ones(1, 800)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"input_features": torch.zeros(800)}, "must be [windows, samples], got [800]"),
        ({"input_features": torch.zeros(0, 800)}, "at least one clip, got none"),
        (dict.fromkeys(("input_features", "input_features_mask"), torch.zeros(0, 0)), "at least one clip, got none"),
        (dict.fromkeys(("input_features", "input_features_mask"), torch.zeros(2, 0)), "or more, got 0"),
        ({"input_features": torch.zeros(1, 800, 1)}, "must be [windows, samples], got [1, 800, 1]"),
        ({"input_features": torch.zeros(1, 800), "input_features_mask": MASK[:, 1:]}, "and [1, 799]"),
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


def test_the_window_that_is_too_long_is_named(model: Any) -> None:
    mask = torch.arange(480_160) < torch.tensor([[16_000], [480_160]])
    with pytest.raises(AudioError, match="clip 1: a Whisper encoder takes at most 480000 samples, got 480160"):
        model.get_audio_features(torch.zeros(mask.shape), mask)


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
    embeds = model.get_input_embeddings()(ids)
    for inputs in (
        {},
        {"input_ids": ids, "inputs_embeds": embeds},
        {"inputs_embeds": embeds, "input_features": torch.zeros(1, 800)},
    ):
        with pytest.raises(ConfigError, match="either inputs_embeds or input_ids"):
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


def test_a_repetition_penalty_takes_a_placeholder_outside_the_vocabulary(processor: mowe.MoweProcessor) -> None:
    """As if the vocabulary had it, and the scores are those of the tokens that it has."""
    small, large = (tiny_model(language_model(vocab_size=size, tie_word_embeddings=False)) for size in (259, 260))
    with torch.no_grad():
        for theirs, ours in zip(large.parameters(), small.parameters(), strict=True):
            theirs[: len(ours)] = ours
    inputs = processor(PROMPTS, audio=CLIPS)
    settings = {**GREEDY, "repetition_penalty": 1.3}
    out = small.generate(**inputs, **settings, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, large.generate(**inputs, **settings))
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert out.scores[0].shape == (3, 259)
