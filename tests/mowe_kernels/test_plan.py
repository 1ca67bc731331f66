from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch

from mowe_kernels import FamilyPlan, PackLayout, PackPlan
from mowe_kernels.plan import ROWS_AT_ONCE
from tests.mowe_kernels.checks import raises

pytestmark = pytest.mark.usefixtures("poisoned")


class Routing:
    """A random pool of families, clips and choices, with repeated encoders and unused slots."""

    def __init__(self, seed: int):
        generator = random.Random(seed)
        families = generator.randint(1, 4)
        encoders = generator.randint(families, 9)
        self.family_of_encoder = [
            *range(families),
            *(generator.randrange(families) for _ in range(encoders - families)),
        ]
        generator.shuffle(self.family_of_encoder)
        self.num_levels = [generator.randint(1, 3) for _ in range(families)]
        self.batch, self.slots = generator.randint(1, 7), generator.randint(1, 6)
        self.lengths = [
            [generator.choice([0, 1, 2, 5, 13]) for _ in range(self.batch)] for _ in range(sum(self.num_levels))
        ]
        self.indices = [[generator.randint(-1, encoders - 1) for _ in range(self.slots)] for _ in range(self.batch)]

    def plan(self) -> PackPlan:
        layout = PackLayout.build(self.family_of_encoder, self.num_levels)
        return PackPlan.build(torch.tensor(self.indices), self.lengths, layout)

    def members(self, family: int) -> list[int]:
        return [e for e, f in enumerate(self.family_of_encoder) if f == family]

    def pairs(self, family: int) -> list[tuple[int, int]]:
        """(encoder within the family, clip) of the family's pairs, in the order in which they must lie."""
        chosen = {(e, clip) for clip, slots in enumerate(self.indices) for e in slots if e >= 0}
        return sorted((self.members(family).index(e), clip) for e, clip in chosen if e in self.members(family))

    def levels(self, family: int) -> list[list[int]]:
        first = sum(self.num_levels[:family])
        return self.lengths[first : first + self.num_levels[family]]


ROUTINGS = pytest.mark.parametrize("routing", [Routing(seed) for seed in range(40)], ids=range(40))


def rows_of(plan: FamilyPlan, level: int) -> list[tuple[int, int, int]]:
    """(encoder, clip, frame) of each row."""
    clips, encoders, lengths = plan.clip.tolist(), plan.encoder.tolist(), plan.levels[level].lengths.tolist()
    assert plan.levels[level].starts.tolist() == [sum(lengths[:p]) for p in range(len(lengths))]
    return [(e, c, t) for e, c, n in zip(encoders, clips, lengths, strict=True) for t in range(n)]


def by_hand(routing: Routing, family: int, level: int) -> list[tuple[int, int, int]]:
    frames = routing.levels(family)[level]
    return [(e, clip, t) for e, clip in routing.pairs(family) for t in range(frames[clip])]


@ROUTINGS
def test_rows_lie_sorted_by_encoder_then_clip(routing):
    plan = routing.plan()
    for f in range(len(routing.num_levels)):
        family = plan.family(f)
        assert len(family.levels) == routing.num_levels[f]
        for level in range(routing.num_levels[f]):
            rows = rows_of(family, level)
            assert rows == by_hand(routing, f, level)
            offsets = family.levels[level].group_offsets.tolist()
            assert offsets == [sum(e < g for e, *_ in rows) for g in range(len(routing.members(f)) + 1)]


@ROUTINGS
def test_each_slot_finds_the_pair_that_serves_it(routing):
    plan = routing.plan()
    families = [plan.family(f) for f in range(len(routing.num_levels))]
    for clip, slots in enumerate(routing.indices):
        for slot, encoder in enumerate(slots):
            p = int(plan.position[clip, slot])
            for f, family in enumerate(families):
                own = encoder >= 0 and routing.family_of_encoder[encoder] == f
                if own:
                    assert int(family.clip[p]) == clip
                    assert routing.members(f)[int(family.encoder[p])] == encoder
                for level, frames in zip(family.levels, routing.levels(f), strict=True):
                    assert int(level.lengths[p]) == (frames[clip] if own else 0)


@ROUTINGS
def test_what_the_host_knows(routing, monkeypatch):
    plan = routing.plan()
    pairs = routing.batch * routing.slots
    assert plan.order.shape == plan.encoder.shape == (pairs,)
    assert sorted(plan.order.tolist()) == list(range(pairs))
    for f in range(len(routing.num_levels)):
        exact = plan.family(f)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)  # then, as on a GPU, offsets cannot be read
            bounded = plan.family(f)
        for level, bound in zip(exact.levels, bounded.levels, strict=True):
            assert level.num_rows == int(level.cu_seqlens[-1]) <= bound.num_rows
            assert bound.max_seqlen >= level.max_seqlen >= int(level.lengths.max())
            assert level.cu_seqlens.dtype == level.group_offsets.dtype == torch.int32
        assert exact.rows is exact.levels[-1]
        assert exact.clip.dtype == exact.encoder.dtype == plan.position.dtype == torch.int32


