"""A language model in 4 bits is trained through adapters: what comes out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import mowe
from mowe import MoweForConditionalGeneration
from mowe.errors import CheckpointError, ConfigError
from mowe.training import TrainConfig, train
from mowe.training.log import read_lines
from mowe.training.parts import parts_in_4_bits
from mowe.training.start import load
from tests.mowe.audio_llm import CLIPS, PROMPTS, processor_of, tiny_model

LORA: dict[str, Any] = {"trainable": {"language_model": "lora"}, "lora": {"rank": 2}}


class Trained(TrainerCallback):
    """Keeps the model that was trained, the types of its parameters, and the names of those that learned."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model.eval()


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose language model and encoders are in 4 bits."""
    folder = tmp_path_factory.mktemp("nf4")
    model = mowe.quantize(tiny_model())
    model.save_pretrained(folder)
    processor_of(model).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: MoweForConditionalGeneration) -> torch.Tensor:
    return model(**processor_of(model)(text=PROMPTS, audio=CLIPS)).logits


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_lines(folder / "log.jsonl") if "loss" in entry]


def test_adapters_are_saved_beside_a_model_in_4_bits(settings: Callable[..., TrainConfig], four_bit: Path) -> None:
    trained = Trained()
    done = train(settings(model=str(four_bit), **LORA), callbacks=[trained])
    assert {kind for kind in ("lora_", "router", "projector") if any(kind in name for name in trained.learning)} == {
        "lora_", "router", "projector",
    }  # fmt: skip
    model = MoweForConditionalGeneration.from_pretrained(done.model)
    assert torch.equal(logits(model), logits(trained.model))
    before, after = (load_file(path / "model.safetensors") for path in (four_bit, done.model))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved
    assert all("router" in name or "projector" in name for name in moved)
    assert any("lora_B" in name for name in load_file(done.model / "adapter_model.safetensors"))
    assert isinstance(model.language_model.model.layers[0].mlp.up_proj.base_layer, Linear4bit)
    del after["model.mixture.router.dependent.weight"]
    save_file(after, done.model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys of the model: .*router\.dependent\.weight"):
        MoweForConditionalGeneration.from_pretrained(done.model)


def test_the_next_run_goes_on_with_the_adapters(
    settings: Callable[..., TrainConfig], four_bit: Path, tmp_path: Path
) -> None:
    """Two steps and then two more, at a constant rate without momentum, are the same as four."""
    steady = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
    fields = {**LORA, "trainer": {"optim": "sgd"}, "data": {"batch_clips": 12}}
    whole = train(settings(**fields, model=str(four_bit), output=str(tmp_path / "4"), stages=[{**steady, "steps": 4}]))
    half = train(settings(**fields, model=str(four_bit), output=str(tmp_path / "2"), stages=[{**steady, "steps": 2}]))
    again = {**fields, "model": str(half.model), "output": str(tmp_path / "2+2"), "stages": [{**steady, "steps": 2}]}
    done = train(settings(**again))
    for name in ("model.safetensors", "adapter_model.safetensors"):
        expected, got = (load_file(path / name) for path in (whole.model, done.model))
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=key)
    with pytest.raises(ConfigError, match="lora: the adapters of the model have r 2, got 4"):
        train(settings(**{**again, "output": str(tmp_path / "other"), "lora": {"rank": 4}}))


def test_resumes(settings: Callable[..., TrainConfig], four_bit: Path, tmp_path: Path) -> None:
    """From a checkpoint, whose folder holds the adapters and not the codes."""
    config = settings(**LORA, model=str(four_bit), stages=[{"steps": 4}], save_every=2)
    done = train(config)
    expected = losses(tmp_path / "run"), load_file(done.model / "adapter_model.safetensors")
    stored = load_file(tmp_path / "run" / "stage-0" / "checkpoint-2" / "model.safetensors")
    assert any("lora_" in name for name in stored) and all(value.is_floating_point() for value in stored.values())
    for left in ("stage-0/checkpoint-4", "model"):
        (tmp_path / "run" / left).rename(tmp_path / left.replace("/", "-"))
    train(config, resume=True)
    assert losses(tmp_path / "run") == expected[0]
    got = load_file(done.model / "adapter_model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in expected[1].items())


def test_quantised_while_training_and_merged_in_full(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path
) -> None:
    """The adapters that were trained on the 4-bit language model end in the one that it was made from."""
    trained = Trained()
    done = train(settings(**LORA, load_in_4bit=True), callbacks=[trained])
    assert any(dtype == torch.uint8 for dtype in trained.types.values())
    assert not any(dtype == torch.uint8 for name, dtype in trained.types.items() if "language_model" not in name)
    before, after = (load_file(path / "model.safetensors") for path in (tones / "model", done.model))
    assert before.keys() == after.keys() and not list(done.model.glob("adapter*"))
    learned = dict(trained.model.named_parameters())
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        expected = value
        if f"{layer}.lora_A.default.weight" in learned:
            expected = value + 8 * learned[f"{layer}.lora_B.default.weight"] @ learned[f"{layer}.lora_A.default.weight"]
        elif name in trained.learning:
            expected = learned[name]
        torch.testing.assert_close(after[name], expected.detach(), rtol=0, atol=1e-6, msg=name)
    assert "quantization_config" not in json.loads((done.model / "config.json").read_text())


def test_in_bfloat16_codes_stay_codes(settings: Callable[..., TrainConfig], four_bit: Path, tmp_path: Path) -> None:
    fields = {**LORA, "model": str(four_bit), "stages": [{"steps": 2, "learning_rate": 1e-3}]}
    train(settings(**fields, output=str(tmp_path / "full")))
    trained = Trained()
    train(settings(**fields, bf16=True), callbacks=[trained])
    kinds = {
        "lora_": torch.float32, "router": torch.float32, "projector": torch.float32, "q_proj.base_layer": torch.uint8,
        "embed_tokens": torch.bfloat16, "families": torch.bfloat16, "lm_head": torch.bfloat16,
    }  # fmt: skip
    for kind, dtype in kinds.items():
        assert {t for name, t in trained.types.items() if kind in name} == {dtype}, kind
    layers = [m for m in trained.model.modules() if isinstance(m, Linear4bit)]
    assert layers and all(layer.compute_dtype == torch.bfloat16 for layer in layers)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "full"), rel=0.03)
    assert losses(tmp_path / "run") != losses(tmp_path / "full")


def test_routers_and_projector_learn_without_adapters(settings: Callable[..., TrainConfig], four_bit: Path) -> None:
    done = train(settings(model=str(four_bit)))
    assert not list(done.model.glob("adapter*"))
    before, after = (load_file(path / "model.safetensors") for path in (four_bit, done.model))
    assert {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (
            {"language_model": "full"},
            "trainable.language_model: language_model is in 4 bits, which cannot learn; lora trains adapters on it$",
        ),
        ({"pool": [False, True, False, False]}, "trainable.pool: pool is in 4 bits, which cannot learn$"),
        ({"audio_tower": True}, "trainable.audio_tower: audio_tower is in 4 bits, which cannot learn$"),
    ],
)
def test_what_is_in_4_bits_is_not_trained_itself(
    settings: Callable[..., TrainConfig], four_bit: Path, tmp_path: Path, trainable: dict[str, Any], message: str
) -> None:
    stages = [{"steps": 1}, {"steps": 1, "trainable": trainable}]
    with pytest.raises(ConfigError, match=message):
        train(settings(model=str(four_bit), stages=stages))
    assert not (tmp_path / "run").exists()
    if "language_model" in trainable:
        with pytest.raises(ConfigError, match=message):
            train(settings(load_in_4bit=True, stages=stages))


def test_encoders_in_4_bits_decide_how_scales_are_stored(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    model = mowe.quantize(tiny_model(), parts=["pool"], double_quant=False)
    model.save_pretrained(tmp_path / "pool")
    processor_of(model).save_pretrained(tmp_path / "pool")
    model, _ = load(settings(model=str(tmp_path / "pool")), in_4_bits=True)
    assert parts_in_4_bits(model) == ["pool", "language_model"]
    assert not model.config.quantization_config.double_quant


def test_what_is_in_4_bits_is_not_sharded(
    settings: Callable[..., TrainConfig], four_bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if of several processes.
    monkeypatch.setattr("mowe.training.run.connect", lambda config: PartialState(cpu=True))
    with pytest.raises(ConfigError, match="fsdp: a model in 4 bits is not sharded"):
        train(settings(**LORA, model=str(four_bit), fsdp=True))
