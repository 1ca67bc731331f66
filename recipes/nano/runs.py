"""The compared runs: the same clips, steps and seeds, only what listens differs."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from mowe import MoweForConditionalGeneration, MoweProcessor
from mowe.data import read_manifest
from mowe.evaluation import evaluate
from mowe.training import read_config, train
from recipes.nano.data import TASKS, read
from recipes.nano.encoders import SPECIALISTS, WAVE_SPECIALISTS
from recipes.nano.memo import RememberFrozen
from recipes.nano.results import write_result

CONFIG = Path(__file__).with_name("train.yaml")
NEW_TOKENS = 24


def pool_of(parts: Path, kind: str) -> list[str]:
    """Folders of the pool's encoders. "silent": one whose features are zero, so that the base is all there is."""
    if kind == "silent":
        return [str(parts / kind)]
    families = {task: "hubert" if task in WAVE_SPECIALISTS else "whisper" for task in SPECIALISTS}
    families = {"diverse": families, "uniform": dict.fromkeys(SPECIALISTS, "whisper")}.get(kind, {})
    return [str(parts / families.get(task, kind) / task) for task in SPECIALISTS]


class Run(NamedTuple):
    """What listens in a compared run: a base and a pool of the lab's parts, and how many slots of each router.

    seeds: how many times it is made, with seeds from 0. steps: of training; those of train.yaml without.
    """

    base: str
    pool: str
    independent: int
    dependent: int
    seeds: int = 1
    steps: int | None = None


BEST = "diverse pool, both routers"
LONGER = f"{BEST}, twice the steps"
SHIPPED = LONGER, 1

RUNS = {
    "base only": Run("base", "silent", 1, 0, seeds=3),
    BEST: Run("base", "diverse", 1, 1, seeds=3),
    "larger base only": Run("large", "silent", 1, 0),
    "uniform pool, both routers": Run("base", "uniform", 1, 1),
    "diverse pool, all encoders on": Run("base", "diverse", 4, 0),
    "diverse pool, data-independent slot": Run("base", "diverse", 1, 0),
    "diverse pool, data-dependent slot": Run("base", "diverse", 0, 1),
    "untrained pool, both routers": Run("base", "untrained", 1, 1),
    LONGER: Run("base", "diverse", 1, 1, seeds=2, steps=2400),
}


def jobs() -> list[tuple[str, int]]:
    """(run, seed) of the comparison, the most important ones first. Those in twice the steps are made by `ship`."""
    most = max(run.seeds for run in RUNS.values())
    return [(name, seed) for seed in range(most) for name, run in RUNS.items() if seed < run.seeds and name != LONGER]


def folder_name(name: str, seed: int) -> str:
    return f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def run(lab: Path, name: str, seed: int) -> None:
    """Train and evaluate one of RUNS, and write its result; nothing is done where the result is there already."""
    result = lab / "results" / f"{folder_name(name, seed)}.json"
    if result.exists():
        return
    made_of = RUNS[name]
    parts, output = lab / "parts", lab / "runs" / folder_name(name, seed)
    overrides = {
        "model.audio_tower": parts / made_of.base,
        "model.pool": json.dumps(pool_of(parts, made_of.pool)),
        "model.language_model": parts / "language_model",
        "model.settings.num_independent_slots": made_of.independent,
        "model.settings.num_dependent_slots": made_of.dependent,
        "data.train.0.manifest": lab / "data" / "train.jsonl",
        "output": output,
        "seed": seed,
    }
    if made_of.steps:
        overrides["stages.0.steps"] = made_of.steps
    config = read_config(CONFIG, [f"{field}={value}" for field, value in overrides.items()])
    losses = Losses()
    wall, cpu = time.perf_counter(), time.process_time()
    trained = train(config, resume=output.exists(), callbacks=[RememberFrozen(), losses])
    took = {"wall_seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    model = MoweForConditionalGeneration.from_pretrained(trained.model, dtype="float32")
    processor = MoweProcessor.from_pretrained(trained.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tests = [lab / "data" / "test.jsonl", lab / "data" / "recordings.jsonl"]
    reports = {
        path.stem: evaluate(model, processor, read_manifest(path), max_new_tokens=NEW_TOKENS).as_data()
        for path in tests
        if path.exists()
    }
    write_result(
        result,
        {
            "run": name,
            "seed": seed,
            "parameters": {"base": count(model.audio_tower), "pool": count(model.model.mixture.pool)},
            "slots": {"independent": made_of.independent, "dependent": made_of.dependent},
            "scores": reports,
            "routing": routing(model, processor, lab / "data"),
            "losses": losses.seen,
            **took,
            "config": _in_default_lab(asdict(config), lab),
        },
    )


def _in_default_lab(config: dict[str, Any], lab: Path) -> dict[str, Any]:
    """The same configuration, whose folders tell nothing of the machine."""
    return json.loads(json.dumps(config, default=str).replace(f"{lab}/", "nano-lab/"))


class Losses(TrainerCallback):
    """Keeps the training losses as they are logged."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.seen.append((state.global_step, round(logs["loss"], 4)))


@torch.inference_mode()
def routing(model: Any, processor: Any, data: Path) -> dict[str, list[dict[str, float]]]:
    """Of each task of the test split, for each slot: the share of clips that chose each encoder."""
    shares = {}
    for task in TASKS:
        counts: list[Counter[int]] = []
        rows = read(data, "test", [task])
        for start in range(0, len(rows), 25):
            inputs = processor.feature_extractor([row["audio"] for row in rows[start : start + 25]]).to(model.device)
            chosen = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).mixture.indices
            counts = counts or [Counter() for _ in range(chosen.shape[1])]
            for slot, counter in enumerate(counts):
                counter.update(chosen[:, slot].tolist())
        shares[task] = [{str(e): counter[e] / len(rows) for e in sorted(counter)} for counter in counts]
    return shares


def count(module: torch.nn.Module) -> int:
    """Parameters that can be trained; fixed positions do not count."""
    return sum(p.numel() for name, p in module.named_parameters() if "embed_positions" not in name)
