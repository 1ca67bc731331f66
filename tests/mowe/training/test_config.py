"""What is wrong with a configuration is told in one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from mowe.errors import ConfigError
from mowe.training import read_config
from mowe.training.config import PartsConfig, StageConfig, TrainableConfig

MINIMAL = """
model: some/model
output: runs/x
data:
  train:
    - manifest: train.jsonl
stages:
  - {steps: 10, learning_rate: 1e-3}
  - {epochs: 1.5, trainable: {pool: [true, false]}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def fails(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{file}: ")


def test_defaults_and_types(file: Path) -> None:
    config = read_config(file)
    assert config.stages[0] == StageConfig(steps=10, learning_rate=1e-3)
    assert config.stages[1].epochs == 1.5 and config.data.train[0].weight == 1.0
    assert config.trainable == TrainableConfig() and config.stages[0].trainable is None
    assert config.stages[1].trainable == TrainableConfig(pool=[True, False])


def test_every_field_can_be_overridden(file: Path) -> None:
    config = read_config(
        file,
        [
            "data.batch_frames=400",
            "data.train.0.weight=2",
            "stages.0.learning_rate=3e-4",
            "stages.1.trainable.pool=true",
            "trainable.language_model=lora",
            "data.task_weights.asr=0.5",
            "spec_augment.mel_stripes=1",
            "trainer.optim=adafactor",
            "model={audio_tower: a, pool: [b, c], language_model: d}",
            "data.validation=[a.jsonl, b.jsonl]",
        ],
    )
    assert config.data.batch_frames == 400 and config.data.train[0].weight == 2.0
    assert config.stages[0].learning_rate == 3e-4 and config.stages[1].trainable == TrainableConfig(pool=True)
    assert config.trainable.language_model == "lora" and config.data.task_weights == {"asr": 0.5}
    assert config.spec_augment is not None and config.spec_augment.mel_stripes == 1
    assert config.trainer == {"optim": "adafactor"} and config.data.validation == ["a.jsonl", "b.jsonl"]
    assert config.model == PartsConfig("a", ["b", "c"], "d")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_framse=1", "data.batch_framse: unknown field; did you mean batch_frames?"),
        ("stages.0.learning_rate=fast", "stages.0.learning_rate: expected a number, got 'fast'"),
        ("stages.0.steps=1.5", "stages.0.steps: expected a whole number, got 1.5"),
        ("stages.0.steps=-2", "stages.0.steps: must be positive, got -2"),
        ("stages.0.epochs=1", "stages.0.steps: expected either this or epochs"),
        ("stages.0.schedule=cosin", "stages.0.schedule: must be 'linear' or 'cosine' or 'constant', got 'cosin'; did"),
        ("stages.².steps=1", "'stages.².steps=1': no entry ² in a list of 2"),
        ("stages.2.steps=1", "'stages.2.steps=1': no entry 2 in a list of 2"),
        ("stages.0.steps.x=1", "'stages.0.steps.x=1': there is nothing inside of 10"),
        ("stages=[]", "stages: expected at least one, got none"),
        ("data.batch_frames=true", "data.batch_frames: expected a whole number, got True"),
        ("data.batch_frames=0", "data.batch_frames: must be positive, got 0"),
        ("data.train=a.jsonl", "data.train: expected a list, got 'a.jsonl'"),
        ("data.train.0.weight=nan", "data.train.0.weight: must be positive, got nan"),
        ("data.task_weights.asr=-1", "data.task_weights.asr: must not be negative, got -1.0"),
        ("data.task_weights.asr=.inf", "data.task_weights.asr: must not be negative, got inf"),
        ("data.train.0.manifest=" + 300 * "x", "data.train.0.manifest: 'xxx"),
        ('data.validation=["a\\0b"]', r"data.validation.0: 'a\x00b' cannot be a path (embedded null byte)"),
        ("output=''", "output: expected a path, got an empty text"),
        ("model=''", "model: expected a path, got an empty text"),
        ("seed=4294967296", "seed: must be below 2**32, got 4294967296"),
        ("data=", "data: expected fields and values, got None"),
        ("model=", "model: expected a text or fields and values, got None"),
        ("model={audio_tower: a}", "model.pool: missing"),
        ("model={audio_tower: a, pool: [''], language_model: b}", "model.pool.0: expected a path, got an empty text"),
        (
            "model={audio_tower: a, pool: [b], language_model: c, settings: {audio_token_id: 5}}",
            "model.settings.audio_token_id: is set by tokenizer",
        ),
        ("trainable.pool=[1]", "trainable.pool.0: expected true or false, got 1"),
        ("trainable={routers: false, projector: false}", "trainable.projector: nothing is trainable"),
        ("lora.dropout=1", "lora.dropout: must lie in 0..1, 1 excluded, got 1.0"),
        ("trainer.learning_rate=1", "trainer.learning_rate: is set by stages"),
        ("trainer.use_cpu=true", "trainer.use_cpu: is set by training here"),
        ("trainer.save_only_model=true", "trainer.save_only_model: is set by training here"),
        ("trainer.label_smoothing_factor=0.1", "trainer.label_smoothing_factor: is set by training here"),
        ("trainer.metric_for_best_model=loss", "trainer.metric_for_best_model: is set by keep"),
        ("trainer.dataloader_drop_last=true", "trainer.dataloader_drop_last: has no effect here, batches are filled"),
        ("trainer.auto_find_batch_size=true", "trainer.auto_find_batch_size: has no effect here, a batch has as much"),
        ("trainer.data_seed=1", "trainer.data_seed: has no effect here, the order of the clips is that of seed"),
        ("trainer.ddp_backend=nccl", "trainer.ddp_backend: has no effect here, whoever starts the processes"),
        ("trainer.ddp_timeout=0", "trainer.ddp_timeout: expected seconds, positive and below 2**31, got 0"),
        ("trainer.ddp_timeout=1e12", "trainer.ddp_timeout: expected seconds, positive and below 2**31, got 10000000"),
        (
            "trainer.enable_jit_checkpoint=true",
            "trainer.enable_jit_checkpoint: has no effect here, SIGTERM always ends",
        ),
        ("trainer.hub_model_id=x", "trainer.hub_model_id: has no effect here, nothing is pushed to a hub"),
        ("trainer.eval_on_start=true", "trainer.eval_on_start: needs manifests under data.validation, there are none"),
        ("trainer.debug=underflow_overflow", "trainer.debug: is set by training here"),
        ("trainer.adam_beta1=x", "trainer.adam_beta1: expected a number, got 'x'"),
        ("trainer.logging_first_step=maybe", "trainer.logging_first_step: expected true or false, got 'maybe'"),
        ("trainer.logging_strategy=no", "trainer.logging_strategy: expected a text, got False"),
        ("trainer.lr_scheduler_kwargs.foo=1", "trainer.lr_scheduler_kwargs.foo: unknown field; known: num_cycles"),
        ("trainer.lr_scheduler_kwargs.num_cycles=x", "trainer.lr_scheduler_kwargs.num_cycles: expected a number, got"),
        (
            "trainer.lr_scheduler_kwargs.num_cycles=.nan",
            "trainer.lr_scheduler_kwargs.num_cycles: must lie in 0..1000000",
        ),
        (
            "trainer.lr_scheduler_kwargs.num_cycles=1e308",
            "trainer.lr_scheduler_kwargs.num_cycles: must lie in 0..10000",
        ),
        ("trainer.log_level=loud", "trainer.log_level: must be 'detail' or 'debug' or 'info' or"),
        ("trainer.lr_scheduler_kwargs=1", "trainer.lr_scheduler_kwargs: expected fields and values, got 1"),
        ('trainer.lr_scheduler_kwargs=""', "trainer.lr_scheduler_kwargs: expected fields and values, got ''"),
        (
            "trainer.gradient_checkpointing_kwargs=x",
            "trainer.gradient_checkpointing_kwargs: expected fields and values",
        ),
        (
            "trainer.gradient_checkpointing_kwargs.reentrant=true",
            "trainer.gradient_checkpointing_kwargs.reentrant: unknown field; did you mean use_reentrant?",
        ),
        (
            "trainer.gradient_checkpointing_kwargs.use_reentrant=maybe",
            "trainer.gradient_checkpointing_kwargs.use_reentrant: expected true or false, got 'maybe'",
        ),
        (
            "trainer.gradient_checkpointing_kwargs.every_n_layers=0",
            "trainer.gradient_checkpointing_kwargs.every_n_layers: must be positive, got 0",
        ),
        (
            "trainer.gradient_checkpointing_kwargs={debug: true, use_reentrant: true}",
            "trainer.gradient_checkpointing_kwargs.debug: goes without use_reentrant only",
        ),
        ("trainer.torch_compile_backend=inducter", "trainer.torch_compile_backend: must be "),
        ("trainer.torch_compile_backend=nonesuch", "trainer.torch_compile_backend: must be "),
        ("trainer.torch_compile_mode=fast", "trainer.torch_compile_mode: must be 'default' or "),
        (
            "trainer={torch_compile_backend: eager, torch_compile_mode: default}",
            "trainer.torch_compile_mode: the backend eager has none, only inductor has",
        ),
        ("trainer.optim=adamx", "trainer.optim: must be 'adamw_torch' or"),
        ("trainer.optim_args=fast", "trainer.optim_args: expected NAME=VALUE,NAME=VALUE, got 'fast'"),
        ('trainer.optim_args="a=1,"', "trainer.optim_args: expected NAME=VALUE,NAME=VALUE, got 'a=1,'"),
        ('trainer.optim_args="a=1, a=2"', "trainer.optim_args: a is there twice"),
        ("trainer.neftune_noise_alpha=-1", "trainer.neftune_noise_alpha: must be positive, got -1.0"),
        ("trainer.include_num_input_tokens_seen=some", "trainer.include_num_input_tokens_seen: must be True or False"),
        ("trainer.optin=adafactor", "trainer.optin: no field of TrainingArguments; did you mean optim?"),
        ("bf16=yes please", "bf16: expected true or false, got 'yes please'"),
        ("lonely", "'lonely': expected FIELD=VALUE, as data.batch_frames=4000"),
    ],
)
def test_bad_fields(file: Path, override: str, message: str) -> None:
    assert fails(file, override).startswith(message)


