"""What generating an answer needs besides transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LogitsProcessorList


class PlaceholderNeverChosen(LogitsProcessorList):
    """Logits processors, and before them the placeholder of audio as one token more, which is never chosen."""

    def __init__(self, processors: LogitsProcessorList, placeholder: int):
        super().__init__(processors)
        self.placeholder = placeholder

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        size = scores.shape[1]
        # Where it lies outside the vocabulary, the ids of the prompt would point past the scores.
        scores = nn.functional.pad(scores, (0, max(0, self.placeholder + 1 - size)), value=float("-inf"))
        scores[:, self.placeholder] = float("-inf")
        return super().__call__(input_ids, scores, **kwargs)[:, :size]
