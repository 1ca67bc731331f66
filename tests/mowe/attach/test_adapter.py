"""Adapter folders, whole models with a mixture, and what is told of folders that do not fit."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

import mowe
from mowe.attach import adapter
from tests.mowe.attach.models import inputs, tiny, tiny_pool
from tests.mowe.attach.tools import LONG, SHORT, attached, awaken, logits, same_state, state

FILES = {"mowe_config.json", "mowe_model.safetensors"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return attached("qwen2_audio", num_dependent_slots=2, router_temperature=2.0, router_losses={"z_loss": 0.1})


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "not" / "there" / "yet"
    model.save_adapter(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_holds_pool_routers_fusion_and_configuration(model: PreTrainedModel, saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    tensors = load_file(saved / "mowe_model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"pool", "router", "fusion"}
    assert same_state(tensors, state(model.mowe))
    other = mowe.attach_from(tiny("qwen2_audio"), saved)
    assert other.mowe.config.to_dict() == model.mowe.config.to_dict()
    assert other.mowe.config.router_temperature == 2.0 and not other.mowe.training


def test_takes_the_dtype_of_the_model(saved: Path) -> None:
    other = mowe.attach_from(tiny("qwen2_audio").to(torch.bfloat16), saved)
    assert {parameter.dtype for parameter in other.mowe.parameters()} == {torch.bfloat16}


def test_an_interrupted_save_leaves_what_was_there(
    model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def breaks_off(tensors: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(adapter, "save_file", breaks_off)
    with pytest.raises(mowe.ConfigError, match="the adapter cannot be written"):
        mowe.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_whoever_may_read_other_files_may_read_an_adapter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_what_no_folder_could_give_back(tmp_path: Path) -> None:
    model = mowe.attach(tiny("qwen2_audio"), mowe.quantize(tiny_pool()))
    for save in (model.save_pretrained, model.save_adapter):
        with pytest.raises(mowe.ConfigError, match="pool is in 4 bits; save it in full precision"):
            save(tmp_path / "there")
    assert not (tmp_path / "there").exists()
    (tmp_path / "file").touch()
    with pytest.raises(mowe.ConfigError, match=r"adapter's folder .*file: the folder cannot be made"):
        mowe.save_adapter(mowe.attach(tiny("qwen2_audio"), tiny_pool()), tmp_path / "file")


def _json(folder: Path, **changes: Any) -> None:
    path = folder / "mowe_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder: Path, change: Any) -> None:
    path = folder / "mowe_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "there is no mowe_config.json": lambda f: (f / "mowe_config.json").unlink(),
    "cannot read mowe_config.json": lambda f: (f / "mowe_config.json").write_text("{"),
    "mowe_config.json is not the configuration of an adapter": lambda f: _json(f, model_type="mowe"),
    "unknown keys \\['colour'\\]": lambda f: _json(f, colour="red"),
    "there is neither a mowe_model.safetensors nor a model.safetensors": lambda f: (
        f / "mowe_model.safetensors"
    ).unlink(),
    "cannot read mowe_model.safetensors": lambda f: (f / "mowe_model.safetensors").write_bytes(b"x" * 40),
    "missing keys of the mixture: fusion.slot_weights.0": lambda f: _tensors(
        f, lambda tensors: tensors.pop("fusion.slot_weights.0")
    ),
    "surplus keys of the mixture: more": lambda f: _tensors(f, lambda t: t.update(more=torch.zeros(1))),
    "misshapen keys of the mixture: router.dependent.weight": lambda f: _tensors(
        f, lambda t: t.update({"router.dependent.weight": torch.zeros(1)})
    ),
    "made for a model of type 'voxtral', this model has 'qwen2_audio'": lambda f: _json(f, base_model_type="voxtral"),
    "made for audio features of width 99, this model has 16": lambda f: _json(f, base_width=99),
    "made for a fusion of width 99, this model has 64": lambda f: _json(f, fusion_width=99),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_folders_that_do_not_fit(message: str, folder: Path) -> None:
    DAMAGE[message](folder)
    base = tiny("qwen2_audio")
    own_class = type(base)
    with pytest.raises(mowe.MoweError, match=message) as raised:
        mowe.attach_from(base, folder)
    assert str(raised.value).startswith(str(folder)) and "\n" not in str(raised.value)
    assert type(base) is own_class and not hasattr(base, "mowe")


def test_bases_that_do_not_fit(model: PreTrainedModel, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(mowe.CheckpointError, match="made for a model of type 'qwen2_audio', this model has 'voxtral'"):
        mowe.attach_from(tiny("voxtral"), saved)
    with pytest.raises(mowe.CheckpointError, match="made with fusion 'concat', which this model does not allow"):
        mowe.attach_from(tiny("gemma3n"), saved)
    with pytest.raises(mowe.ConfigError, match="has a mixture already"):
        mowe.attach_from(model, saved)
    with pytest.raises(mowe.CheckpointError, match="nothing: no folder of an adapter"):
        mowe.load_attached(tmp_path / "nothing")


def test_a_whole_model_in_several_files(model: PreTrainedModel, tmp_path: Path) -> None:
    batch = inputs("qwen2_audio", [[SHORT], [LONG]])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for other in (mowe.load_attached(tmp_path), mowe.attach_from(tiny("qwen2_audio"), tmp_path)):
        assert same_state(other.state_dict(), model.state_dict())
        assert torch.equal(logits(other.requires_grad_(False), batch), logits(model, batch))


def test_a_whole_model_where_an_adapter_was(model: PreTrainedModel, folder: Path) -> None:
    """The mixture of the model, and not that of the adapter which was saved there before."""
    _tensors(folder, lambda tensors: tensors["router.dependent.weight"].zero_())
    model.save_pretrained(folder)
    for other in (mowe.load_attached(folder), mowe.attach_from(tiny("qwen2_audio"), folder)):
        assert same_state(state(other.mowe), state(model.mowe))


def test_beside_adapters_of_peft(tmp_path: Path) -> None:
    """Where transformers saves those alone, the mixture is not lost."""
    model = attached("qwen2_audio")
    model.add_adapter(model.lora_config(r=2, init_lora_weights=False))
    batch = inputs("qwen2_audio", [[SHORT], [LONG]])
    model.save_pretrained(tmp_path)
    other = tiny("qwen2_audio")
    other.load_adapter(tmp_path)
    mowe.attach_from(other, tmp_path)
    assert torch.equal(logits(other, batch), logits(model, batch))


def test_a_whole_model_loads_as_its_own_class_without_the_mixture(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    own_class = type(tiny("qwen2_audio"))
    alone, info = own_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(alone) is own_class and not info["missing_keys"]
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"mowe"}


def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    """Two runs of two steps are one of four: the mixture is in the Trainer's checkpoints."""
    rows = [inputs("audioflamingo3", [[clip]]) for clip in (SHORT, LONG[:20_000])] * 4
    data = [{**{name: value[0] for name, value in row.items()}, "labels": row["input_ids"][0]} for row in rows]

    def train(folder: str, steps: int, resume: str | None = None) -> PreTrainedModel:
        model = mowe.attach(tiny("audioflamingo3"), tiny_pool())
        awaken(model, 0.05)
        model.mowe.requires_grad_(True)
        settings = TrainingArguments(
            str(tmp_path / folder), max_steps=steps, save_steps=2, per_device_train_batch_size=1,
            per_device_eval_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-3,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=3, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data[:2])
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.evaluate()["eval_loss"] > 0
        return model

    whole = train("whole", 4)
    train("parts", 2)
    resumed = train("parts", 4, str(tmp_path / "parts" / "checkpoint-2"))
    for name, parameter in whole.mowe.named_parameters():
        torch.testing.assert_close(resumed.mowe.get_parameter(name), parameter, msg=name)
    loaded = mowe.load_attached(tmp_path / "whole" / "checkpoint-4")
    assert same_state(state(loaded.mowe), state(whole.mowe))
