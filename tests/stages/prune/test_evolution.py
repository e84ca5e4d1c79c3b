"""Evolution over structures: against brute force on a small space, bounds, speed, targets, kills, bad results."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.models.resnet import resnet20
from mil_cli.stages.breeding import evolve
from mil_cli.stages.prune.evolution import BoundedStructures, EvolutionConfig, evolution
from mil_cli.stages.prune.searching import Search
from mil_cli.stages.prune.structures import Structures
from tests.stages.contexts import Kill
from tests.stages.prune import blocks


@pytest.fixture(scope="module")
def model() -> Model:
    return blocks.trained()


def config(**changes: Any) -> EvolutionConfig:
    return EvolutionConfig.model_validate(blocks.settings(**{"evaluations": 10, "population": 4, **changes}))


def structures_of(model: Model, **changes: Any) -> Structures:
    search = Search(model, config(**{"macs": 0.9, **changes}), blocks.context(), {})
    return search.structures(search.model)


@pytest.mark.slow
def test_it_comes_close_to_the_best_of_all_structures(model: Model) -> None:
    structures = structures_of(model, max_per_layer=0.7)
    bound = 0.5 * structures.cost(structures.whole)
    gains = torch.rand(len(structures.last), generator=torch.Generator().manual_seed(1)).tolist()

    def quality(candidate: tuple[int, ...]) -> float:
        return -sum(gain * choice for gain, choice in zip(gains, candidate, strict=True))

    choices = itertools.product(*(range(most + 1) for most in structures.last))
    every = [one for one in choices if structures.allows(one) and structures.cost(one) <= bound]
    best = max(map(quality, every))
    found = evolve(
        BoundedStructures(structures, bound),
        cost=structures.cost,
        bound=bound,
        score=quality,
        higher_is_better=True,
        evaluations=150,
        population=25,
        generator=lambda purpose: torch.Generator().manual_seed(int(purpose.split()[-1])),
    )
    assert len(found) == 150 < len(every) / 5
    assert len({entry.candidate for entry in found}) == 150
    assert {entry.candidate for entry in found} <= {structures.canonical(one) for one in every}
    better = sum(quality(one) > found[0].quality for one in every)
    assert found[0].quality <= best + 1e-9
    assert better < len(every) / 200, (found[0].quality, best)


def test_whatever_is_bred_is_within_the_bound_and_keeps_the_chains(model: Model) -> None:
    structures = structures_of(model)
    bound = 0.4 * structures.cost(structures.whole)
    space = BoundedStructures(structures, bound)
    generator = torch.Generator().manual_seed(0)
    last = space.sample(generator)
    for _ in range(40):
        one = space.sample(generator)
        for child in (one, space.mutate(one, generator, probability=0.5), space.cross(one, last, generator)):
            assert structures.allows(child)
            assert structures.cost(child) <= bound
        last = one
    even = space.even()
    assert structures.cost(even) <= bound
    assert not structures.left_out(even)


def test_the_costs_of_a_thousand_structures_take_less_than_a_minute() -> None:
    torch.manual_seed(0)
    model = Model.capture(resnet20().eval(), (torch.randn(2, 1, 16, 16),))
    structures = structures_of(model, round_to=1)
    space = BoundedStructures(structures, 0.25 * structures.cost(structures.whole))
    generator = torch.Generator().manual_seed(0)
    started, asked = time.process_time(), 0
    for _ in range(5):
        candidate = space.sample(generator)
        for place, most in enumerate(structures.last):
            structures.cost((*candidate[:place], most, *candidate[place + 1 :]))
            asked += 1
    assert 60 * asked / (time.process_time() - started) > 1000


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_the_target_is_met_by_the_best_that_was_judged(model: Model, quantity: str) -> None:
    around = blocks.context()
    result = evolution(model, config(**{quantity: 0.5}), around)
    left, whole = (result.macs(), model.macs()) if quantity == "macs" else (result.num_params(), model.num_params())
    assert around.notes["left"] == left <= 0.5 * whole
    assert around.notes["search_quality"] == around.evaluate(result, limit=128).value
    assert around.notes["scored"] == 10
    best = around.notes["best"]
    assert isinstance(best, list)
    assert best[0]["quality"] == max(entry["quality"] for entry in best)


@pytest.mark.parametrize(
    "kill_at", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_to_the_same_weights(
    kill_at: int, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(macs=0.5)
    around = blocks.context()
    whole = evolution(model, settings, around)
    real, calls = Search.quality, 0

    def dying(self: Search, model: Model) -> float:
        nonlocal calls
        calls += 1
        if calls == kill_at + 1:
            raise Kill
        return real(self, model)

    monkeypatch.setattr(Search, "quality", dying)
    with pytest.raises(Kill):
        evolution(model, settings, blocks.context(tmp_path))
    again = blocks.context(tmp_path)
    resumed = evolution(model, settings, again)
    assert calls == 11
    assert resumed.fingerprint() == whole.fingerprint()
    assert again.notes == around.notes


def test_another_seed_searches_elsewhere(model: Model) -> None:
    one, other = blocks.context(), blocks.context(seed=7)
    evolution(model, config(macs=0.5), one)
    evolution(model, config(macs=0.5), other)
    assert one.notes["best"] != other.notes["best"]


def test_what_cannot_be_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match="the smallest that can be kept"):
        evolution(model, config(macs=0.01), blocks.context())
    monkeypatch.setattr(Search, "quality", lambda self, model: -math.inf)
    with pytest.raises(StageError, match="no structure gives finite outputs"):
        evolution(model, config(macs=0.5, evaluations=3), blocks.context())
