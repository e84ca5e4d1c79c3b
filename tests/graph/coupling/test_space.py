"""Labels through views and links, against brute force on the positions themselves."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from mil_cli.graph.coupling.record import Recording
from mil_cli.graph.coupling.relations.views import aligned_groups
from mil_cli.graph.coupling.space import Propagation, Seed, SplitByView
from mil_cli.graph.coupling.table import Effect, Link, Mark, Regroup, RelationTable


def table(shapes: dict[str, tuple[int, ...]]) -> RelationTable:
    return RelationTable(Recording(torch.fx.symbolic_trace(nn.Identity())), shapes)


def random_shape(size: int, generator: random.Random) -> tuple[int, ...]:
    shape = []
    while size > 1:
        divisors = [d for d in range(2, size + 1) if size % d == 0]
        shape.append(generator.choice(divisors))
        size //= shape[-1]
    for _ in range(generator.randrange(3)):
        shape.insert(generator.randrange(len(shape) + 1), 1)
    return tuple(shape) or (1,)


@pytest.mark.parametrize("seed", range(40))
def test_aligned_groups_hold_the_same_positions_and_are_the_smallest(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([12, 24, 36, 60, 210])
    a, b = random_shape(size, generator), random_shape(size, generator)
    groups = aligned_groups(a, b)
    for a_axes, b_axes in groups:
        product = math.prod(a[axis] for axis in a_axes)
        assert product == math.prod(b[axis] for axis in b_axes)
        inner_a = {math.prod(a[axis] for axis in a_axes[:cut]) for cut in range(1, len(a_axes))} - {1, product}
        inner_b = {math.prod(b[axis] for axis in b_axes[:cut]) for cut in range(1, len(b_axes))} - {1, product}
        assert not inner_a & inner_b, "the group could be divided"
    covered = [axis for a_axes, _ in groups for axis in a_axes]
    assert [axis for axis in range(len(a)) if a[axis] > 1 and axis not in covered] == []


@pytest.mark.parametrize("seed", range(60))
def test_what_a_view_carries_is_the_same_set_of_positions(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([12, 24, 36, 60])
    a, b = random_shape(size, generator), random_shape(size, generator)
    relations = table({"a": a, "b": b})
    for a_axes, b_axes in aligned_groups(a, b):
        relations.add(Regroup("a", a_axes, "b", b_axes))
    axis = max(range(len(a)), key=lambda axis: a[axis])
    seeds = [Seed("a", axis, np.arange(a[axis]))]
    checked = 0
    while seeds and checked < 20:
        seed_now = seeds.pop()
        checked += 1
        propagation = Propagation(relations)
        try:
            propagation.run(seed_now)
        except SplitByView as split:
            seeds.extend(split.alternatives)
            continue
        if propagation.frozen:
            continue
        classes = {int(c) for axes in propagation.labels.values() for v in axes.values() for c in v} - {-1}
        for label in classes:
            kept = {}
            for key, shape in (("a", a), ("b", b)):
                mask = np.ones(shape, dtype=bool)
                for along, labels in propagation.labels[key].items():
                    mask &= np.moveaxis(
                        np.broadcast_to(labels != label, (*shape[:along], *shape[along + 1 :], shape[along])), -1, along
                    )
                kept[key] = mask.reshape(-1)
            assert (kept["a"] == kept["b"]).all(), (a, b, label)


def test_many_to_one_links_unite_labels() -> None:
    relations = table({"heads": (6,), "keys": (2,)})
    heads = np.arange(6)
    relations.add(Link("heads", 0, "keys", 0, heads, heads // 3))
    propagation = Propagation(relations)
    propagation.run(Seed("heads", 0, np.arange(6)))
    assert propagation.labels["heads"][0].tolist() == [0, 0, 0, 1, 1, 1]
    assert propagation.labels["keys"][0].tolist() == [0, 1]


def test_freezing_is_per_class_and_follows_later_unions() -> None:
    relations = table({"a": (4,), "b": (4,)})
    node = next(iter(relations.recording.graph.graph.nodes))
    relations.add(Mark("a", 0, Effect.FREEZE, node, "because", np.array([1])))
    relations.add(Link("a", 0, "b", 0, np.array([0, 1]), np.array([2, 2])))
    propagation = Propagation(relations)
    propagation.run(Seed("a", 0, np.arange(4)))
    assert propagation.labels["a"][0].tolist() == [0, 0, 1, 2]
    assert list(propagation.frozen) == [0]
    assert propagation.frozen[0].text == "because"


def test_partial_labels_leave_the_rest_alone() -> None:
    relations = table({"part": (3,), "whole": (7,)})
    relations.add(Link("part", 0, "whole", 0, np.arange(3), np.arange(2, 5)))
    propagation = Propagation(relations)
    propagation.run(Seed("part", 0, np.arange(3)))
    assert propagation.labels["whole"][0].tolist() == [-1, -1, 0, 1, 2, -1, -1]
