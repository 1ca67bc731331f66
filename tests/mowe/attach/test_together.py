"""Attached mixtures and what else is done with models: copies, threads, accelerate, peft, torch.compile."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model

import mowe
from tests.mowe.attach.models import heard, inputs, tiny, tiny_pool, weak_inputs
from tests.mowe.attach.tools import KINDS, LONG, SHORT, attached, awaken, logits, plain
from tests.mowe.encoders import assert_same


def test_compiled() -> None:
    """Before attaching, with a mixture, and after detaching: what was compiled before is not used."""
    model = tiny("voxtral")
    batch = inputs("voxtral", [[SHORT]])
    expected = logits(model, plain(batch))
    trained = logits(attached("voxtral"), batch)
    model.compile(backend="eager")
    assert_same(logits(model, plain(batch)), expected)
    awaken(mowe.attach(model, tiny_pool()))
    assert_same(logits(model, batch), trained)
    assert_same(logits(mowe.detach(model), plain(batch)), expected)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = attached("qwen2_audio")
    batch = inputs("qwen2_audio", [[SHORT]])
    expected = logits(model, batch)
    other = copy.deepcopy(model)
    awaken(other)
    assert torch.equal(logits(model, batch), expected)
    assert not torch.allclose(logits(other, batch), expected, atol=1e-4)
    mowe.detach(other)
    assert torch.equal(logits(model, batch), expected)


def test_under_hooks_of_accelerate() -> None:
    """accelerate replaces the forward method of the instance when it spreads a model over devices."""
    model = tiny("qwen2_audio")
    batch = inputs("qwen2_audio", [[SHORT]])
    expected = logits(model, plain(batch))
    add_hook_to_module(model, ModelHook())
    awaken(mowe.attach(model, tiny_pool()))
    trained = logits(model, batch)
    assert not torch.allclose(trained, expected, atol=1e-4)
    assert torch.equal(logits(mowe.detach(model), plain(batch)), expected)
    remove_hook_from_module(model)
    assert torch.equal(logits(model, plain(batch)), expected)


def test_threads_hear_their_own() -> None:
    model = awaken(attached("qwen2_audio"))
    given = [{**inputs("qwen2_audio", [[clip]]), **weak_inputs(heard("qwen2_audio", [clip]))} for clip in (SHORT, LONG)]
    with torch.no_grad():
        expected = [model(**one).logits for one in given]

        def call(which: int) -> bool:
            with torch.no_grad():
                return torch.equal(model(**given[which % 2]).logits, expected[which % 2])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(24)))


@pytest.mark.parametrize("model_type", KINDS)
def test_pickles(model_type: str) -> None:
    model = awaken(attached(model_type))
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    given = {**inputs(model_type, [[SHORT]]), **weak_inputs(heard(model_type, [SHORT]))}
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)


def test_lora_of_a_model_that_has_one() -> None:
    """It targets the layers there were, and not those that the first one brought."""
    model = mowe.attach(tiny("qwen2_audio"), tiny_pool())
    targets = model.lora_config().target_modules
    adapted = get_peft_model(model, model.lora_config(r=2))
    assert model.lora_config().target_modules == targets
    adapted.add_adapter("second", model.lora_config(r=3))
    names = [name for name, _ in adapted.named_parameters()]
    first, second = ([n.split(".lora_")[0] for n in names if f".{which}." in n] for which in ("default", "second"))
    assert first and first == second


def test_a_mixture_that_peft_copied() -> None:
    model = mowe.attach(tiny("qwen2_audio"), tiny_pool())
    adapted = get_peft_model(model, model.lora_config(modules_to_save=["mowe"]))
    for call in (adapted, adapted.generate):
        with pytest.raises(
            mowe.ConfigError, match=r"is one of peft's modules_to_save, .*requires_grad_\(True\) trains"
        ):
            call(**inputs("qwen2_audio", [[SHORT]]))


def test_taken_off_inside_what_wraps_it() -> None:
    with pytest.raises(mowe.ConfigError, match="Sequential wraps the model that has the mixture; unwrap it first"):
        mowe.detach(torch.nn.Sequential(attached("qwen2_audio")))
