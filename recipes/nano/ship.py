"""The shipped model: the trained one in half precision, its scores as they are after that, and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mowe import MoweForConditionalGeneration, MoweProcessor
from mowe.data import read_manifest
from mowe.evaluation import evaluate
from recipes.nano.data import SIZES
from recipes.nano.runs import LONGER, NEW_TOKENS, RUNS, SHIPPED, folder_name, run

CARD = Path(__file__).with_name("card.md")


def ship(lab: Path, out: Path) -> None:
    """Make the runs LONGER, and write the model of SHIPPED into `out`, in float16, with scores.json and README.md."""
    for seed in range(RUNS[LONGER].seeds):
        run(lab, LONGER, seed)
    trained = lab / "runs" / folder_name(*SHIPPED) / "model"
    MoweForConditionalGeneration.from_pretrained(trained, dtype=torch.float16).save_pretrained(out)
    MoweProcessor.from_pretrained(trained).save_pretrained(out)
    _forget_folders(out / "config.json")
    model = MoweForConditionalGeneration.from_pretrained(out, dtype="float32").eval()
    manifest = read_manifest(lab / "data" / "test.jsonl")
    report = evaluate(model, MoweProcessor.from_pretrained(out), manifest, max_new_tokens=NEW_TOKENS)
    scores = {
        name: {"metric": task.rule.metric, "value": round(task.score.value, 4), "clips": task.examples}
        for name, task in report.tasks.items()
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    rows = [f"| {name} | {s['metric'].replace('_', ' ')} | {100 * s['value']:.1f} % |" for name, s in scores.items()]
    text = CARD.read_text(encoding="utf-8")
    fields = {
        "scores": "\n".join(("| task | measured by | test split |", "| --- | --- | ---: |", *rows)),
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million",
        "clips": f"{sum(SIZES['train'].values()):,}",
    }
    for name, value in fields.items():
        text = text.replace(f"{{{name}}}", value)
    (out / "README.md").write_text(text, encoding="utf-8")


def _forget_folders(config: Path) -> None:
    """transformers notes where each part was loaded from."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(item) for key, item in value.items() if key not in ("_name_or_path", "name_or_path")}
        return [kept(item) for item in value] if isinstance(value, list) else value

    settings = kept(json.loads(config.read_text(encoding="utf-8")))
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