@ROUTINGS
def test_rows_that_only_the_device_counts_come_in_steps(routing):
    plan = routing.plan()
    tensors = {f.name: getattr(plan, f.name) for f in fields(plan)}
    elsewhere = replace(plan, **{name: t.to("meta") for name, t in tensors.items() if isinstance(t, torch.Tensor)})
    for f in range(len(routing.num_levels)):
        most = min(routing.slots, len(routing.members(f)))
        for level, frames in zip(elsewhere.family(f).levels, routing.levels(f), strict=True):
            if level.equal_lengths:
                assert level.num_rows == most * sum(frames)
            else:
                assert level.num_rows % ROWS_AT_ONCE == 0 <= level.num_rows - most * sum(frames) < ROWS_AT_ONCE
            assert not (level.equal_lengths and routing.batch == 1)


@ROUTINGS
def test_plans_of_single_encoders_cover_the_family(routing):
    plan = routing.plan()
    for f in range(len(routing.num_levels)):
        parts = list(plan.family(f).by_encoder())
        used = sorted({e for e, _ in routing.pairs(f)})
        assert [part.encoder.unique().tolist() for part in parts] == [[e] for e in used]
        for level in range(routing.num_levels[f]):
            assert [row for part in parts for row in rows_of(part, level)] == by_hand(routing, f, level)
            for part in parts:
                at = part.levels[level]
                assert at.num_rows == int(at.cu_seqlens[-1]) == int(at.group_offsets[-1])
                assert at.group_offsets.diff()[int(part.encoder[0])] == at.num_rows


def test_rows_of_a_clip_do_not_depend_on_the_rest_of_the_batch():
    layout = PackLayout.build([0, 1, 0], [2, 1])
    lengths = [[4, 8, 6], [2, 4, 3], [5, 7, 9]]
    whole = PackPlan.build(torch.tensor([[0, 1], [2, 0], [1, 2]]), lengths, layout)
    alone = PackPlan.build(torch.tensor([[2, 0]]), [[n[1]] for n in lengths], layout)
    for f in range(2):
        of_clip = [row for row in rows_of(whole.family(f), -1) if row[1] == 1]
        assert [(e, 0, t) for e, _, t in of_clip] == rows_of(alone.family(f), -1)


def test_layout_is_family_major():
    layout = PackLayout.build([1, 0, 1, 0, 0], [2, 1])
    assert layout.rank.tolist() == [3, 0, 4, 1, 2]
    assert layout.level_bounds.tolist() == [[0, 3], [0, 3], [3, 5]]
    assert (layout.num_encoders, layout.num_levels) == ((3, 2), (2, 1))


def test_a_family_without_encoders():
    plan = PackPlan.build(torch.tensor([[0]]), [[4], [6]], PackLayout.build([1], [1, 1]))
    assert plan.family(0).rows.num_rows == 0
    assert plan.family(0).rows.group_offsets.tolist() == [0]
    assert plan.family(1).rows.num_rows == 6


def test_an_empty_batch():
    plan = PackPlan.build(torch.empty(0, 2, dtype=torch.int64), [[]], PackLayout.build([0, 0], [1]))
    assert plan.family(0).rows.num_rows == 0
    assert list(plan.family(0).by_encoder()) == []


def test_says_what_does_not_fit():
    layout = PackLayout.build([0, 0], [2])
    with raises("lengths", "[any, 2]", "got [2, 3]"):
        PackPlan.build(torch.tensor([[0], [1]]), [[1, 2, 3], [1, 2, 3]], layout)
    with raises("level_bounds", "[1, 2]", "got [2, 2]"):
        PackPlan.build(torch.tensor([[0], [1]]), [[1, 2]], layout)


@pytest.mark.parametrize(
    ("families", "lengths", "equal"),
    [([0, 0], [5, 5], True), ([0, 0], [5, 4], False), ([0, 1], [5, 5], False), ([0, 0], [0, 0], True)],
)
def test_lengths_known_to_be_equal(families, lengths, equal):
    """In a pool of one family alone: in one of several most pairs of each are absent."""
    levels = [1] * (max(families) + 1)
    layout = PackLayout.build(families, levels)
    plan = PackPlan.build(torch.tensor([[0, 1], [1, -1]]), [lengths] * len(levels), layout)
    assert plan.family(0).rows.equal_lengths == equal
    assert all(part.rows.equal_lengths == equal for part in plan.family(0).by_encoder())
