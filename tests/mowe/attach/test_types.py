"""What holds for every supported model type; scripts/attach_table.py makes a table of the outcome."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

import mowe
from mowe.attach import LAYOUTS, pieces
from tests.mowe.attach.audio_llms import AUDIO, TINY
from tests.mowe.attach.models import inputs, tiny, tiny_pool, without_timm
from tests.mowe.attach.tools import LONG, attached, awaken, logits, plain, prompts, same_state, state, step_logits

# Their own answer to a clip changes with the padding that a longer neighbour brings, mixture or not.
CHANGED_BY_PADDING = ("granite_speech", "granite_speech_plus", "phi4_multimodal", "fun_asr_nano")

# Layers of gemma3n with 4 inputs, whatever its size: fewer than a block of bitsandbytes.
TOO_SMALL_FOR_FOUR_BIT = (r"model\.language_model\.layers\.\d+\.altup",)

every_type = pytest.mark.parametrize("model_type", TINY)
every_fusion = pytest.mark.parametrize(
    ("model_type", "fusion"), [(name, fusion) for name in TINY for fusion in LAYOUTS[name].fusions]
)


def test_every_layout_is_tested() -> None:
    assert TINY.keys() == LAYOUTS.keys()


@every_fusion
def test_fusion(model_type: str, fusion: str) -> None:
    model = tiny(model_type)
    batch = inputs(model_type, prompts(model_type))
    own_class, before = type(model), state(model)
    expected, expected_steps = logits(model, plain(batch)), step_logits(model, plain(batch))
    assert mowe.attach(model, tiny_pool(), fusion=fusion) is model
    assert isinstance(model, own_class) and type(model).__name__ == own_class.__name__
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(step_logits(model, batch), expected_steps)

    _train(model, batch)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-4)
    assert not torch.allclose(step_logits(model, batch), expected_steps, atol=1e-4)

    mowe.detach(model)
    assert type(model) is own_class
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert same_state(model.state_dict(), before)
    assert torch.equal(logits(model, plain(batch)), expected)


def _train(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """A few steps of the mixture alone; every part of it learns, and nothing else changes."""
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("mowe.")}
    parts = {"pool": model.mowe.pool, "router": model.mowe.router, "fusion": model.mowe.fusion}
    before = {name: state(part) for name, part in parts.items()}
    optimizer = torch.optim.AdamW(model.mowe.parameters(), lr=1e-2)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == AUDIO, -100)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    for name, part in parts.items():
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters()), name
        assert not same_state(part.state_dict(), before[name]), name
    assert same_state({name: model.state_dict()[name] for name in frozen}, frozen)


@every_type
def test_batch(model_type: str) -> None:
    model = attached(model_type)
    runs = []
    model.mowe.pool.register_forward_hook(lambda *_: runs.append(1))
    batch = inputs(model_type, prompts(model_type))
    steps = step_logits(model, batch)
    assert len(runs) == 1
    if model_type in CHANGED_BY_PADDING:
        pytest.skip("its own answer changes with the padding")
    for number in range(len(prompts(model_type))):
        alone = step_logits(model, _alone(model_type, number, batch))
        torch.testing.assert_close(alone[0], steps[number], rtol=1e-4, atol=1e-5)


def _alone(model_type: str, number: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of one prompt of a batch, without its neighbours and its padding."""
    alone = inputs(model_type, [prompts(model_type)[number]])
    real = batch["attention_mask"][number].bool()
    return {
        **alone,
        "input_ids": batch["input_ids"][number, real][None],
        "attention_mask": batch["attention_mask"][number, real][None],
    }


@every_type
def test_windows(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An audio longer than the pool takes at once: every piece is routed by itself and changes its own frames."""
    model = attached(model_type)
    batch = inputs(model_type, [[LONG]])
    whole = model(**batch)
    assert whole.router_logits.shape[0] == 1
    monkeypatch.setattr(pieces, "WINDOW_SAMPLES", 20_000)
    halves = model(**batch)
    assert halves.router_logits.shape[0] == 2
    assert not torch.equal(halves.logits, whole.logits)
    if TINY[model_type].windows:
        monkeypatch.undo()
        both = model(**inputs(model_type, [prompts(model_type)[1]]))
        assert both.router_logits.shape[0] == 3


@every_type
def test_adapter_folder(model_type: str, tmp_path: Path) -> None:
    model = attached(model_type)
    batch = inputs(model_type, prompts(model_type))
    expected = logits(model, batch)
    mowe.save_adapter(model, tmp_path / "adapter")
    other = mowe.attach_from(tiny(model_type), tmp_path / "adapter")
    assert same_state(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other, batch), expected)

    model.save_pretrained(tmp_path / "whole")
    with without_timm():
        whole = mowe.load_attached(tmp_path / "whole").requires_grad_(False)
    assert type(whole) is type(model)
    assert torch.equal(logits(whole, batch), expected)


@every_type
def test_four_bit(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    skipped = [*mowe.skip_modules(model_type), *TOO_SMALL_FOR_FOUR_BIT]
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    with without_timm():
        model = type(model).from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    layout = LAYOUTS[model_type]
    assert _four_bit_layers(model.get_submodule(layout.language_model))
    assert not any(_four_bit_layers(model.get_submodule(path)) for path in (layout.tower, layout.projector) if path)

    batch = inputs(model_type, prompts(model_type))
    expected = logits(model, plain(batch))
    mowe.attach(model, tiny_pool())
    assert torch.equal(logits(model, batch), expected)
    mowe.save_adapter(awaken(model), tmp_path / "adapter")
    trained = logits(model, batch)
    assert not torch.allclose(trained, expected, atol=1e-4)
    mowe.attach_from(mowe.detach(model), tmp_path / "adapter")
    assert torch.equal(logits(model, batch), trained)


def _four_bit_layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]


@every_type
def test_lora(model_type: str, tmp_path: Path) -> None:
    model = mowe.attach(tiny(model_type), tiny_pool())
    batch = inputs(model_type, prompts(model_type))
    expected = step_logits(model, batch)
    adapted = get_peft_model(model, model.lora_config(r=2, init_lora_weights=True))
    names = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    inside = f"base_model.model.{LAYOUTS[model_type].language_model}."
    assert names and all(name.startswith(inside) for name in names)
    assert torch.equal(step_logits(adapted, batch), expected)

    model.mowe.requires_grad_(True)
    awaken(model)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(parameter.grad.any() for name, parameter in adapted.named_parameters() if ".lora_B" in name)
    assert any(parameter.grad.any() for parameter in model.mowe.fusion.parameters())
    trained = step_logits(adapted, batch)
    assert not torch.allclose(trained, expected, atol=1e-4)
    mowe.save_adapter(adapted, tmp_path)
    assert torch.equal(step_logits(mowe.attach_from(tiny(model_type), tmp_path), batch), trained)
