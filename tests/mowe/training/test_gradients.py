"""The same gradients however a step is cut into batches, and for what learns alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mowe.errors import ConfigError
from mowe.training import TrainConfig, train
from mowe.training.config import TrainableConfig
from mowe.training.log import read_lines
from mowe.training.parts import Parts
from tests.mowe.audio_llm import CLIPS, PROMPTS, processor_of, tiny_model
from tests.mowe.encoders import assert_same_gradients
from tests.mowe.training.tones import write_manifest

LINEAR_LOSSES = {"independent_entropy": 0.3, "dependent_entropy": 0.5, "z_loss": 0.2}
"""Router losses that are means over the windows; the others look at a batch as a whole."""


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, and which encoder families were in training mode then."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            self.training = [f.training for f in (model.audio_tower, *model.model.mixture.pool.families)]


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight clips, and a model whose router losses are means over them."""
    folder = tmp_path_factory.mktemp("linear")
    write_manifest(folder, "eight", 8, seed=2)
    model = tiny_model(router_losses=LINEAR_LOSSES)
    model.save_pretrained(folder / "model")
    processor_of(model).save_pretrained(folder / "model")
    return folder


def first_step(config: TrainConfig) -> Gradients:
    gradients = Gradients()
    train(config, callbacks=[gradients])
    return gradients


def test_accumulated_gradients_are_those_of_one_batch(
    settings: Callable[..., TrainConfig], linear: Path, tmp_path: Path
) -> None:
    """8 x 1, 4 x 2 and 1 x 8 clips; their answers are of 3 and 4 tokens."""
    runs = {}
    for clips in (8, 4, 1):
        runs[clips] = first_step(
            settings(
                model=str(linear / "model"),
                output=str(tmp_path / str(clips)),
                data={"train": [{"manifest": str(linear / "eight.jsonl")}], "batch_clips": clips},
                accumulate=8 // clips,
                max_grad_norm=0.0,
                stages=[{"steps": 1}],
                trainable={"audio_tower": True, "pool": True, "language_model": "full"},
            )
        )
    for clips in (4, 1):
        assert_same_gradients(runs[clips].found, runs[8].found, 1e-4)


def test_encoders_of_one_stack_learn_or_do_not(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path
) -> None:
    """Encoders 0 and 2 are one stack, 1 and 3 another; weight decay is strong, and a later stage changes sides."""
    stage = {"steps": 3, "learning_rate": 1e-2, "warmup": 0.0}
    pools = [[True, False, False, False], [False, False, True, False]]
    stages = [{**stage, "trainable": {"pool": pool, "routers": False, "projector": False}} for pool in pools]
    gradients = first_step(settings(stages=stages, weight_decay=0.5, save_every=3))
    assert all("mixture.pool.families.0." in name for name in gradients.found)
    before, after = (load_file(path / "model.safetensors") for path in (tones / "model", tmp_path / "run" / "model"))
    between = load_file(tmp_path / "run" / "stage-0" / "checkpoint-3" / "model.safetensors")
    for name, value in after.items():
        if name in between:
            assert torch.equal(between[name][1], before[name][1]) and torch.equal(between[name][0], value[0]), name
            assert not torch.equal(between[name][0], before[name][0]), name
            if "weight" in name and "norm" not in name:  # nobody chose encoder 2: weight decay alone moves it
                assert not torch.equal(value[1], before[name][1]), name
        else:
            assert torch.equal(value, before[name]), name
    assert sum("layers" in name for name in between) > 10


def test_frozen_encoders_are_in_evaluation_mode(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    pool = [False, True, False, True]
    gradients = first_step(settings(trainable={"pool": pool}))
    assert gradients.training == [False, False, True]


@pytest.mark.parametrize("slots", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("losses", [{}, {"independent_entropy": 0.1}, {"diversity": 0.0, "z_loss": 0.1}])
def test_everything_that_learns_gets_a_gradient(slots: tuple[int, int], scaled: bool, losses: dict) -> None:
    """Or DDP would wait for it. Without weights that scale the features, a router has the losses of its own alone."""
    independent, dependent = slots
    model = tiny_model(
        num_independent_slots=independent, num_dependent_slots=dependent, scale_by_weight=scaled, router_losses=losses
    )
    parts = Parts(model)
    everything = TrainableConfig(audio_tower=True, pool=True, language_model="full")
    without = ["data-independent"] * (independent and not scaled and "independent_entropy" not in losses)
    without += ["data-dependent"] * (dependent and not scaled and "z_loss" not in losses)
    if without:
        with pytest.raises(ConfigError, match=f"^trainable.routers: nothing gives the {without[0]} router a gradient"):
            parts.choose(everything)
        everything.routers = False
    parts.choose(everything)
    batch = processor_of(model)(text=PROMPTS, audio=CLIPS)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in parts.names) == (parameter.grad is not None), name
    assert sum("router." in name for name in parts.names) == (0 if without else independent + dependent)


def test_lora_is_on_the_language_model_and_merged(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path
) -> None:
    gradients = first_step(settings(trainable={"language_model": "lora"}, lora={"rank": 2, "dropout": 0.1}))
    adapters = {name for name in gradients.found if "lora_" in name}
    assert adapters and all(".language_model." in name for name in adapters)
    assert all(".mixture." in name for name in gradients.found.keys() - adapters)
    before, after = (load_file(path / "model.safetensors") for path in (tones / "model", tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name and "q_proj" in name for name in moved)
    assert not any("audio_tower" in name or "pool" in name or "embed" in name for name in moved)


def test_bfloat16(settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path) -> None:
    """What is frozen is stored in bfloat16 while training, and saved as it was; what learns stays in float32."""

    class Types(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.found = {name: p.dtype for name, p in model.named_parameters()}

    fields = {"trainable": {"pool": [True, False, True, False]}, "stages": [{"steps": 2, "learning_rate": 1e-3}]}
    train(settings(**fields, output=str(tmp_path / "full")))
    types = Types()
    train(settings(**fields, bf16=True), callbacks=[types])
    for name, dtype in types.found.items():
        learns = any(part in name for part in ("families.0", "router", "projector"))
        assert dtype == (torch.float32 if learns else torch.bfloat16), name
    losses = [[e["loss"] for e in read_lines(tmp_path / n / "log.jsonl") if "loss" in e] for n in ("run", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]
    before, after = (load_file(path / "model.safetensors") for path in (tones / "model", tmp_path / "run" / "model"))
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert ("families.1" not in name and "tower" not in name) or torch.equal(value, before[name]), name


def test_checkpointed_activations_change_nothing(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    fields = {"trainable": {"pool": True, "audio_tower": True, "language_model": "full"}, "stages": [{"steps": 1}]}
    plain = first_step(settings(**fields, output=str(tmp_path / "plain")))
    assert_same_gradients(first_step(settings(**fields, gradient_checkpointing=True)).found, plain.found, 1e-5)
