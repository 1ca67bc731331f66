from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from mowe_kernels import csrc, pack_plan, use_backend
from tests.mowe_kernels.checks import int32, opcheck, raises

pytestmark = pytest.mark.usefixtures("poisoned")


def naive(indices, lengths, rank, level_bounds):
    """The pairs of a batch listed, sorted and counted one by one."""
    batch, slots, encoders = len(indices), len(indices[0]), len(rank)
    keys, owner = [], {}
    for clip in range(batch):
        for slot, encoder in enumerate(indices[clip]):
            pair = clip * slots + slot
            exists = encoder >= 0 and (clip, encoder) not in owner
            if exists:
                owner[clip, encoder] = pair
            keys.append(rank[encoder] if exists else encoders)
    order = sorted(range(batch * slots), key=lambda pair: (keys[pair], pair))
    position = [
        [
            order.index(owner[clip, encoder] if encoder >= 0 else clip * slots + indices[clip].index(encoder))
            for encoder in indices[clip]
        ]
        for clip in range(batch)
    ]
    encoder = [keys[pair] for pair in order]
    cu_seqlens, group_offsets = [], []
    for level, (low, high) in enumerate(level_bounds):
        sizes = [lengths[level][p // slots] if low <= keys[p] < high else 0 for p in order]
        cu_seqlens.append([sum(sizes[:p]) for p in range(len(order) + 1)])
        group_offsets.append(
            [sum(n for n, e in zip(sizes, encoder, strict=True) if e < g) for g in range(encoders + 1)]
        )
    return order, position, encoder, cu_seqlens, group_offsets


def random_routing(generator: random.Random):
    encoders, batch, slots = generator.randint(1, 9), generator.randint(1, 7), generator.randint(1, 5)
    rank = generator.sample(range(encoders), encoders)
    split = generator.randint(0, encoders)
    level_bounds = [(0, split)] * generator.randint(1, 2) + [(split, encoders)] * generator.randint(1, 3)
    lengths = [[generator.choice([0, 1, 2, 5, 13]) for _ in range(batch)] for _ in level_bounds]
    indices = [[generator.randint(-1, encoders - 1) for _ in range(slots)] for _ in range(batch)]
    return indices, lengths, rank, level_bounds


def as_tensors(indices, lengths, rank, level_bounds):
    return torch.tensor(indices), *(torch.tensor(x, dtype=torch.int32) for x in (lengths, rank, level_bounds))


@pytest.mark.parametrize("backend", ["csrc", "reference"])
@pytest.mark.parametrize("seed", range(40))
def test_matches_a_plan_made_by_hand(seed, backend):
    if backend == "csrc" and not csrc.available():
        pytest.skip("the compiled library was not built")
    routing = random_routing(random.Random(seed))
    with use_backend("reference") if backend == "reference" else nullcontext():
        plan = pack_plan(*as_tensors(*routing))
    assert all(tensor.dtype == torch.int32 for tensor in plan)
    assert tuple(tensor.tolist() for tensor in plan) == naive(*routing)


def test_other_integers_and_strides():
    indices, *layout = as_tensors(*random_routing(random.Random(3)))
    expected = pack_plan(indices, *layout)
    for plan in (
        pack_plan(indices.int(), *layout),
        pack_plan(indices.T.contiguous().T, *(tensor.repeat_interleave(2, -1)[..., ::2] for tensor in layout)),
    ):
        for mine, other in zip(plan, expected, strict=True):
            assert torch.equal(mine, other)


def test_an_encoder_that_is_not_there():
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        pack_plan(torch.tensor([[3]]), int32(5)[None], int32(0, 1, 2), int32(0, 3)[None])


@pytest.mark.parametrize("rank", [3, 1 << 30, -1, -(1 << 30)])
def test_an_encoder_with_a_place_that_is_not_there(rank):
    if not csrc.available():
        pytest.skip("the compiled library was not built")
    with pytest.raises(RuntimeError, match=f"rank {rank} is out of range for 3 encoders"):
        pack_plan(torch.tensor([[2]]), int32(5)[None], int32(0, 1, rank), int32(0, 3)[None])


def test_an_example():
    order, position, encoder, cu_seqlens, group_offsets = pack_plan(
        torch.tensor([[2, 0], [0, 0], [-1, 2]]), int32(10, 20, 30)[None], int32(0, 1, 2), int32(0, 3)[None]
    )
    assert order.tolist() == [1, 2, 0, 5, 3, 4]  # encoder 0: clips 0 and 1; encoder 2: clips 0 and 2; then absent pairs
    assert encoder.tolist() == [0, 0, 2, 2, 3, 3]
    assert position.tolist() == [[2, 0], [1, 1], [5, 3]]
    assert cu_seqlens.tolist() == [[0, 10, 30, 40, 70, 70, 70]]
    assert group_offsets.tolist() == [[0, 30, 30, 70]]


def test_an_empty_batch():
    order, position, encoder, cu_seqlens, group_offsets = pack_plan(
        torch.empty(0, 2, dtype=torch.int64), torch.empty(1, 0, dtype=torch.int32), int32(0, 1), int32(0, 2)[None]
    )
    assert (order.shape, position.shape, encoder.shape) == ((0,), (0, 2), (0,))
    assert (cu_seqlens.tolist(), group_offsets.tolist()) == ([[0]], [[0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_registration(dtype):
    indices, *rest = as_tensors([[2, 0], [0, 0], [-1, 2]], [[3, 0, 5], [1, 2, 3]], [1, 0, 2], [[0, 2], [2, 3]])
    opcheck(torch.ops.mowe.pack_plan.default, (indices.to(dtype), *rest))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"indices": torch.tensor([0, 1])}, ("indices", "[any, any]", "got [2]")),
        ({"indices": torch.zeros(2, 1)}, ("indices must be integers", "got torch.float32")),
        ({"lengths": int32(5, 6, 7)[None]}, ("lengths", "[any, 2]", "got [1, 3]")),
        ({"lengths": torch.tensor([[5, 6]])}, ("lengths must be int32", "got torch.int64")),
        ({"rank": int32(0)[None]}, ("rank", "[any]", "got [1, 1]")),
        ({"level_bounds": int32(0, 1)}, ("level_bounds", "[1, 2]", "got [2]")),
    ],
)
def test_says_what_does_not_fit(change, parts):
    fits = {
        "indices": torch.tensor([[0], [1]]),
        "lengths": int32(5, 6)[None],
        "rank": int32(0, 1),
        "level_bounds": int32(0, 2)[None],
    }
    with raises("pack_plan: ", *parts):
        pack_plan(**fits | change)
