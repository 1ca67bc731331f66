"""Two processes, sharing gradients or parameters, learn what one learns, also where their clips choose apart."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mowe import MoweForConditionalGeneration
from mowe.audio import load_audio
from mowe.training.log import read_lines
from tests.mowe.audio_llm import processor_of, tiny_model
from tests.mowe.encoders import assert_same

ROOT = Path(__file__).parents[3]
REPRODUCIBLE = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
"""Otherwise the order of a sum depends on the number of threads, and in MKL on where in memory a matrix happens to lie.
That changes a last digit, which in bfloat16 may decide how a number is rounded, and so change it by a part in 2^8.
"""


@pytest.fixture(scope="module")
def split_model(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sends low tones to a Whisper encoder and high ones to a HuBERT, and no clip to both."""
    losses = {"dependent_entropy": 0.01}  # those of the paper cancel where a batch has a single window
    model = tiny_model(num_independent_slots=0, router_losses=losses)
    low, high = (base_summary(model, tones / f"train{i}.wav") for i in (0, 2))
    middle, direction = (low + high) / 2, high - low
    direction -= (direction @ middle) / (middle @ middle) * middle
    direction *= 4 / (direction @ (high - middle))
    with torch.no_grad():
        model.model.mixture.router.dependent.weight.zero_()[:2] = torch.stack((-direction, direction))
    folder = tmp_path_factory.mktemp("split")
    model.save_pretrained(folder)
    processor_of(model).save_pretrained(folder)
    return folder


@torch.no_grad()
def base_summary(model: MoweForConditionalGeneration, path: Path) -> torch.Tensor:
    return model.get_audio_features(load_audio(path)[None]).last_hidden_state.mean(0)


def run_in(processes: int, config: dict[str, Any], folder: Path, *changes: dict[str, Any]) -> None:
    """Train in so many processes, once for each set of changes."""
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.mowe.training.worker", str(file), *map(json.dumps, changes)]
    environment = {**os.environ, **REPRODUCIBLE, "PYTHONPATH": str(ROOT)}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment | rank, stderr=subprocess.PIPE, text=True)
        for rank in (ranks if processes > 1 else [{}])
    ]
    try:
        for process in started:
            told = process.communicate(timeout=240)[1]
            assert process.returncode == 0, told
    finally:
        for process in started:
            process.kill()


def logged(folder: Path, *names: str) -> torch.Tensor:
    entries = [entry for entry in read_lines(folder / "log.jsonl") if names[0] in entry]
    return torch.tensor([[entry[name] for name in names] for entry in entries])


@pytest.fixture(scope="module", params=["full", "lora"], ids=["float32", "bfloat16"])
def runs(
    tones: Path, split_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Path]:
    """The same run, of two stages, in one process, in two that repeat and in two that share the parameters; and what
    the last two come to when they go on from the middle of the second stage. In bfloat16 the language model is frozen,
    and has adapters in float32; no gradient is clipped, since shards sum up the norm in another order.
    """
    in_bf16 = request.param == "lora"
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("one", "copies", "shards", "copies again", "shards again")}
    odd = folder / "odd.jsonl"  # in batches of one clip, one process of two has a clip again
    lines = [
        {"audio": str(tones / f"valid{i}.wav"), "task": "odd", "prompt": "?", "answer": "x" * 4**i} for i in range(3)
    ]
    odd.write_text("".join(json.dumps(line) + "\n" for line in lines))
    everything = {"audio_tower": True, "pool": True, "language_model": request.param}
    steady = {"learning_rate": 1e-3, "warmup": 0.0, "schedule": "constant"}
    config = {
        "model": str(split_model),
        "output": str(found["one"]),
        "data": {
            "train": [{"manifest": str(tones / "train.jsonl")}],
            "validation": [str(tones / "valid.jsonl"), str(odd)],
            "batch_clips": 1,
            "workers": 0,
        },
        "stages": [{**steady, "steps": 1}, {**steady, "steps": 3, "trainable": everything}],
        "log_every": 1,
        "save_every": 1,
        "bf16": in_bf16,
        "max_grad_norm": 1e3 if in_bf16 else 1.0,
    }
    run_in(1, config, folder, {"accumulate": 2})
    changes = [{"output": str(found[name]), "fsdp": name == "shards"} for name in ("copies", "shards")]
    run_in(2, config, folder, *changes)
    for change in changes:
        again = Path(f"{change['output']} again")
        shutil.copytree(change["output"], again)
        shutil.rmtree(again / "stage-1" / "checkpoint-3")
        change |= {"output": str(again), "resume": True}
    run_in(2, config, folder, *changes)
    return found


def test_clips_choose_apart(runs: dict[str, Path]) -> None:
    """What the other tests are about: in a step one process runs a Whisper encoder and the other one a HuBERT."""
    routes = [entry["windows"] for entry in read_lines(runs["one"] / "routing.jsonl") if entry["stage"] == 1]
    chosen = torch.stack([torch.tensor([t["dependent"] for t in e.values() if t]).sum(0) for e in routes])
    assert (chosen[:, 0] + chosen[:, 1] == 2).all() and (chosen[:, :2] == 1).all(1).any()


@pytest.mark.parametrize("name", ["copies", "shards", "copies again", "shards again"])
def test_two_processes_learn_what_one_learns(runs: dict[str, Path], split_model: Path, name: str) -> None:
    got, one = runs[name], runs["one"]
    assert read_lines(got / "routing.jsonl") == read_lines(one / "routing.jsonl")
    validation = [(f"eval_{task}_loss",) for task in ("any", "low", "odd")]
    for columns in (("loss", "grad_norm", "router/dependent_entropy"), *validation):
        assert_same(logged(got, *columns).T, logged(one, *columns).T, 1e-4)
    expected, before = (load_file(path / "model.safetensors") for path in (one / "model", split_model))
    for key, value in load_file(got / "model" / "model.safetensors").items():
        assert (value - expected[key]).abs().mean() < 1e-6, key
        if "pool" in key and "layers" in key and "weight" in key:
            assert not torch.equal(value[0], before[key][0]), key


def test_sigterm_to_one_process_ends_all(tones: Path, split_model: Path, tmp_path: Path) -> None:
    config = {
        "model": str(split_model),
        "output": str(tmp_path / "run"),
        "data": {"train": [{"manifest": str(tones / "train.jsonl")}], "batch_clips": 1, "workers": 0},
        "stages": [{"steps": 5}],
        "log_every": 1,
    }
    run_in(2, config, tmp_path, {"terminated": 1}, {"resume": True})
    assert [path.name for path in sorted((tmp_path / "run" / "stage-0").iterdir())] == ["checkpoint-2", "checkpoint-5"]
    assert logged(tmp_path / "run", "loss").shape == (5, 1)
