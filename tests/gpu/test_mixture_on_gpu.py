"""The whole mixture on a CUDA device: accuracy, no waiting for the device, repeatability, batch mates.

`pytest -m gpu`; skipped where there is no CUDA device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mowe import EncoderPool, MixtureOfWeakEncoders, MoweConfig
from mowe.audio import AudioBatch
from mowe_kernels import use_backend
from tests.mowe.encoders import clip, hubert, relative_error, whisper
from tests.mowe_kernels.triton.accuracy import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("triton_kernels")]

BASE_WIDTH, OUT = 32, 64
DRAWS = 8 if DEVICE.type == "cuda" else 1  # so that what has few values is compared by more than chance
LENGTHS = [16_000, 401, 33_333, 48_000, 9_001]
# Head sizes the attention kernel has, widths that fill no tile.
WHISPER = {"d_model": 96, "encoder_attention_heads": 3, "encoder_ffn_dim": 200}
WAVE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 130}
TEXT = {"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 2}


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    with use_backend("triton"):
        yield


def made(dtype: torch.dtype = torch.float32) -> MixtureOfWeakEncoders:
    torch.manual_seed(0)
    pool = EncoderPool.from_encoders(
        [whisper(0, **WHISPER), whisper(1, **WHISPER), hubert(2, **WAVE), hubert(3, **WAVE)], context="valid"
    )
    config = MoweConfig(
        audio_config=whisper().config, text_config=TEXT, pool_config=pool.config, projector_hidden_size=48
    )
    mixture = MixtureOfWeakEncoders(config, pool)
    torch.nn.init.normal_(mixture.router.dependent.weight, std=0.4)
    return mixture.to(DEVICE, dtype)


def inputs(
    dtype: torch.dtype = torch.float32, lengths: list[int] | None = None, draw: int = 0
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Base features, waveforms on the host, and how many base frames are real."""
    torch.manual_seed(1 + draw)
    lengths = lengths or LENGTHS
    frames = [-(-(samples // 160) // 2) for samples in lengths]
    base = torch.randn(len(lengths), max(frames), BASE_WIDTH).to(DEVICE, dtype)
    return base, [clip(samples, seed + 100 * draw) for seed, samples in enumerate(lengths)], frames


def results(mixture: MixtureOfWeakEncoders, dtype: torch.dtype, draws: int = 1) -> dict[str, Tensor]:
    """Tokens, and the gradient of every parameter that has one, one after the other of several draws of the inputs.

    The routers' gradients are one vector: of the choice among four encoders each alone has hardly more than one degree
    of freedom.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for draw in range(draws):
        mixture.zero_grad()
        out = mixture(*inputs(dtype, draw=draw))
        (out.tokens.float() @ torch.linspace(-1, 1, OUT, device=DEVICE)).mean().backward()
        found["tokens"].append(out.tokens.detach().flatten())
        for name, parameter in mixture.named_parameters():
            if parameter.grad is not None:
                found["routers" if name.startswith("router.") else name].append(parameter.grad.clone().flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    with use_backend("reference"):
        expected = results(made(exact), exact, DRAWS)
        plain = results(made(dtype), dtype, DRAWS)
    ours = results(made(dtype), dtype, DRAWS)
    assert ours.keys() == plain.keys() == expected.keys()
    for name, value in expected.items():
        least = torch.finfo(dtype).eps
        assert relative_error(ours[name], value) <= max(2 * relative_error(plain[name], value), least), name


def test_forward_and_backward_never_wait_for_the_device():
    mixture = made()
    results(mixture, torch.float32)  # compiles the kernels
    given = inputs()
    with no_waiting():
        mixture(*given).tokens.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype):
    mixture = made(dtype)
    first, second = results(mixture, dtype), results(mixture, dtype)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_clips_of_the_device_laid_out_on_the_host_are_all_there():
    waves = [clip(samples, seed) for seed, samples in enumerate((9_001, 1_600_000))]
    assert torch.equal(AudioBatch.from_waveforms([w.to(DEVICE) for w in waves], "cpu").samples, torch.cat(waves))


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch():
    mixture = made().eval()
    base, waves, frames = inputs()
    together = mixture(base, waves, frames)
    for b in range(len(waves)):
        alone = mixture(base[b : b + 1], waves[b : b + 1], frames[b : b + 1])
        assert relative_error(together.clip(b), alone.clip(0)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_cuda_graph_under_other_lengths_and_another_routing(dtype):
    """Replays are the mixture, and nothing of them waits for the device."""
    mixture = made(dtype).eval()
    graph = mixture.capture(len(LENGTHS), max(LENGTHS), -(-(max(LENGTHS) // 160) // 2))
    chosen = set()
    for part in (1, 2, 3):
        mixture.router.dependent.weight.neg_()
        mixture.router.independent_logits.copy_(mixture.router.independent_logits.roll(1) + part)
        given = inputs(dtype, [max(401, samples // part) for samples in LENGTHS])
        with no_waiting():
            out = graph(*given)
        expected = mixture(*given)
        assert out.lengths == expected.lengths
        assert torch.equal(out.indices, expected.indices)
        least = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert relative_error(out.tokens, expected.tokens) <= least
        chosen.add(str(out.indices.tolist()))
    assert len(chosen) > 1


def test_one_graph_of_torch_compile_for_all_lengths():
    mixture, counter = made(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixture, backend=counter, fullgraph=True, dynamic=True)
    graphs = set()
    for part in (1, 2, 3):
        given = inputs(lengths=[max(401, samples // part) for samples in LENGTHS])
        out, expected = compiled(*given).tokens, mixture(*given).tokens
        assert relative_error(out, expected) <= 1e-5
        out.sum().backward()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device fails."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_other_lengths_and_another_routing_compile_nothing():
    mixture = made().eval()
    base, waves, frames = inputs()
    mixture(base, waves, frames)
    compiled = _compiled_kernels()
    assert compiled
    other = deepcopy(mixture)
    other.router.dependent.weight.neg_()
    shorter = [wave[: len(wave) * 2 // 3] for wave in waves if len(wave) > 800]
    lengths = [-(-(len(wave) // 160) // 2) for wave in shorter]
    other(base[: len(shorter)], shorter, lengths)
    assert _compiled_kernels() == compiled


def _compiled_kernels() -> int:
    """How many variants of all kernels Triton holds for the current device."""
    import triton

    from mowe_kernels import triton as kernels

    count = 0
    for module in vars(kernels).values():
        for value in vars(module).values() if hasattr(module, "__dict__") else ():
            if isinstance(value, triton.runtime.JITFunction):
                count += len(value.device_caches[torch.cuda.current_device()][0])
    return count
