"""Router losses that nobody reads cost nothing: torch's operations are counted, each of which is a launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.mowe.attach.models import inputs
from tests.mowe.attach.tools import GREEDY, SHORT, attached
from tests.mowe.audio_llm import CLIPS, PROMPTS, answers, processor_of, tiny_model
from tests.mowe.encoders import clip


class Operations(TorchDispatchMode):
    """Counts what torch does inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> int:
    run()  # makes what is kept
    with torch.no_grad(), Operations() as counted:
        run()
    return counted.count


def in_a_mixture(**settings: Any) -> int:
    mixture, base = tiny_model(**settings).model.mixture, torch.randn(2, 50, 32)
    return operations(lambda: mixture(base, [clip(16_000), clip(9_000)]))


def in_an_answer(**settings: Any) -> int:
    model = tiny_model(**settings)
    batch = processor_of(model)(PROMPTS, audio=CLIPS)
    return operations(lambda: answers(model, batch))


def in_an_answer_of_an_attached_model(**settings: Any) -> int:
    model, batch = attached("qwen2_audio", **settings), inputs("qwen2_audio", [[SHORT]])
    return operations(lambda: model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("counted", [in_a_mixture, in_an_answer, in_an_answer_of_an_attached_model])
def test_losses_that_nobody_reads(counted: Callable[..., int]) -> None:
    assert counted() == counted(router_losses={}) > 100


def test_losses_that_are_read() -> None:
    """What is saved: views aside, some twenty launches."""
    out = tiny_model().model.mixture(torch.randn(2, 50, 32), [clip(16_000), clip(9_000)])
    assert operations(lambda: out.aux_loss) >= 20


def test_every_reader_has_a_loss_of_its_own() -> None:
    out = tiny_model().model.mixture(torch.randn(2, 50, 32), [clip(16_000), clip(9_000)])
    with torch.no_grad():
        shown = out.aux_loss
    assert not shown.requires_grad and out.aux_loss.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out.aux_loss, shown)
