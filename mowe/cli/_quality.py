"""What 4 bits cost and save: audio embeddings and choices of the routers before and after, memory of every part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from mowe.cli._inputs import Clip, LoadedModel

# Past these a result is warned of. Our choice: the demo model stays well inside.
MOST_ERROR = 0.25
LEAST_COSINE = 0.97
LEAST_AGREEMENT = 0.9

_UNITS = ("B", "KiB", "MiB", "GiB")


@dataclass(frozen=True)
class Heard:
    """embeddings: float32 [tokens, H] of all clips. choices: [windows][slots], the encoders chosen."""

    embeddings: Tensor
    choices: list[list[int]]


@dataclass(frozen=True)
class Quality:
    """relative_error: norm of the embeddings' change over their norm. cosine: mean over tokens. router_agreement: share
    of windows that chose the same encoders."""

    relative_error: float
    cosine: float
    router_agreement: float

    def warnings(self) -> list[str]:
        """What is past the thresholds."""
        error, cosine, agreement = self.relative_error, self.cosine, self.router_agreement
        rules = (  # as "not within", which nan is not either
            ("the relative error of the audio embeddings is", error, not error <= MOST_ERROR),
            ("the cosine between the audio embeddings is", cosine, not cosine >= LEAST_COSINE),
            ("the share of clips routed alike is", agreement, not agreement >= LEAST_AGREEMENT),
        )
        limits = f"at most {MOST_ERROR}", f"at least {LEAST_COSINE}", f"at least {LEAST_AGREEMENT}"
        return [
            f"{what} {value:.3f}, {limit} is expected; keep more parts in full precision"
            for (what, value, bad), limit in zip(rules, limits, strict=True)
            if bad
        ]


@torch.inference_mode()
def hear(loaded: LoadedModel, clips: Sequence[Clip]) -> Heard:
    """What the language model would get for the clips, one after the other."""
    embeddings: list[Tensor] = []
    choices: list[list[int]] = []
    for clip in clips:
        inputs: Any = loaded.processor.feature_extractor([clip.wave])
        audio: Any = loaded.model.get_audio_features(
            inputs["input_features"].to(loaded.device), inputs["input_features_mask"].to(loaded.device)
        )
        embeddings.append(audio.pooler_output.float())
        choices += audio.mixture.indices.tolist()
    return Heard(torch.cat(embeddings), choices)


def compare(before: Heard, after: Heard) -> Quality:
    change = (after.embeddings - before.embeddings).norm()
    error = change / before.embeddings.norm() if change != 0 else change
    cosine = nn.functional.cosine_similarity(before.embeddings, after.embeddings, dim=-1).mean()
    same = sum(a == b for a, b in zip(before.choices, after.choices, strict=True))
    return Quality(error.item(), cosine.item(), same / len(before.choices))


def memory(model: Any) -> dict[str, int]:
    """Bytes of every part, scales included, what parts share counted once; of a skeleton, what its weights take."""
    seen: set[tuple[int, int]] = set()

    def count(module: nn.Module) -> int:
        sizes = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in module.state_dict().values()}
        new = sizes.keys() - seen
        seen.update(new)
        return sum(sizes[place] for place in new)

    mixture = model.model.mixture
    parts = {
        "base encoder": model.audio_tower,
        "pool": mixture.pool,
        "routers": mixture.router,
        "projector": mixture.multi_modal_projector,
        "language model": model.language_model,
    }
    return {name: count(module) for name, module in parts.items()}


def as_text(count: float) -> str:
    """Bytes for people."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


@dataclass(frozen=True)
class Comparison:
    """A model before and after: bytes of every part, and what became of the embeddings of some clips."""

    bytes_before: dict[str, int]
    bytes_4bit: dict[str, int]
    quality: Quality
    clips: int

    def as_data(self) -> dict[str, Any]:
        """The same for scripts."""
        return asdict(self)

    def report(self) -> Group:
        """The same for people."""
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, show_footer=True)
        table.add_column("part", "all")
        for heading, sizes in (("before", self.bytes_before), ("in 4 bits", self.bytes_4bit)):
            table.add_column(heading, as_text(sum(sizes.values())), justify="right", no_wrap=True)
        for name, size in self.bytes_before.items():
            table.add_row(name, as_text(size), as_text(self.bytes_4bit[name]))
        error, cosine = self.quality.relative_error, self.quality.cosine
        return Group(
            table,
            Text(),
            Text(f"audio embeddings, {self.clips} clips: relative error {error:.3f}, cosine {cosine:.4f}"),
            Text(f"routed alike: {self.quality.router_agreement:.0%}"),
        )
