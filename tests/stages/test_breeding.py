"""Evolution on a space whose best candidate is known by brute force; bounds, order, and going on after a kill."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
import torch

from mil_cli.stages.breeding import Candidate, Scored, evolve, from_state, ranked, to_state
from mil_cli.stages.nas.space import ElasticSpace, Width
from tests.stages.contexts import Kill

AXES, CHOICES = 7, 5
GAINS = torch.rand(AXES, generator=torch.Generator().manual_seed(1)).tolist()


class Plain(ElasticSpace):
    """Axes without a model: no two candidates are the same net."""

    def canonical(self, candidate: Candidate) -> Candidate:
        return candidate


SPACE = Plain(
    coupling=None,  # type: ignore[arg-type]
    widths=tuple(Width(f"axis {axis}", axis, tuple(range(CHOICES, 0, -1))) for axis in range(AXES)),
    depths=(),
)


def cost(candidate: Candidate) -> float:
    return sum((CHOICES - choice) * (1 + axis % 3) for axis, choice in enumerate(candidate))


def quality(candidate: Candidate) -> float:
    """Each axis adds what it is worth, less and less."""
    return sum(gain * (CHOICES - choice) ** 0.5 for gain, choice in zip(GAINS, candidate, strict=True))


BOUND = 0.5 * cost(SPACE.largest)
ALL = [candidate for candidate in itertools.product(range(CHOICES), repeat=AXES) if cost(candidate) <= BOUND]
BEST = max(quality(candidate) for candidate in ALL)


def generator(seed: int) -> Any:
    def make(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1000 + int(purpose.split()[-1]))

    return make


def search(evaluations: int = 200, **settings: Any) -> list[Scored]:
    chosen: dict[str, Any] = {
        "cost": cost,
        "bound": BOUND,
        "score": quality,
        "higher_is_better": True,
        "evaluations": evaluations,
        "population": 20,
        "generator": generator(0),
        **settings,
    }
    return evolve(SPACE, **chosen)


def test_it_comes_close_to_the_best_there_is_and_beats_random_draws() -> None:
    found, drawn = [], []
    for seed in range(5):
        found.append(search(generator=generator(seed))[0].quality)
        picked = torch.randperm(len(ALL), generator=torch.Generator().manual_seed(seed))[:200].tolist()
        drawn.append(max(quality(ALL[place]) for place in picked))
    assert statistics.mean(found) > 0.99 * BEST
    assert statistics.mean(found) > statistics.mean(drawn)


def test_every_candidate_is_new_and_within_the_bound() -> None:
    scored = search(generator=generator(0))
    assert len(scored) == len({entry.candidate for entry in scored}) == 200
    assert all(entry.cost == cost(entry.candidate) <= BOUND for entry in scored)
    assert [entry.quality for entry in scored] == sorted((entry.quality for entry in scored), reverse=True)


def test_of_equal_quality_the_cheaper_is_first() -> None:
    entries = [Scored((0,), 0.5, 3.0), Scored((1,), 0.5, 2.0), Scored((2,), 0.7, 9.0)]
    assert [entry.candidate for entry in ranked(entries, higher_is_better=True)] == [(2,), (1,), (0,)]
    assert [entry.candidate for entry in ranked(entries, higher_is_better=False)] == [(1,), (0,), (2,)]


def test_a_lower_metric_can_be_the_better_one() -> None:
    low = search(generator=generator(0), score=lambda candidate: -quality(candidate), higher_is_better=False)
    high = search(generator=generator(0))
    assert [entry.candidate for entry in low] == [entry.candidate for entry in high]


@pytest.mark.parametrize("kill_at", [1, 19, 20, 33, 110])
def test_going_on_after_a_kill_ends_alike(kill_at: int) -> None:
    kept: list[Any] = []
    calls = 0

    def failing(candidate: Candidate) -> float:
        nonlocal calls
        calls += 1
        if calls == kill_at + 1:
            raise Kill
        return quality(candidate)

    def keep(scored: list[Scored]) -> None:
        kept[:] = to_state(scored)

    with pytest.raises(Kill):
        search(generator=generator(3), score=failing, on_scored=keep, evaluations=120)
    assert len(kept) == kill_at
    scores = []

    def counted(candidate: Candidate) -> float:
        scores.append(candidate)
        return quality(candidate)

    resumed = search(generator=generator(3), score=counted, known=from_state(kept), evaluations=120)
    assert resumed == search(generator=generator(3), evaluations=120)
    assert len(scores) == 120 - kill_at


def test_a_bound_that_only_the_smallest_meets() -> None:
    scored = search(generator=generator(0), bound=cost(SPACE.smallest), evaluations=50)
    assert [entry.candidate for entry in scored] == [SPACE.smallest]


def test_nothing_within_the_bound_gives_nothing() -> None:
    assert search(generator=generator(0), bound=1.0, evaluations=10) == []
