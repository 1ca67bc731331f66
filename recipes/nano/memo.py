"""What frozen encoders gave for a clip, kept: a clip's features do not depend on its batch, so once is enough.

Training on few clips for several epochs, and several runs over the same encoders, then cost what is trained alone.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mowe.families import ClipFeatures, EncoderFamily
from mowe_kernels import FamilyPlan

_KEPT: dict[tuple[str, tuple[int, int]], Tensor] = {}
"""[frames, width] by encoder and clip, for all runs of this process."""


class RememberFrozen(TrainerCallback):
    """Makes the frozen encoders of a model on the CPU remember what they computed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parts = model.model
        for family in (parts.audio_tower, *parts.mixture.pool.families):
            parameters = list(family.parameters())
            if parameters[0].device.type == "cpu" and not any(p.requires_grad for p in parameters):
                remember(family)


def remember(family: EncoderFamily) -> None:
    """From now on the family looks up what it has computed before. Its parameters must stay as they are."""
    encoders = [
        hashlib.sha1(b"".join(p.detach()[e].numpy().tobytes() for p in family.parameters())).hexdigest()
        for e in range(len(family.configs))
    ]
    compute = family.forward

    @torch.no_grad()
    def forward(features: ClipFeatures, plan: FamilyPlan) -> Tensor:
        clips = _clip_keys(features)
        pairs = zip(plan.encoder.tolist(), plan.clip.tolist(), plan.rows.lengths.tolist(), strict=True)
        found = [((encoders[encoder], clips[clip]), frames) for encoder, clip, frames in pairs if frames]
        if all(key in _KEPT for key, _ in found):
            rows = [_KEPT[key] for key, _ in found]
            return torch.cat(rows) if rows else compute(features, plan)
        rows = compute(features, plan)
        for (key, _), part in zip(found, rows.split([frames for _, frames in found]), strict=True):
            _KEPT[key] = part.clone()
        return rows

    family.forward = forward


def _clip_keys(features: ClipFeatures) -> list[tuple[int, int]]:
    """Length and checksum of each clip's samples."""
    samples = features.audio.samples.split(features.audio.lengths)
    return [(len(clip), zlib.crc32(clip.numpy().tobytes())) for clip in samples]
