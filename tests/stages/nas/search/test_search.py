"""All strategies on a space whose best is known: bounds, duplicates, kills, several processes, several goals."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from mil_cli.assess.active import Acquisition
from mil_cli.data.digits import digits
from mil_cli.errors import MilError, StageError
from mil_cli.models.small_nets import small_nets
from mil_cli.spaces import CostCounter, DesignedSpace
from mil_cli.stages.context import Context
from mil_cli.stages.nas.search import driver
from mil_cli.stages.nas.search.bayesian import Bayesian
from mil_cli.stages.nas.search.bounds import Bound, Bounds
from mil_cli.stages.nas.search.driver import Found, search
from mil_cli.stages.nas.search.evolution import Evolution
from mil_cli.stages.nas.search.halving import Halving
from mil_cli.stages.nas.search.nsga2 import NSGA2, objectives, standings
from mil_cli.stages.nas.search.pareto import crowding, fronts
from mil_cli.stages.nas.search.random import Random
from mil_cli.stages.nas.search.registry import SEARCHES, Search
from mil_cli.stages.nas.search.strategy import SearchConfig
from mil_cli.stages.nas.search.trial import Trial, ranked, worth_of
from tests.stages.contexts import Kill, make_context
from tests.stages.nas.search.landscapes import SPACE, Candidate, best, bounds, everything, macs, params, quality

CONFIGS: dict[str, SearchConfig] = {
    "random": Random(evaluations=60),
    "evolution": Evolution(evaluations=60, population=16, tournament=5, batch=4),
    "nsga2": NSGA2(evaluations=60, population=16),
    "bayesian": Bayesian(evaluations=60, start=16, pool=40, acquisition=Acquisition(strategy="thompson", batch=6)),
    "halving": Halving(evaluations=20),
    "asha": Halving(evaluations=20, asynchronous=True, batch=4),
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def context(workspace: Path | None = None, seed: int = 0) -> Context:
    return make_context(digits(), name="nas", workspace=workspace, seed=seed)


def run(config: SearchConfig, used: Context | None = None, **changes: Any) -> Found[Candidate]:
    settings: dict[str, Any] = {"bounds": bounds(), "score": quality, "context": used or context(), **changes}
    return search(SPACE, config, **settings)


def test_each_strategy_has_its_name() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Search)
    for name, kind in SEARCHES.items():
        assert type(adapter.validate_python({"strategy": name})) is kind
    with pytest.raises(ValidationError, match="strategy"):
        adapter.validate_python({"strategy": "luck"})
    with pytest.raises(ValidationError, match="evaluations"):
        adapter.validate_python({"strategy": "random", "evaluations": 0})


@EACH
def test_all_bounds_are_kept_no_net_is_scored_twice_and_the_budget_holds(name: str) -> None:
    both = bounds(0.7, most_params=26)
    assert both.within(SPACE.smallest)
    assert not both.within(SPACE.largest)
    found = run(CONFIGS[name], bounds=both)
    seen = [(SPACE.form(trial.candidate), trial.fidelity) for trial in found.trials]
    assert len(set(seen)) == len(seen)
    assert all(macs(trial.candidate) <= both.most["macs"] for trial in found.trials)
    assert all(trial.costs["params"] == params(trial.candidate) <= 26 for trial in found.trials)
    spent = sum(trial.fidelity for trial in found.trials)
    assert 0.9 * CONFIGS[name].evaluations < spent <= CONFIGS[name].evaluations + 1e-6
    assert found.best.quality == max(trial.quality for trial in found.trials if trial.fidelity == 1)


@pytest.mark.parametrize("name", ["evolution", "bayesian"])
def test_it_is_better_than_random_and_close_to_the_best(name: str) -> None:
    reached: dict[str, list[float]] = {"random": [], name: []}
    for seed in range(4):
        for each, values in reached.items():
            config = CONFIGS[each].model_copy(update={"evaluations": 120})
            values.append(run(config, context(seed=seed)).best.quality)
    assert np.mean(reached[name]) > np.mean(reached["random"])
    assert np.mean(reached[name]) > 0.95 * best(bounds().most["macs"])


@EACH
@pytest.mark.parametrize("kill_at", [1, 16, 17, 31])
def test_going_on_after_a_kill_ends_alike(name: str, kill_at: int, tmp_path: Path) -> None:
    calls = 0

    def failing(candidate: Candidate, fidelity: float) -> float:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise KeyboardInterrupt
        return quality(candidate, fidelity)

    with pytest.raises(KeyboardInterrupt):
        run(CONFIGS[name], context(tmp_path), score=failing)
    resumed = run(CONFIGS[name], context(tmp_path), score=failing)
    assert resumed == run(CONFIGS[name])
    assert calls == len(resumed.trials) + 1  # what was scored is not scored again


def test_what_a_kill_lost_is_scored_again_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, config, calls = iter(range(1000)), CONFIGS["evolution"], []

    def failing(candidate: Candidate, fidelity: float) -> float:
        calls.append(candidate)
        if len(calls) == 30:
            raise Kill
        return quality(candidate, fidelity)

    with monkeypatch.context() as patched:
        patched.setattr(driver._Running, "keep", _every_seventh(driver._Running.keep))
        with pytest.raises(Kill):
            run(config, context(tmp_path), score=failing, clock=lambda: float(next(clock)))
    assert run(config, context(tmp_path), score=failing) == run(config)
    assert len(calls) == 60 + 2  # the one that failed, and 29 = 4 * 7 + 1


def _every_seventh(keep: Callable[[Any], None]) -> Callable[[Any], None]:
    """Write a checkpoint after each seventh score alone, also at the end: a process that is killed writes none then."""

    def sometimes(running: Any) -> None:
        if running.trials and len(running.trials) % 7 == 0:
            keep(running)

    return sometimes


@pytest.mark.slow  # each process imports torch
@pytest.mark.parametrize("name", ["evolution", "asha"])
def test_several_processes_give_what_one_gives(name: str) -> None:
    parallel = CONFIGS[name].model_copy(update={"jobs": 2})
    assert run(parallel) == run(CONFIGS[name])


def test_a_lower_quality_can_be_the_better_one() -> None:
    class Lower:
        higher_is_better = False
        metric_name = "error"

        def fingerprint(self) -> str:
            return "lower"

    used = make_context(digits(), name="nas", task=Lower())
    low = run(CONFIGS["evolution"], used, score=lambda one, share: -quality(one, share))
    high = run(CONFIGS["evolution"])
    assert [trial.candidate for trial in low.trials] == [trial.candidate for trial in high.trials]


@EACH
def test_a_net_without_a_quality_is_the_worst_and_stops_nothing(name: str) -> None:

    def sometimes(candidate: Candidate, fidelity: float) -> float:
        return math.nan if candidate[0] == 1 else quality(candidate, fidelity)

    found = run(CONFIGS[name], score=sometimes)
    assert math.isfinite(found.best.quality)
    assert sum(not math.isfinite(trial.quality) for trial in found.trials) > 0
    with pytest.raises(StageError, match="finite"):
        run(CONFIGS[name], score=lambda one, share: math.inf)


def test_a_bound_that_only_the_smallest_meets_and_one_that_none_meets() -> None:
    least = macs(SPACE.smallest) / macs(SPACE.largest)
    for config in CONFIGS.values():
        found = run(config, bounds=bounds(least))
        assert {trial.candidate for trial in found.trials} == {SPACE.smallest}
    with pytest.raises(StageError, match="smallest one has macs 13 of 11") as caught:
        run(CONFIGS["random"], bounds=Bounds([Bound("macs", macs, 11.0)]))
    assert caught.value.where == "stages.nas.search"


def test_a_space_that_is_used_up_ends_the_search() -> None:
    small = Bounds([Bound("macs", macs, 16.0)])
    there = sum(macs <= 16 for _, macs in everything().values())
    for name in ("random", "evolution", "nsga2", "bayesian"):
        found = run(CONFIGS[name].model_copy(update={"evaluations": 300}), bounds=small)
        assert 0.7 * there < len(found.trials) <= there < 300


def test_what_is_given_first_is_scored_first() -> None:
    given = [SPACE.largest, SPACE.smallest]
    for config in CONFIGS.values():
        found = run(config, first=given)
        order = sorted(found.trials, key=lambda trial: trial.batch)
        scored = {trial.candidate for trial in order if trial.batch == 0}
        assert SPACE.smallest in scored
        assert SPACE.largest not in {trial.candidate for trial in order}


def test_time_can_be_the_budget() -> None:
    now = iter(range(1000))
    config = Evolution(evaluations=500, minutes=0.5, population=4, batch=2)
    found = run(config, clock=lambda: float(next(now)))
    assert len(found.trials) == 30


def test_fronts_are_those_of_brute_force() -> None:
    points = np.random.default_rng(0).integers(0, 6, size=(60, 3)).astype(float)
    left = set(range(60))
    for front in fronts(points):
        expected = {
            row
            for row in left
            if not any((points[other] <= points[row]).all() and (points[other] < points[row]).any() for other in left)
        }
        assert set(front.tolist()) == expected
        left -= expected
    assert not left


def test_a_cheap_net_without_a_quality_is_on_no_front_and_does_not_breed() -> None:
    qualities = [math.nan, 0.5, 0.7, 0.6]
    trials = [
        Trial((cost,), 1.0, value, worth_of(value, higher_is_better=True), {"macs": float(cost)}, 0)
        for cost, value in enumerate(qualities)
    ]
    assert [trial.candidate for trial in Found(ranked(trials)).front()] == [(2,), (1,)]
    assert standings(objectives(trials, ["macs"]))[0] == 3


def test_crowding_is_the_distance_of_the_neighbours() -> None:
    points = np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [2.0, 1.0]])
    np.testing.assert_allclose(crowding(points), [np.inf, 2 / 4 + 3 / 4, np.inf, 3 / 4 + 2 / 4])
    assert np.isinf(crowding(np.array([[1.0, -np.inf], [2.0, np.inf]]))).all()


def test_several_goals_give_a_front_that_is_near_the_true_one() -> None:
    free = Bounds([Bound("macs", macs)])
    config = NSGA2(evaluations=400, population=40, costs=("macs",))
    found = run(config, bounds=free)
    front = found.front(["macs"])
    assert [trial.quality for trial in front] == sorted((trial.quality for trial in front), reverse=True)
    assert [trial.costs["macs"] for trial in front] == sorted((t.costs["macs"] for t in front), reverse=True)
    shares = []
    for trial in front:
        shares.append(trial.quality / best(trial.costs["macs"]))
    assert np.mean(shares) > 0.95
    assert len(front) > 12


def test_each_rung_has_the_best_of_the_one_before() -> None:
    config = Halving(evaluations=20, eta=3, rungs=3)
    found = run(config)
    rungs = [[trial for trial in found.trials if trial.fidelity == share] for share in config.shares]
    assert [len(rung) for rung in rungs] == [60, 20, 6]
    assert config.scores() == 86
    for low, high in itertools.pairwise(rungs):
        best_of_low = sorted(low, key=lambda trial: -trial.quality)[: len(high)]
        assert {trial.candidate for trial in high} == {trial.candidate for trial in best_of_low}


def test_asha_promotes_what_is_among_the_best_of_its_rung_by_then() -> None:
    config = Halving(evaluations=30, eta=3, rungs=3, asynchronous=True, batch=4)
    trials = run(config).trials
    assert {trial.fidelity for trial in trials} == set(config.shares)
    for low, high in itertools.pairwise(config.shares):
        for trial in (trial for trial in trials if trial.fidelity == high):
            before = [other for other in trials if other.fidelity == low and other.batch < trial.batch]
            (own,) = (other.quality for other in before if other.candidate == trial.candidate)
            assert sum(other.quality > own for other in before) < len(before) // 3


def test_random_candidates_are_spread_over_their_operations() -> None:
    high = 0.9
    drawn = run(Random(evaluations=80), bounds=bounds(high))
    plain = run(Random(evaluations=80, balanced=False), bounds=bounds(high))
    spread = [np.std([trial.costs["macs"] for trial in found.trials]) for found in (drawn, plain)]
    assert spread[0] > 1.2 * spread[1]


def test_ray_is_asked_for_by_name() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(MilError, match=r"mil-cli\[ray\]"):
            run(Evolution(evaluations=4, population=2, jobs=2, backend="ray"))
    else:
        config = CONFIGS["evolution"].model_copy(update={"jobs": 2, "backend": "ray"})
        assert run(config) == run(CONFIGS["evolution"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "evolution", "nsga2", "asha"])
def test_a_thousand_candidates_a_minute_where_scores_cost_nothing(name: str, tmp_path: Path) -> None:
    space = DesignedSpace(small_nets())
    counter = CostCounter(space, (torch.zeros(1, 1, 28, 28),))
    limits = Bounds([Bound("macs", counter.macs, 0.3 * counter.macs(space.largest)), Bound("params", counter.params)])
    config = CONFIGS[name].model_copy(update={"evaluations": 250 if name != "asha" else 60})
    began = time.process_time()
    found = search(space, config, bounds=limits, score=lambda one, _: float(len(one)), context=context(tmp_path))
    assert len(found.trials) / (time.process_time() - began) > 1000 / 60