def test_fields_of_the_trainer_have_its_types(file: Path) -> None:
    """YAML takes 1e-8 for a text."""
    overrides = ["adam_epsilon=1e-8", "neftune_noise_alpha=5", "gradient_checkpointing_kwargs={use_reentrant: false}"]
    config = read_config(file, [f"trainer.{override}" for override in overrides])
    assert config.trainer["adam_epsilon"] == 1e-8 and config.trainer["neftune_noise_alpha"] == 5.0
    assert config.trainer["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    config = read_config(file, ["trainer.gradient_checkpointing_kwargs.early_stop=false"])
    assert config.trainer["gradient_checkpointing_kwargs"] == {"use_reentrant": False, "early_stop": False}


def test_a_field_comes_once(file: Path) -> None:
    file.write_text(f"{MINIMAL}data: {{train: [{{manifest: other.jsonl}}]}}\n")
    assert fails(file) == "not YAML: line 10: data is there twice"


def test_an_override_that_is_no_date_is_a_text(file: Path) -> None:
    assert read_config(file, ["output=2024-13-01"]).output == "2024-13-01"


def test_cycles_are_those_of_cosine(file: Path) -> None:
    cycles = "trainer.lr_scheduler_kwargs.num_cycles=15e-1"
    assert read_config(file, [cycles]).trainer == {"lr_scheduler_kwargs": {"num_cycles": 1.5}}
    told = "trainer.lr_scheduler_kwargs: the schedule linear of a stage has none, only cosine has"
    assert fails(file, cycles, "stages.1.schedule=linear") == told


def test_fsdp_does_not_split_the_pool(file: Path) -> None:
    assert fails(file, "fsdp=true").startswith("fsdp: the encoders of the pool are sharded together")
    assert read_config(file, ["fsdp=true", "stages.1.trainable.pool=true"]).fsdp


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    assert fails(tmp_path / "none.yaml").startswith("cannot be read (No such file or directory)")
    file.write_text("a: [")
    assert fails(file).startswith("not YAML: ")
    file.write_text("output: 2024-13-01")
    assert fails(file) == "not YAML: month must be in 1..12"
    file.write_text("a: " + 5000 * "[")
    assert fails(file).startswith("not YAML: maximum recursion depth exceeded")
    file.write_text("just words")
    assert fails(file) == "expected fields and values, got str"
    file.write_text("model: a")
    assert fails(file) == "output: missing"
