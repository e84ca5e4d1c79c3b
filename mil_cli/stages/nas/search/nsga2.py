"""Evolution towards several goals at once: quality, and what a candidate costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import numpy as np
from pydantic import Field

from mil_cli.assess.ranking import Floats
from mil_cli.stages.nas.search.drawing import Drawing
from mil_cli.stages.nas.search.pareto import crowding, fronts
from mil_cli.stages.nas.search.strategy import SearchConfig, Situation
from mil_cli.stages.nas.search.trial import C, Proposal, Trial


class NSGA2(SearchConfig):
    """NSGA-II: what no other is better than in everything, spread evenly, breeds.

    Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II"; Lu et al. 2019, "NSGA-Net", for
    architectures. It gives a front of quality and costs, and of it the best under the bounds.

    Attributes:
        costs: What is to be small beside the bounds: names of costs. Empty: all of them.
        population: How many each generation has.
        mutation: The probability that a decision of a child changes; one at least does.
        crossover: The probability that a child has two parents.
    """

    strategy: Literal["nsga2"] = "nsga2"
    costs: tuple[str, ...] = ()
    population: int = Field(40, ge=4)
    mutation: float = Field(0.1, ge=0, le=1)
    crossover: float = Field(0.9, ge=0, le=1)

    def propose(self, situation: Situation[C]) -> list[Proposal[C]]:
        """Return the next generation."""
        count = min(self.population, int(situation.left))
        drawing, space = situation.drawing, situation.space
        generations = [list(batch) for _, batch in groupby(situation.trials, key=lambda trial: trial.batch)]
        parents: list[Trial[C]] = []
        for generation in generations:
            parents = self._survivors([*parents, *generation])
        missing = self.population - len(situation.trials)
        if missing > 0:
            first = drawing.random(min(missing, count))
            if first or not parents:
                return [Proposal(candidate) for candidate in first]
        places = standings(objectives(parents, self.costs))

        def child() -> C:
            candidate = _parent(parents, places, drawing)
            if drawing.chance(self.crossover):
                candidate = space.cross(candidate, _parent(parents, places, drawing), drawing.generator)
            return space.mutate(candidate, drawing.generator, probability=self.mutation)

        found = drawing.new(count, child)
        found += drawing.random(count - len(found)) if len(found) < count else []
        return [Proposal(candidate) for candidate in found]

    def _survivors(self, trials: list[Trial[C]]) -> list[Trial[C]]:
        places = standings(objectives(trials, self.costs))
        return [trials[row] for row in np.argsort(places, kind="stable")[: self.population]]


def objectives(trials: Sequence[Trial[C]], costs: Sequence[str]) -> Floats:
    """Return what is to be small, shape (trials, 1 + costs): minus the worth, and the costs named, or all.

    All of it is infinite for a trial that is worth nothing, so that one which is cheap and does not work is on no front
    with others.
    """
    points = np.array(
        [[-trial.worth, *(trial.costs[name] for name in (costs or tuple(trial.costs)))] for trial in trials]
    )
    points[np.isinf(points[:, 0])] = np.inf
    return points


def standings(points: Floats) -> Floats:
    """Return for each point how many stand before it: those of earlier fronts, and of its own the less crowded."""
    places = np.empty(len(points))
    before = 0
    for front in fronts(points):
        order = np.argsort(-crowding(points[front]), kind="stable")
        places[front[order]] = before + np.arange(len(front))
        before += len(front)
    return places


def _parent(parents: Sequence[Trial[C]], places: Floats, drawing: Drawing[C]) -> C:
    """Return the better of two drawn at random."""
    first, second = (drawing.place(len(parents)) for _ in range(2))
    return parents[first if places[first] <= places[second] else second].candidate
