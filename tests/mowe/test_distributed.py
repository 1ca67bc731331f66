"""The mixture in a training loop of one's own, in two processes whose clips choose apart: gradients are the means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mowe import EncoderPool, MixtureOfWeakEncoders, MoweConfig
from tests.mowe.encoders import assert_same_gradients, clip, hubert, whisper

LENGTHS = (9_000, 16_321)  # of the one clip that each process has


def mixture() -> MixtureOfWeakEncoders:
    """A Whisper and a HuBERT encoder, of which the first clip chooses one and the second the other."""
    torch.manual_seed(0)
    pool = EncoderPool.from_encoders([whisper(0), hubert(1)], context="valid")
    config = MoweConfig(
        audio_config=whisper().config,
        text_config={"model_type": "llama", "hidden_size": 20, "num_attention_heads": 2},
        pool_config=pool.config,
        num_independent_slots=0,
    )
    made = MixtureOfWeakEncoders(config, pool)
    with torch.no_grad():
        made.router.dependent.weight.copy_(torch.stack((torch.ones(32), -torch.ones(32))))
    return made


def backward(module: nn.Module, rank: int) -> list[list[int]]:
    """Backward of the clip of one process; returns who was chosen."""
    torch.manual_seed(rank)
    base = torch.randn(1, 60, 32) + 1 - 2 * rank
    out = module(base, [clip(LENGTHS[rank], rank)])
    (out.tokens.square().mean() + out.aux_loss).backward()
    return out.indices.tolist()


def gradients(module: nn.Module, share: float = 1.0) -> dict[str, Tensor]:
    named = ((name, p.grad) for name, p in module.named_parameters() if p.grad is not None)
    return {name: share * getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in named}


def copies(made: nn.Module) -> nn.Module:
    return DistributedDataParallel(made)


def copies_of_a_static_graph(made: nn.Module) -> nn.Module:
    return DistributedDataParallel(made, static_graph=True)


def shards(made: MixtureOfWeakEncoders) -> nn.Module:
    mesh = distributed.init_device_mesh("cpu", (2,))
    for family in made.pool.families:
        fully_shard(family, mesh=mesh)
    return fully_shard(made, mesh=mesh)


WAYS = (copies, copies_of_a_static_graph, shards)


def work(rank: int, folder: Path) -> None:
    """Every way, two steps each; leaves what the gradients are in this process."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for way in WAYS:
        made = mixture()
        module = way(made)
        steps = []
        for _ in range(2):
            module.zero_grad()
            steps.append((backward(module, rank), gradients(made)))
        found[way.__name__] = steps
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_gradients_are_the_means_of_the_processes(found: list[dict], way: str) -> None:
    alone = mixture()
    chosen = [backward(alone, rank) for rank in (0, 1)]
    assert chosen == [[[0]], [[1]]]
    expected = gradients(alone, 0.5)
    for rank in (0, 1):
        for choices, got in found[rank][way]:
            assert choices == chosen[rank]
            assert_same_gradients(got, expected)
