"""What a run takes and leaves: models built from parts, several manifests, logs of the routers, pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from accelerate import PartialState
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from mowe import EncoderPool, MoweForConditionalGeneration, MoweProcessor
from mowe.data import read_manifest
from mowe.errors import AudioError, CheckpointError, ConfigError, DataError
from mowe.families.stacked import StackedNorm
from mowe.losses import RouterLogits, router_loss_terms
from mowe.training import TrainConfig, train
from mowe.training.data import Collator
from mowe.training.log import read_lines
from mowe.training.picture import training_picture
from mowe.training.routing import RoutingMeter
from mowe.training.run import connect
from mowe.training.trainer import MoweTrainer
from tests.mowe.audio_llm import language_model, processor_of, tiny_model
from tests.mowe.encoders import clip, hubert, whisper
from tests.mowe.tokenizer import byte_tokenizer


def test_norms_do_not_decay() -> None:
    pool = EncoderPool.from_encoders([whisper(0), hubert(0, feat_extract_norm="layer")])
    norms = {name for name, module in pool.named_modules() if isinstance(module, StackedNorm)}
    decay = MoweTrainer.get_decay_parameter_names(object.__new__(MoweTrainer), pool)
    assert any("conv_norms" in name for name in norms)
    assert norms.isdisjoint(name.rpartition(".")[0] for name in decay)
    assert {"families.0.layers.0.qkv.weight", "families.1.convs.0.weight"} <= {*decay}


class OneProcess:
    """What the meter needs of accelerate."""

    def reduce(self, sums: torch.Tensor, how: str) -> torch.Tensor:
        return sums


def test_meter_sums_up_entropies_terms_and_choices_by_task() -> None:
    model = tiny_model(router_losses={"diversity": 0.1, "z_loss": 0.1}).train()
    meter = RoutingMeter(model, ["asr", "voice"])
    batches = [[clip(4_000 + 900 * i + 100 * b, i + 7 * b) for i in range(n)] for b, n in enumerate((3, 1))]
    tasks = [torch.tensor([0, 1, 0]), torch.tensor([1])]
    outs, names = [], ("dependent_entropy", "independent_entropy", "diversity", "z_loss")
    for waves, task in zip(batches, tasks, strict=True):
        meter.task_ids = task
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(w) for w in waves])[:, None]
        outs.append(model.get_audio_features(padded, mask).mixture)
    meter.task_ids = None
    model.get_audio_features(clip(4_000)[None])  # does not count
    logs = meter.read(OneProcess())
    for name in names:
        parts = [
            router_loss_terms(RouterLogits(o.router_logits, o.independent_logits), {name: 1.0})[name] for o in outs
        ]
        assert logs[f"router/{name}"] == pytest.approx((3 * parts[0] + parts[1]).item() / 4, rel=1e-5)
    expected = torch.zeros(2, 2, 4)
    for out, task in zip(outs, tasks, strict=True):
        for window, place in enumerate(task):
            for kind, encoder in enumerate(out.indices[window].tolist()):
                expected[place, kind, encoder] += 1
    assert meter.counts == expected.tolist()
    shares = [logs[f"router/dependent_usage/{e}"] for e in range(4)]
    assert shares == pytest.approx((expected[:, 1].sum(0) / 4).tolist()) and sum(shares) == pytest.approx(1)
    assert logs["router/independent_usage/0"] == 1.0
    assert not any(map(any, (counts for of_task in (meter.read(OneProcess()), meter.counts)[1] for counts in of_task)))


def test_collator_makes_what_the_processor_makes_and_tells_the_tasks(tones: Path) -> None:
    examples = read_manifest(tones / "train.jsonl")[:3]
    processor = processor_of(tiny_model())
    inputs = Collator(processor, ["any", "high", "low"])(examples)
    assert inputs["task_ids"].tolist() == [2, 0, 1]
    expected = processor(
        [f"Given the following speech tokens: \n<speech><|audio|></speech>\n\n{e.prompt}" for e in examples],
        audio=[e.waveform() for e in examples],
        answers=[e.answer for e in examples],
        padding_side="right",
    )
    assert inputs.keys() - {"task_ids"} == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_a_model_built_from_parts(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The language model is stored in bfloat16; what is trained is in float32 all the same."""
    weak, lm = [whisper(1), hubert(2)], language_model().bfloat16()
    whisper(0).save_pretrained(tmp_path / "base")
    for i, encoder in enumerate(weak):
        encoder.save_pretrained(tmp_path / f"weak{i}")
    lm.save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    parts = {
        "audio_tower": str(tmp_path / "base"),
        "pool": [str(tmp_path / "weak0"), str(tmp_path / "weak1")],
        "language_model": str(tmp_path / "lm"),
        "settings": {"context": "valid", "projector_hidden_size": 24},
    }
    done = train(settings(model=parts, trainable={"language_model": "full"}))
    model = MoweForConditionalGeneration.from_pretrained(done.model)
    assert model.config.projector_hidden_size == 24 and model.config.audio_token_id == 259
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    moved = model.language_model.lm_head.weight - lm.lm_head.weight.float()
    assert 0 < moved.abs().max() < 0.03  # after two steps of 0.01
    pool = EncoderPool.from_encoders(weak, context="valid")
    for name, value in model.model.mixture.pool.state_dict().items():
        assert torch.equal(value, pool.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="no such folder"):
        train(settings(model={**parts, "audio_tower": str(tmp_path / "none")}, output=str(tmp_path / "other")))
    for part in ("language_model", "tokenizer"):
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/none: cannot read the tokenizer: "):
            train(settings(model={**parts, part: str(tmp_path / "none")}, output=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="MoweConfig: unknown keys"):
        train(settings(model={**parts, "settings": {"slots": 2}}, output=str(tmp_path / "other")))


def test_weights_of_manifests_and_tasks_and_what_is_logged(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path
) -> None:
    """Two manifests with weights 1 and 2, the task `any` left out: 6 + 2 * 2 clips an epoch, in batches of up to 5."""
    data = {
        "train": [
            {"manifest": str(tones / f"{name}.jsonl"), "weight": w} for name, w in (("train", 1.0), ("valid", 2.0))
        ],
        "validation": [str(tones / "valid.jsonl")],
        "task_weights": {"any": 0.0},
        "batch_clips": 5,
    }
    done = train(settings(data=data, stages=[{"epochs": 3, "learning_rate": 1e-3}], tensorboard=True))
    assert done.stages[0]["step"] == 6 and done.stages[0]["epoch"] == 3.0
    entries = read_lines(tmp_path / "run" / "log.jsonl")
    logged = [entry for entry in entries if "loss" in entry]
    assert [entry["epoch"] for entry in logged] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert {"router/dependent_entropy", "router/independent_entropy", "router/diversity"} <= logged[0].keys()
    assert {name for entry in entries for name in entry if name.endswith("_loss") and "eval" in name} == {
        "eval_any_loss", "eval_low_loss", "eval_high_loss",
    }  # fmt: skip
    windows = [entry["windows"] for entry in read_lines(tmp_path / "run" / "routing.jsonl")]
    heard = {task: sum(sum(entry[task].get("dependent", [0])) for entry in windows) for task in windows[0]}
    assert heard == {"any": 0, "high": 3 * (2 + 2), "low": 3 * (2 + 2), "mid": 3 * 2}
    assert list((tmp_path / "run" / "stage-0" / "runs").rglob("events.out.tfevents.*"))
    assert imread(tmp_path / "run" / "routing.png").std() > 0.1


def test_a_stage_shorter_than_an_entry_of_the_log_has_one(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config, run = settings(stages=[{"steps": 2}, {"steps": 5}], log_every=3), tmp_path / "run"
    done = train(config)
    for name in ("log.jsonl", "routing.jsonl"):
        steps = [(e["stage"], e["step"]) for e in read_lines(run / name) if "loss" in e or "windows" in e]
        assert steps == [(0, 2), (1, 3), (1, 5)], name
    assert all("loss" in stage for stage in done.stages)
    for name in ("routing.jsonl", "routing.png"):
        (run / name).unlink()
    train(config, resume=True)  # of a run that has no entry there is no picture
    assert not (run / "routing.png").exists()


def test_validation_loss_is_the_mean_over_tokens_however_batches_are_cut(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path
) -> None:
    """Answers of 2 to 9 tokens, the last one ends them; what the loss should be is counted from the saved model."""
    answers = ["x", "yesterday", "abc", "abcdefgh", "y"]
    lines = [
        {"audio": str(tones / f"train{i}.wav"), "task": "any", "prompt": "?", "answer": answer}
        for i, answer in enumerate(answers)
    ]
    manifest = tmp_path / "uneven.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = [{"steps": 1, "learning_rate": 1e-12}]
    got = []
    for clips in (1, 2, 5):
        data = {"validation": [str(manifest)], "batch_clips": clips}
        done = train(settings(data=data, stages=stages, output=str(tmp_path / str(clips))))
        got.append(done.stages[0]["eval_any_loss"])
    model = MoweForConditionalGeneration.from_pretrained(tones / "model").eval()
    total, tokens = 0.0, 0
    for example in read_manifest(manifest):
        inputs = Collator(processor_of(model), ["any"])([example])
        wanted = inputs["labels"][0, 1:]
        with torch.no_grad():
            logits = model(**{name: inputs[name] for name in inputs.keys() - {"task_ids", "labels"}}).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        tokens += int((wanted != -100).sum())
    assert tokens == sum(len(answer) + 1 for answer in answers)
    assert got == pytest.approx([total / tokens] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": {"tasks": ["low"]}}, DataError, "unknown task 'any'; known: low"),
        ({"data": {"task_weights": {"lwo": 1.0}}}, ConfigError, "data.task_weights: no example is of the task lwo"),
        ({"data": {"batch_frames": 5}}, ConfigError, r"data.batch_frames is 5 but \S+\.wav has \d+ frames"),
        ({"trainable": {"pool": [True]}}, ConfigError, "trainable.pool: 1 entries, but the pool has 4 encoders"),
        (
            {"model": "runs/strat"},
            CheckpointError,
            "^model: runs/strat: no such folder, expected that of a saved model$",
        ),
        ({"fsdp": True}, ConfigError, "fsdp: needs several processes"),
        ({"trainer": {"adam_beta1": 2}}, ConfigError, r"^trainer: Invalid beta parameter at index 0: 2\.0$"),
        (
            {"trainer": {"optim_args": "a=1"}},
            ConfigError,
            "trainer.optim_args: a is no setting of .*_fused; it has none$",
        ),
        (
            {"trainer": {"optim": "sgd", "optim_args": "momentun=0.9"}},
            ConfigError,
            "trainer.optim_args: momentun is no setting of optim sgd; known: momentum, dampening",
        ),
        (
            {"trainer": {"optim": "sgd", "optim_args": "momentum=fast"}},
            ConfigError,
            "^trainer.optim_args: momentum: could not convert string to float: 'fast'$",
        ),
        ({"trainer": {"optim": "galore_adamw"}}, ConfigError, "trainer: You need to install `galore_torch`"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    settings: Callable[..., TrainConfig], tmp_path: Path, fields: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(settings(**fields))
    assert not (tmp_path / "run").exists()


def test_processes_wait_for_each_other_as_long_as_they_are_told(
    settings: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("mowe.training.run.PartialState", lambda **kwargs: given.update(kwargs) or PartialState())
    connect(settings(trainer={"ddp_timeout": 7200}))
    assert given["timeout"].total_seconds() == 7200


def test_settings_of_an_optimiser_reach_it(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    train(settings(trainer={"optim": "sgd", "optim_args": "momentum=0.75, nesterov=true"}))
    (group, *_) = torch.load(tmp_path / "run" / "stage-0" / "checkpoint-2" / "optimizer.pt")["param_groups"]
    assert group["momentum"] == 0.75 and group["nesterov"]


def test_a_compiler_that_is_not_installed_ends_a_run_with_one_line(settings: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.torch_compile: the model cannot be compiled: .*tvm.*") as error:
        train(settings(trainer={"torch_compile_backend": "tvm"}))
    assert "\n" not in str(error.value)


def test_a_prompt_with_the_token_of_the_audio_is_told_by_line(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "token.jsonl"
    line = {"audio": str(tones / "valid0.wav"), "task": "any", "prompt": "?", "answer": "x"}
    manifest.write_text("".join(json.dumps({**line, "prompt": prompt}) + "\n" for prompt in ("?", "hi <|audio|>")))
    with pytest.raises(DataError, match=rf"^{manifest}: line 2: the audio is put before the prompt, leave <\|audio"):
        train(settings(data={"validation": [str(manifest)]}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no audio\\nhere') }}", "cannot read the chat template: no audio here"),
        ("{{ messages[0].content", "cannot read the chat template: unexpected end of template"),
        ("Hello", r"its chat template does not write <\|audio\|> once, it says 'Hello'"),
    ],
)
def test_a_chat_template_that_does_not_serve_is_told_before_anything_is_written(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path, template: str, told: str
) -> None:
    shutil.copytree(tones / "model", tmp_path / "model")
    processor = MoweProcessor.from_pretrained(tmp_path / "model")
    processor.tokenizer.chat_template = template
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"^model: {told}"):
        train(settings(model=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_answer_with_the_token_of_the_audio_is_told_by_clip(
    settings: Callable[..., TrainConfig], tones: Path, tmp_path: Path, workers: int
) -> None:
    manifest, clip = tmp_path / "token.jsonl", tones / "valid0.wav"
    manifest.write_text(json.dumps({"audio": str(clip), "task": "any", "prompt": "?", "answer": "hi <|audio|>"}))
    with pytest.raises(DataError, match=rf"^{manifest}: the answer about {clip} has <\|audio\|>, leave it out$"):
        train(settings(data={"validation": [str(manifest)], "workers": workers}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", [".", "run"])
def test_an_output_that_cannot_be_a_folder_is_told_first(
    settings: Callable[..., TrainConfig], tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / below
    with pytest.raises(ConfigError, match=f"^output {output}: not a folder, nor can it become one$"):
        train(settings(model="no/such/model/at all", output=str(output)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_damaged_in_its_middle_ends_a_run_with_one_line(
    settings: Callable[..., TrainConfig], tmp_path: Path, workers: int
) -> None:
    samples = np.zeros(8_000, np.float32)
    samples[4_000] = np.nan
    soundfile.write(tmp_path / "clip.wav", samples, 16_000, subtype="FLOAT")
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text('{"audio": "clip.wav", "task": "any", "prompt": "?", "answer": "x"}\n')
    config = settings(data={"train": [{"manifest": str(manifest)}], "workers": workers})
    with pytest.raises(AudioError, match=f"^{tmp_path}/clip.wav: holds NaN or infinite samples$"):
        train(config)


def test_a_step_that_does_not_fit_the_gpu_ends_a_run_with_one_line(settings: Callable[..., TrainConfig]) -> None:
    class FullGpu(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    told = "stage-0, step 2: needs more memory than the GPU has; lower data.batch_frames, which is 8000"
    with pytest.raises(ConfigError, match=f"^{told}$"):
        train(settings(), callbacks=[FullGpu()])


def test_a_stage_that_a_callback_ends_is_saved_as_it_is(settings: Callable[..., TrainConfig], tmp_path: Path) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 2

    done = train(settings(stages=[{"steps": 5}, {"steps": 4}], log_every=5), callbacks=[Enough()])
    assert [stage["step"] for stage in done.stages] == [2, 2] and all("loss" in stage for stage in done.stages)
    last = load_file(tmp_path / "run" / "stage-1" / "checkpoint-2" / "model.safetensors")
    after = load_file(done.model / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in last.items())


def test_a_single_step_learns(settings: Callable[..., TrainConfig], tones: Path) -> None:
    done = train(settings(stages=[{"steps": 1}]))
    before, after = (load_file(path / "model.safetensors") for path in (tones / "model", done.model))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_one_process_trains_on_one_of_several_gpus(
    settings: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_gpus(arguments: TrainingArguments) -> torch.device:
        arguments._n_gpu, arguments.distributed_state = 2, PartialState()
        return torch.device("cpu")

    expected = train(settings(stages=[{"steps": 1}])).stages[0]["loss"]
    devices = cached_property(two_gpus)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    assert train(settings(stages=[{"steps": 1}], output=str(tmp_path / "other"))).stages[0]["loss"] == expected


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"steps": 12, "learning_rate": 1e9}, "stage-0, step 12: loss is nan"),
        ({"steps": 1, "learning_rate": 1e39, "warmup": 0}, r"stage-0, step 1: model\..* holds NaN or infinite values"),
    ],
    ids=["the loss tells", "only the last update tells"],
)
def test_a_run_that_diverges_ends_with_one_line_and_saves_nothing(
    settings: Callable[..., TrainConfig], tmp_path: Path, stage: dict, told: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{told}, training diverged; lower learning_rate$"):
        train(settings(stages=[stage], log_every=12))
    assert not (tmp_path / "run" / "model").exists() and list((tmp_path / "run" / "stage-0").iterdir()) == []
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_picture_of_routing(tmp_path: Path) -> None:
    """The colours of a panel follow the shares: all to encoder 0 first, all to encoder 1 in the end."""
    entries = [
        {"stage": step > 5, "step": step if step < 6 else step - 5, "windows": {
            "asr": {"independent": [4.0, 0.0], "dependent": [float(10 - step), float(step)]}, "voice": {},
        }}
        for step in range(1, 11)
    ]  # fmt: skip
    training_picture(tmp_path / "a.png", entries, ["whisper 0", "hubert 1"], "Title")
    picture = imread(tmp_path / "a.png")[..., :3]
    green, red = (np.abs(picture - np.array(c) / 255).sum(-1) < 0.02 for c in ((42, 157, 143), (231, 111, 81)))
    assert green.mean() > 0.05 and red.mean() > 0.02
    with pytest.raises(ConfigError, match="its folder does not exist"):
        training_picture(tmp_path / "none" / "a.png", entries, ["a", "b"], "Title")
