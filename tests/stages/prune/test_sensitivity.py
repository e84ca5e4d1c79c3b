"""The integer programme and the whole choice against brute force; curves against single cuts; targets; kills."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.stages import knapsack
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.knapsack import choose
from mil_cli.stages.prune import sensitivity as method
from mil_cli.stages.prune.searching import Search
from mil_cli.stages.prune.sensitivity import (
    SensitivityConfig,
    choose_structure,
    measured_curves,
    sensitivity,
    total,
)
from mil_cli.stages.prune.structures import Structures
from tests.stages.contexts import Kill
from tests.stages.prune import blocks


@pytest.fixture(scope="module")
def model() -> Model:
    return blocks.trained()


def config(**changes: Any) -> SensitivityConfig:
    return SensitivityConfig.model_validate(blocks.settings(**{"points": 3, **changes}))


@pytest.mark.parametrize("seed", range(20))
def test_the_programme_finds_what_brute_force_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = [*random.integers(2, 5, 4).tolist(), 2, 2]
    losses = [np.array([0.0, *random.random(size - 1)]) for size in sizes]
    savings = [np.array([0.0, *random.random(size - 1)]) for size in sizes]
    losses[0][1] = math.inf
    limits = [([4, 5], 1)]
    needed = 0.5 * sum(float(axis.max()) for axis in savings)
    allowed = [
        one
        for one in itertools.product(*(range(size) for size in sizes))
        if one[4] + one[5] <= 1 and sum(s[c] for s, c in zip(savings, one, strict=True)) >= needed
    ]
    least = min(sum(axis[c] for axis, c in zip(losses, one, strict=True)) for one in allowed)
    found = choose(losses, savings, needed, limits)
    assert found in allowed
    assert sum(axis[c] for axis, c in zip(losses, found, strict=True)) == pytest.approx(least)


def test_a_programme_that_would_take_for_ever_ends_with_a_choice_that_saves_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses that equal savings of eight digits: every choice near the bound must be told from millions of others."""
    monkeypatch.setattr(knapsack, "_MOST_NODES", 300)
    random = np.random.default_rng(0)
    numbers = random.integers(10**7, 10**8, 60).astype(float)
    axes = [np.array([0.0, number]) for number in numbers]
    needed = float(numbers.sum() / 2 + 0.3)
    began = time.process_time()
    found = choose(axes, axes, needed)
    assert time.process_time() - began < 10
    assert found is not None
    assert sum(axis[choice] for axis, choice in zip(axes, found, strict=True)) >= needed * (1 - 1e-6)


def test_the_programme_says_when_nothing_saves_enough() -> None:
    assert choose([np.array([0.0, 1.0])], [np.array([0.0, 2.0])], 2.5) is None
    assert choose([np.array([0.0, math.inf])], [np.array([0.0, 2.0])], 1.0) is None


def every(structures: Structures) -> list[tuple[int, ...]]:
    choices = itertools.product(*(range(most + 1) for most in structures.last))
    return [one for one in choices if structures.allows(one)]


def test_the_choice_is_near_the_best_of_all_structures(model: Model) -> None:
    """Over all 4 x 6 x 3 x ... structures with their true costs, for curves drawn at random."""
    settings = config(macs=0.9, max_per_layer=0.7)
    structures = Search(model, settings, blocks.context(), {}).structures(model)
    costs = {one: structures.cost(one) for one in every(structures)}
    assert len(costs) > 1000
    whole = structures.cost(structures.whole)
    gaps = []
    for seed, kept in itertools.product(range(6), (0.7, 0.45)):
        random = np.random.default_rng(seed)
        curves = [np.concatenate([[0.0], np.cumsum(random.random(most))]) for most in structures.last]
        best = min(total(curves, one) for one, cost in costs.items() if cost <= kept * whole)
        found = choose_structure(structures, curves, kept * whole)
        assert costs[found] <= kept * whole
        gaps.append(total(curves, found) / best)
    assert min(gaps) >= 1 - 1e-9
    assert sum(gap < 1 + 1e-9 for gap in gaps) >= len(gaps) / 2
    assert max(gaps) < 1.15, gaps


