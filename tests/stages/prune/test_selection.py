"""Choosing chunks: multiples, order, bounds, and how close to the target the choice lands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mil_cli.graph.coupling import Counter, Coupling, Space, analyse, step_of
from mil_cli.graph.coupling.coupling import Member
from mil_cli.graph.model import Model
from mil_cli.stages.prune.selection import chunks_of, describe_widths, least_classes, select


def space(size: int, *, width: int | None = None, frozen: tuple[int, ...] = ()) -> Space:
    width = size if width is None else width
    member = Member("weight", ("weight",), 0, np.arange(width) // (width // size), trainable=True)
    return Space("weight", size, {}, (member,), dict.fromkeys(frozen, "because"), {})


@pytest.fixture(scope="module")
def coupling() -> Coupling:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 20, 3),
        nn.ReLU(),
        nn.Conv2d(20, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 24),
        nn.Linear(24, 5),
    )
    return analyse(Model.capture(module.eval(), (torch.randn(2, 3, 8, 8),)))


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_of_chunks_leaves_a_multiple(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size, step = int(generator.integers(2, 60)), int(generator.choice([1, 2, 8, 16]))
    frozen = tuple(generator.choice(size, int(generator.integers(0, max(1, size // 3))), replace=False).tolist())
    least = int(generator.integers(1, size + 1))
    scores = generator.random(size)
    chunks = chunks_of(7, space(size, frozen=frozen), scores, step=step, least=least)
    kept, removed = size, set()
    for position, chunk in enumerate(chunks):
        assert (chunk.space, chunk.position) == (7, position)
        kept -= len(chunk.classes)
        removed |= set(chunk.classes)
        assert kept % step == 0
        assert kept >= max(least, len(frozen), 1)
    assert not removed & set(frozen)
    assert len(removed) == size - kept
    spared = set(range(size)) - removed - set(frozen)
    assert all(scores[gone] <= scores[stays] for gone in removed for stays in spared)
    assert [chunk.score for chunk in chunks] == sorted(chunk.score for chunk in chunks)
    following = [width for width in range(kept - 1, max(least, len(frozen), 1) - 1, -1) if width % step == 0]
    assert not following, "a further width on the multiple was possible"


def test_classes_that_hold_many_entries_go_in_smaller_steps() -> None:
    assert step_of(space(64), 8) == 8
    assert step_of(space(12, width=768), 16) == 1  # heads of 64
    assert step_of(space(64, width=256), 16) == 4  # the same index in four heads
    assert step_of(space(10, width=30), 8) == 8


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_just_under_the_target(coupling: Coupling, seed: int, multiple: int) -> None:
    generator = np.random.default_rng(seed)
    scores = [generator.random(space.size) + 0.5 for space in coupling.spaces]
    counter = Counter(coupling)
    target = float(generator.uniform(0.2, 0.9)) * counter.macs({})
    chosen = select(coupling, scores, target=target, measure=counter.macs, multiple=multiple, least={})
    assert chosen.reached
    assert chosen.left == counter.macs(chosen.removed) <= target
    for number, classes in chosen.removed.items():
        found = coupling.spaces[number]
        assert (found.size - len(classes)) % multiple == 0
        order = sorted(found.free, key=lambda label: scores[number][label])
        assert classes == set(order[: len(classes)]), "the least important of a space go"
        # giving back the last chunk of any space would miss the target
        widths = [w for w in range(found.size) if w % multiple == 0 and w > found.size - len(classes)] + [found.size]
        smaller = {**chosen.removed, number: set(order[: found.size - widths[0]])}
        assert counter.macs(smaller) > target


def test_what_cannot_be_reached_is_said(coupling: Coupling) -> None:
    scores = [np.ones(space.size) for space in coupling.spaces]
    counter = Counter(coupling)
    least = {number: space.size // 2 for number, space in enumerate(coupling.spaces)}
    chosen = select(coupling, scores, target=1.0, measure=counter.macs, multiple=1, least=least)
    assert not chosen.reached
    assert all(len(classes) == coupling.spaces[number].size // 2 for number, classes in chosen.removed.items())


def test_the_bound_counts_from_the_first_width(coupling: Coupling) -> None:
    shapes = {member.parameter: [64] * 4 for space in coupling.spaces for member in space.members}
    assert least_classes(coupling, shapes, max_per_layer=0.75)[0] == 16


def test_widths_are_described() -> None:
    before, after = {"w": (8, 4), "b": (8,), "v": (3, 3)}, {"w": (6, 4), "b": (6,), "v": (3, 3)}
    assert describe_widths(before, after) == [{"parameter": "w", "before": [8, 4], "after": [6, 4]}]
