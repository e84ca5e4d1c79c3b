"""Figures of a ranking: against scipy, a brute force over pairs, and what chance gives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mil_cli.assess.ranking import (
    difference,
    interval,
    noise_ceiling,
    pooled_tau,
    precision_at,
    regret,
    tau_b,
    top_tau,
)


def counted_tau(scores: list[float], truth: list[float]) -> float:
    """Return tau-b by the definition: (C - D) / sqrt((n0 - n1) (n0 - n2))."""
    agreeing = disagreeing = ties = other_ties = pairs = 0
    for (a, x), (b, y) in itertools.combinations(list(zip(scores, truth, strict=True)), 2):
        pairs += 1
        ties += a == b
        other_ties += x == y
        agreeing += (a - b) * (x - y) > 0
        disagreeing += (a - b) * (x - y) < 0
    return (agreeing - disagreeing) / math.sqrt((pairs - ties) * (pairs - other_ties))


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_scipys_and_that_of_counted_pairs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, truth = generator.integers(6, size=(2, 20)).astype(float)  # many ties
    assert tau_b(scores, truth) == pytest.approx(stats.kendalltau(scores, truth).statistic)
    assert tau_b(scores, truth) == pytest.approx(counted_tau([*scores], [*truth]))


def test_what_is_no_number_comes_last_and_what_is_infinite_counts() -> None:
    truth = [4.0, 3.0, 2.0, 1.0]
    assert tau_b([3.0, 2.0, 1.0, math.nan], truth) == tau_b([math.inf, 2.0, 1.0, math.nan], truth) == 1
    assert tau_b([math.nan, 3.0, 2.0, 1.0], truth) == counted_tau([-9.0, 3.0, 2.0, 1.0], truth) == 0
    assert tau_b([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, math.nan]) == 0


def test_the_best_are_ranked_among_themselves() -> None:
    truth = np.arange(40.0)
    scores = truth.copy()
    scores[-4:] = scores[-4:][::-1]
    assert tau_b(scores, truth) > 0.9
    assert top_tau(scores, truth) == -1
    assert top_tau(truth, truth, share=0.01) == 1  # two at least


def test_pairs_of_different_groups_do_not_count() -> None:
    generator = np.random.default_rng(0)
    scores, truth = generator.integers(5, size=(2, 24)).astype(float)
    groups = np.repeat([0, 1, 2], 8)
    agreeing = decided = other_decided = 0.0
    for first, second in itertools.combinations(range(24), 2):
        if groups[first] == groups[second]:
            signs = np.sign(scores[first] - scores[second]), np.sign(truth[first] - truth[second])
            agreeing += signs[0] * signs[1]
            decided, other_decided = decided + abs(signs[0]), other_decided + abs(signs[1])
    assert pooled_tau(scores, truth, groups) == pytest.approx(agreeing / math.sqrt(decided * other_decided))
    assert pooled_tau(scores, truth, np.zeros(24)) == pytest.approx(tau_b(scores, truth))
    assert pooled_tau(truth + 10 * groups, truth, groups) == 1
    assert math.isnan(pooled_tau(scores, truth, np.arange(24)))


def test_precision_is_that_of_ties_broken_at_random() -> None:
    generator = np.random.default_rng(0)
    truth = generator.permutation(12).astype(float)
    scores = generator.integers(3, size=12).astype(float)
    best = {*np.argsort(-truth)[:4]}
    drawn = [len(best & {*np.lexsort((generator.random(12), -scores))[:4]}) / 4 for _ in range(4000)]
    assert precision_at(scores, truth, 4) == pytest.approx(np.mean(drawn), abs=0.02)
    assert precision_at(truth, truth, 4) == 1
    assert precision_at(scores, truth, 50) == 1


def test_regret_is_what_the_choice_misses() -> None:
    truth = [0.8, 0.9, 0.7, math.nan]
    assert regret([1.0, 2.0, 3.0, 4.0], truth) == pytest.approx(0.2)
    assert regret([3.0, 3.0, 1.0, 1.0], truth) == pytest.approx(0.05)
    assert regret([math.nan, 1.0, 0.0, 0.0], truth) == 0


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Scores are the truth and noise of the same size: tau of two normals of correlation r is 2 / pi * asin(r)."""
    generator = np.random.default_rng(0)
    real = 2 / math.pi * math.asin(math.sqrt(0.5))
    held = 0
    for number in range(40):
        truth = generator.normal(size=60)
        found = interval(tau_b, truth + generator.normal(size=60), truth, seed=number, draws=200)
        assert found.low < found.value < found.high
        held += found.low <= real <= found.high
    assert held >= 34  # of 38 expected


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    generator = np.random.default_rng(0)
    truth = generator.normal(size=80)
    scores = truth + generator.normal(size=80)
    worse = scores + 0.4 * generator.normal(size=80)
    paired = difference(tau_b, scores, worse, truth, seed=0, draws=500)
    alone = [interval(tau_b, each, truth, seed=0, draws=500) for each in (scores, worse)]
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    assert paired.high - paired.low < 0.7 * sum(each.high - each.low for each in alone)
    assert difference(tau_b, scores, scores, truth, seed=0, draws=50).high == 0


def test_the_ceiling_is_what_noise_leaves() -> None:
    generator = np.random.default_rng(0)
    quality = generator.normal(size=2000)
    seeds = quality[:, None] + generator.normal(size=(2000, 3))
    assert noise_ceiling(seeds) == pytest.approx(2 / math.pi * math.asin(0.5), abs=0.03)
    assert noise_ceiling(np.tile(quality[:, None], 2)) == pytest.approx(1)
    with pytest.raises(ValueError, match="two seeds"):
        noise_ceiling(quality[:, None])
