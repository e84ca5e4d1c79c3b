"""Candidates fitted to a bound: within it, and as wide or as near as it allows, against all neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch

from mil_cli.stages.breeding import Candidate, with_choice
from mil_cli.stages.fitting import Fitting


class Three:
    """Three axes, of which the last two may not both be at their narrowest."""

    last = (4, 3, 2)
    smallest = (4, 2, 2)

    def allows(self, candidate: Candidate) -> bool:
        return candidate[1] + candidate[2] <= 4

    def canonical(self, candidate: Candidate) -> Candidate:
        return candidate


def cost(candidate: Candidate) -> float:
    first, second, third = candidate
    return (5 - first) * (4 - second) + 7 * (3 - third)


EVERY = [one for one in itertools.product(*(range(most + 1) for most in Three.last)) if Three().allows(one)]


@pytest.mark.parametrize("bound", [9.0, 15.0, 24.0, 41.0])
def test_what_is_fitted_is_within_the_bound_and_no_step_more_is(bound: float) -> None:
    space = Three()
    fitting = Fitting(space, cost, bound)
    for number, candidate in enumerate(EVERY):
        found = fitting.fitted(candidate, torch.Generator().manual_seed(number))
        assert space.allows(found)
        assert cost(found) <= bound
        if cost(candidate) <= bound:
            assert all(new <= old for new, old in zip(found, candidate, strict=True))
        wider = [with_choice(found, place, choice - 1) for place, choice in enumerate(found) if choice]
        assert all(cost(one) > bound for one in wider)


@pytest.mark.parametrize("bound", [9.0, 15.0, 24.0, 41.0])
def test_what_is_shrunk_is_within_the_bound_and_a_step_back_is_not(bound: float) -> None:
    space = Three()
    fitting = Fitting(space, cost, bound)
    for number, candidate in enumerate(EVERY):
        found = fitting.shrunk(candidate, torch.Generator().manual_seed(number))
        assert space.allows(found)
        assert cost(found) <= bound
        if found not in (candidate, space.smallest):
            assert all(new >= old for new, old in zip(found, candidate, strict=True))
            nearer = [with_choice(found, p, new - 1) for p, new in enumerate(found) if new > candidate[p]]
            assert any(cost(one) > bound for one in nearer)


def test_where_no_narrower_candidate_fits_the_smallest_is_given() -> None:
    assert Fitting(Three(), cost, 1.0).fitted((0, 0, 0), torch.Generator()) == Three.smallest
