"""Training: the Trainer of transformers, accumulated gradients, checkpointed activations, frozen parts, LoRA."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import mowe
from mowe.families import stacked
from tests.mowe.audio_llm import language_model, processor_of, tiny_model, tiny_pool
from tests.mowe.encoders import assert_same, clip

LINEAR_LOSSES = {"independent_entropy": 0.3, "dependent_entropy": 0.5, "z_loss": 0.2}
"""Router losses that are means over the clips: those of a batch follow from those of its parts."""

EXAMPLES = [("<|audio|>?", clip(3_000 + 640 * i, i), word) for i, word in enumerate(("red", "sun", "sea", "oak"))]


class Recorder(Trainer):
    """Keeps the gradients of the last step."""

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        optimizer.register_step_pre_hook(lambda *_: self.keep())
        return optimizer

    def keep(self) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def train(model: Any, folder: Path, examples: list[Any] = EXAMPLES, **settings: Any) -> Recorder:
    processor = processor_of(model.get_base_model() if isinstance(model, peft.PeftModel) else model)
    resume = settings.pop("resume", None)
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "report_to": "none", "seed": 1,
            "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
            "max_grad_norm": 0.0, "use_cpu": True, **settings,
        },
    )  # fmt: skip
    trainer = Recorder(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=partial(collate, processor),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def collate(processor: mowe.MoweProcessor, batch: list[Any]) -> Any:
    prompts, clips, words = zip(*batch, strict=True)
    return processor(list(prompts), audio=list(clips), answers=list(words), padding_side="right")


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def example_inputs(model: Any) -> Any:
    return collate(processor_of(model), EXAMPLES)


def test_loss_is_the_next_token_loss_of_the_answers_and_the_router_loss() -> None:
    model = tiny_model()
    inputs = example_inputs(model)
    out = model(**inputs)
    labels = inputs["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten())
    assert_same(out.loss[None], (expected + out.aux_loss)[None])
    assert (inputs["labels"] != -100).sum() == 4 * 4
    quiet = tiny_model(router_losses={})(**inputs)
    assert quiet.aux_loss is None
    assert_same(quiet.loss[None], expected[None])


def test_every_parameter_learns() -> None:
    """Every encoder chosen, all receive a gradient; the positions and the keys' bias of Whisper are fixed."""
    model = tiny_model(num_dependent_slots=4)
    model(**example_inputs(model)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or "bias" in name, name
    assert {n.split(".")[-1] for n, p in model.named_parameters() if not p.requires_grad} == {
        "embed_positions", "masked_spec_embed",
    }  # fmt: skip


def test_trainer_learns_and_leaves_frozen_parts_alone(tmp_path: Path) -> None:
    model = tiny_model()
    model.audio_tower.requires_grad_(False)
    model.model.mixture.pool.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, tmp_path, max_steps=12, learning_rate=1e-2)
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    for name, value in model.state_dict().items():
        frozen = name.startswith(("model.audio_tower", "model.mixture.pool"))
        assert not frozen or torch.equal(value, before[name]), name
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    for part in ("router.independent_logits", "router.dependent", "multi_modal_projector", "language_model"):
        assert any(part in name for name in moved), part


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    whole = tiny_model()
    train(whole, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    resumed = tiny_model()
    train(resumed, tmp_path / "again", max_steps=2, resume=str(tmp_path / "checkpoint-1"))
    loaded = mowe.MoweForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    mowe.MoweProcessor.from_pretrained(tmp_path / "checkpoint-2")
    for model in (resumed, loaded):
        for name, value in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_trainer_evaluates_with_metrics(tmp_path: Path) -> None:
    """What the Trainer gathers for metrics are the logits and the labels, not the cache or the routers' choices."""
    model = tiny_model()
    seen: list[Any] = []
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", per_device_eval_batch_size=2, remove_unused_columns=False,
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    metrics = Trainer(
        model=model,
        args=arguments,
        eval_dataset=EXAMPLES,
        data_collator=partial(collate, processor_of(model)),
        compute_metrics=lambda prediction: seen.append(prediction) or {"seen": 1.0},
    ).evaluate()
    expected = model(**example_inputs(model))
    assert metrics["eval_seen"] == 1.0 and seen[0].predictions.shape == expected.logits.shape


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """4 x 1, 2 x 2 and 1 x 4 examples, through the Trainer's num_items_in_batch."""
    runs = {}
    for size in (4, 2, 1):
        model = tiny_model(router_losses=LINEAR_LOSSES)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs[size] = train(model, tmp_path / str(size), **settings)
    for size in (2, 1):
        assert runs[size].gradients.keys() == runs[4].gradients.keys()
        assert_same(torch.tensor(losses(runs[size])), torch.tensor(losses(runs[4])), 1e-4)
        for name, expected in runs[4].gradients.items():
            assert_same(runs[size].gradients[name], expected, 1e-4)


def test_router_loss_counts_by_the_share_of_the_answers_tokens() -> None:
    """Two batches of unequal answers accumulate to the token-weighted mean of their router losses."""
    model = tiny_model(router_losses=LINEAR_LOSSES)
    processor = processor_of(model)
    parts = [processor("<|audio|>?", audio=clip(4_000, i), answers="x" * n) for i, n in enumerate((2, 11))]
    tokens = [3, 12]
    outs = [model(**part, num_items_in_batch=torch.tensor(15)) for part in parts]
    for out, part, count in zip(outs, parts, tokens, strict=True):
        alone = model(**part)
        assert_same(out.loss[None], (alone.loss * count / 15)[None])


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointed_activations_give_the_same_gradients(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, checkpointed = tiny_model(), tiny_model()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
    runs: list[str] = []
    encoder_layer = stacked.encoder_layer
    monkeypatch.setattr(stacked, "encoder_layer", lambda *a, **k: runs.append("encoder") or encoder_layer(*a, **k))
    gradients, counts = [], []
    for model in (plain, checkpointed):
        model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append("language model"))
        runs.clear()
        model.train()
        model(**example_inputs(model)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        counts.append(Counter(runs))
    assert counts[0].keys() == {"encoder", "language model"}
    assert counts[1] == counts[0] + counts[0]  # once forward, once again for the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert_same(gradients[1][name], expected, 1e-6)


def lora_modules(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "bloom", "mixtral"])
def test_lora_config_touches_the_language_model_alone(kind: str) -> None:
    model = tiny_model(language_model(kind))
    head = model.get_output_embeddings()
    wanted = {
        f"base_model.model.model.language_model.{name}"
        for name, module in model.language_model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head  # Conv1D: GPT-2's own linear layer
    }
    adapted = peft.get_peft_model(model, model.lora_config(r=2))
    assert lora_modules(adapted) == wanted and len(wanted) >= 2 * 4
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_usual_targets_do_not_reach_tower_or_pool() -> None:
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert {name.split(".")[3] for name in lora_modules(adapted)} == {"language_model"}


def test_lora_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, model.lora_config(r=4, lora_dropout=0.0))
    trainer = train(adapted, tmp_path / "run", max_steps=6, learning_rate=2e-2)
    assert losses(trainer)[-1] < losses(trainer)[0]
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    adapted.eval()
    inputs = example_inputs(model)
    with torch.no_grad():
        expected = adapted(**inputs).logits
        loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        merged = loaded.merge_and_unload()
        assert_same(merged(**inputs).logits, expected, 1e-4)
    assert isinstance(merged, mowe.MoweForConditionalGeneration)
    for name, value in merged.state_dict().items():
        assert "language_model" in name or torch.equal(value, before[name]), name
    prompt = processor_of(merged)("<|audio|>?", audio=EXAMPLES[0][1])
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(adapted.generate(**prompt, **settings), merged.generate(**prompt, **settings))


def test_lora_with_checkpointed_activations(tmp_path: Path) -> None:
    model = tiny_model()
    adapted = peft.get_peft_model(model, model.lora_config(r=2))
    trainer = train(adapted, tmp_path, gradient_checkpointing=True)
    assert trainer.gradients and all("lora_" in name for name in trainer.gradients)


def test_noise_of_the_routers_is_for_training_alone() -> None:
    model = tiny_model(router_noise=2.0)
    inputs = example_inputs(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_pool_of_the_user_is_taken_over() -> None:
    pool = tiny_pool("valid")
    assert tiny_model(pool=pool).model.mixture.pool is pool
