"""What the tests of attached mixtures share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import mowe
from tests.mowe.attach.audio_llms import TINY
from tests.mowe.attach.models import tiny, tiny_pool
from tests.mowe.encoders import clip

SHORT, LONG, TINY_CLIP = clip(16_000, 1), clip(30_000, 2), clip(9_000, 3)
OVER_A_WINDOW = clip(50_000, 4)
# Padded rows, rows that are windows, packed rows, features and layer inside the tower.
KINDS = ["qwen2_audio", "voxtral", "qwen3_asr", "qwen2_5_omni_thinker"]
GREEDY = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "max_length": None}


def prompts(model_type: str) -> list[list[Tensor]]:
    """One audio, several, none; an audio of more than a window where the model has them."""
    return [[SHORT], [OVER_A_WINDOW if TINY[model_type].windows else LONG, TINY_CLIP], []]


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs without those of the pool."""
    return {name: value for name, value in batch.items() if not name.startswith("mowe_")}


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    return model(**batch).logits


def answers(model: PreTrainedModel, batch: dict[str, Any], **settings: Any) -> list[list[int]]:
    """The new tokens of every prompt, the most likely ones unless the settings say otherwise."""
    return model.generate(**batch, **{**GREEDY, **settings})[:, batch["input_ids"].shape[1] :].tolist()


def step_logits(model: PreTrainedModel, batch: dict[str, Any], **settings: Any) -> Tensor:
    """[B, steps, V]: what every new token was chosen from."""
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True, **settings}
    return torch.stack(model.generate(**batch, **settings).logits, dim=1)


@torch.no_grad()
def awaken(model: PreTrainedModel, std: float = 0.5) -> PreTrainedModel:
    """The model as if its mixture had been trained: no columns left at zero, routers that tell clips apart."""
    generator = torch.Generator().manual_seed(11)
    for parameter in (*model.mowe.fusion.parameters(), *model.mowe.router.parameters()):
        parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def attached(model_type: str, **settings: Any) -> PreTrainedModel:
    """A tiny model with a mixture that speaks."""
    return awaken(mowe.attach(tiny(model_type), tiny_pool(), **settings))


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
