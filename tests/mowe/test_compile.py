"""The whole mixture under torch.compile: a second graph for other lengths unless it is asked to be dynamic, and none
anew after that for other lengths or another routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from mowe import EncoderPool, MixtureOfWeakEncoders, MoweConfig
from tests.mowe.encoders import assert_same, assert_same_gradients, clip, hubert, whisper
from tests.mowe_kernels.checks import opcheck

OUT = 20
BATCHES = ((16_000, 401, 33_333), (20_000, 999, 12_345), (8_000, 9_999, 2_345), (9_999, 99_000, 480), (640, 640, 640))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def mixture(context: str) -> MixtureOfWeakEncoders:
    """Two Whisper encoders, a HuBERT that normalises its waves and one that does not."""
    torch.manual_seed(0)
    pool = EncoderPool.from_encoders([whisper(0), whisper(1), hubert(2), hubert(3)], context=context)
    pool.config.encoders[3]["do_normalize"] = True
    config = MoweConfig(
        audio_config=whisper().config,
        text_config={"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 2},
        pool_config=pool.config,
        projector_hidden_size=16,
    )
    made = MixtureOfWeakEncoders(config, EncoderPool(pool.config))
    for name, parameter in made.named_parameters():
        if not name.endswith("embed_positions"):
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def inputs(lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor], list[int]]:
    """Base features, padded to the longest clip, waveforms, and how many base frames are real."""
    frames = [-(-(samples // 160) // 2) for samples in lengths]
    return torch.randn(len(lengths), max(frames), 32), [clip(n, i) for i, n in enumerate(lengths)], frames


OPS = {
    "device_lengths": ([3, 1, 4], torch.device("cpu")),
    "lay_out": ([torch.ones(5), torch.ones(3)], torch.device("cpu")),
    "log_mel": (torch.randn(1_200), [800, 400], "valid", 80),
    "normalize_waves": (torch.randn(1_200), [800, 400]),
}


@pytest.mark.parametrize("name", OPS)
def test_registration(name):
    opcheck(getattr(torch.ops.mowe, name).default, OPS[name])


@pytest.mark.parametrize("context", ["valid", "window"])
@torch.no_grad()
def test_other_lengths_and_another_routing_compile_nothing(context):
    made, counter = mixture(context), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, backend=counter, fullgraph=True)
    chosen = set()
    for number, lengths in enumerate(BATCHES if context == "valid" else BATCHES[:3]):
        made.router.dependent.weight.neg_()
        made.router.independent_logits.copy_(torch.randn(4))
        given = inputs(lengths)
        out, expected = compiled(*given), made(*given)
        assert_same(out.tokens, expected.tokens)
        assert (out.lengths, out.indices.tolist()) == (expected.lengths, expected.indices.tolist())
        assert counter.frame_count == min(number + 1, 2)  # at the second batch, sizes become symbols
        chosen.add(str(out.indices.tolist()))
    assert len(chosen) > 1


@torch.no_grad()
def test_dynamic_from_the_start_each_number_of_clips_has_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixture("valid"), backend=counter, fullgraph=True, dynamic=True)
    for lengths in (BATCHES[0], BATCHES[0][:2]):
        before = counter.frame_count
        compiled(*inputs(lengths))
        made = counter.frame_count
        assert made > before
        for others in BATCHES[1:3]:
            compiled(*inputs(others[: len(lengths)]))
        compiled(*inputs(BATCHES[1]))
        assert counter.frame_count == made


class Padded(torch.nn.Module):
    """A model that takes the tokens padded, and those of the last clip (of which torch wants to know if it is one)."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = mixture("valid")

    def forward(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = self.mixture(*given)
        return *out.padded(), out.clip(-1)


@torch.no_grad()
def test_a_model_around_it_compiles_no_more():
    model, counter = Padded(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number, lengths in enumerate((*BATCHES[:2], (8_000, 23_456, 9_999), (9_999, 3_333, 50_000))):
        given = inputs(lengths)
        for got, expected in zip(compiled(*given), model(*given), strict=True):
            assert torch.equal(got, expected)
        assert counter.frame_count == min(number + 1, 2)


def test_gradients_are_those_of_eager_code():
    made, counter = mixture("valid"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, backend=counter, fullgraph=True, dynamic=True)

    def gradients(call, given) -> dict[str, Tensor]:
        made.zero_grad()
        out = call(*given)
        (out.tokens.square().mean() + out.aux_loss).backward()
        # On the CPU a family that nobody chose does not run in eager code, and leaves no gradient instead of zeros.
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in made.named_parameters()}

    graphs = set()
    for lengths in BATCHES[:3]:
        given = inputs(lengths)
        assert_same_gradients(gradients(compiled, given), gradients(made, given))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_no_graph_is_given_which_clip_is_the_longest():
    """torch guards on what a graph is given: one found in its cache on disk would be for that clip alone."""
    given: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        given.extend(str(size) for size in inputs if isinstance(size, torch.SymInt))
        return make_boxed_func(graph)

    as_inductor = {"partition_fn": min_cut_rematerialization_partition}
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, **as_inductor)
    out = torch.compile(mixture("valid"), backend=backend, fullgraph=True, dynamic=True)(*inputs(BATCHES[0]))
    out.tokens.square().mean().backward()
    assert given and not [size for size in given if "Max" in size]


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(strict):
    made, given = mixture("valid"), inputs(BATCHES[0])
    out, expected = torch.export.export(made, given, strict=strict).module()(*given), made(*given)
    assert_same(out.tokens, expected.tokens)
    assert (out.lengths, out.indices.tolist()) == (expected.lengths, expected.indices.tolist())