def test_curves_are_the_losses_of_single_cuts(model: Model) -> None:
    settings, around = config(macs=0.5, points=100), blocks.context()
    search = Search(model, settings, around, {})
    structures = search.structures(search.model)
    losses: list[float] = []
    saved: list[int] = []
    curves = measured_curves(structures, search, settings, around, losses, lambda: saved.append(len(losses)))
    assert saved == list(range(1, 2 + sum(structures.last)))

    def loss(candidate: tuple[int, ...]) -> float:
        cut, values = search.fresh(structures, candidate), []
        for batch in around.data.val.batches(64, shuffle=True, seed=0):
            args, _ = around.task.inputs(batch)
            with torch.no_grad():
                values.append(nn.functional.cross_entropy(cut(*args), batch[1], reduction="none"))
        return float(torch.cat(values)[:256].mean())

    whole = mean_loss(search.fresh(structures, structures.whole), around, samples=256)
    assert whole == pytest.approx(loss(structures.whole), rel=1e-4)
    for place, most in enumerate(structures.last):
        measured = [0.0]
        for choice in range(1, most + 1):
            number = 1 + sum(structures.last[:place]) + choice - 1
            measured.append(losses[number] - losses[0])
        np.testing.assert_allclose(curves[place], np.maximum.accumulate(measured), atol=1e-9)


def test_between_the_points_a_curve_is_interpolated(model: Model) -> None:
    settings, around = config(macs=0.5, points=1), blocks.context()
    search = Search(model, settings, around, {})
    structures = search.structures(search.model)
    losses: list[float] = []
    curves = measured_curves(structures, search, settings, around, losses, lambda: None)
    assert len(losses) == 1 + len(structures.last)
    for curve in curves:
        np.testing.assert_allclose(curve, np.linspace(0, curve[-1], len(curve)), atol=1e-12)


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_the_target_is_met_and_used(model: Model, quantity: str) -> None:
    around = blocks.context()
    result = sensitivity(model, config(**{quantity: 0.5}), around)
    left, whole = (result.macs(), model.macs()) if quantity == "macs" else (result.num_params(), model.num_params())
    assert 0.4 * whole < left <= 0.5 * whole
    assert around.notes["left"] == left
    assert around.notes["check"]["difference"] < 1e-5  # type: ignore[index]


def test_a_target_that_keeps_all_changes_nothing(model: Model) -> None:
    same = sensitivity(model, config(macs=1.0, points=1), blocks.context())
    assert same.fingerprint() == model.fingerprint()


def test_what_cannot_be_is_told(model: Model) -> None:
    with pytest.raises(
        StageError, match=r"the smallest that can be kept of [\d,]+ macs is .*max_per_chain 0.5"
    ) as caught:
        sensitivity(model, config(macs=0.01, max_per_chain=0.5), blocks.context())
    assert caught.value.where == "stages.prune.macs"
    with pytest.raises(ValueError, match="give exactly one of macs, params, latency and memory"):
        config()


@pytest.mark.parametrize("kill_at", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_killed_run_goes_on_to_the_same_weights(
    kill_at: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(macs=0.5, recover="recover")
    around = blocks.context()
    whole = sensitivity(model, settings, around)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == kill_at + 1:
            raise Kill
        return mean_loss(*args, **kwargs)

    monkeypatch.setattr(method, "mean_loss", dying)
    with pytest.raises(Kill):
        sensitivity(model, settings, blocks.context(tmp_path))
    again = blocks.context(tmp_path)
    resumed = sensitivity(model, settings, again)
    assert resumed.fingerprint() == whole.fingerprint()
    assert again.notes["curves"] == around.notes["curves"]
