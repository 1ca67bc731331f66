"""The shipped model: the trained one in half precision, its scores as they are after that, and its card."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mowe import MoweForConditionalGeneration, MoweProcessor
from mowe.data import read_manifest
from mowe.evaluation import evaluate
from recipes.nano.data import SIZES
from recipes.nano.runs import NEW_TOKENS, SHIPPED, folder_name

CARD = Path(__file__).with_name("card.md")


def ship(lab: Path, out: Path) -> None:
    """Write the model of the run SHIPPED into `out`, in float16, with scores.json and README.md."""
    trained = lab / "runs" / folder_name(*SHIPPED) / "model"
    MoweForConditionalGeneration.from_pretrained(trained, dtype=torch.float16).save_pretrained(out)
    MoweProcessor.from_pretrained(trained).save_pretrained(out)
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
