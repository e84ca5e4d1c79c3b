"""Evolution in which the oldest dies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from mil_cli.stages.nas.search.strategy import SearchConfig, Situation
from mil_cli.stages.nas.search.trial import C, Proposal, Trial


class Evolution(SearchConfig):
    """Regularised evolution: a child of the best of a few takes the place of the oldest.

    Real et al. 2019, "Regularized Evolution for Image Classifier Architecture Search" (arXiv:1802.01548). What lives
    are the last candidates that were scored, whatever they were worth: one that was only lucky dies with the others,
    and lives on only if its children are good. `mil_cli.stages.breeding.evolve` is the other kind, in which the best
    quarter of all that was ever scored breeds: it gets far in few generations, and believes every score.

    Attributes:
        population: How many live; so many are drawn at random first.
        tournament: Of how many of them, drawn at random, the best becomes the parent.
        mutation: The probability that a decision of a child changes; one at least does.
        crossover: The probability that a child has two parents.
        batch: Children that are bred at a time, so that they can be scored at the same time.
    """

    strategy: Literal["evolution"] = "evolution"
    population: int = Field(40, ge=2)
    tournament: int = Field(10, ge=1)
    mutation: float = Field(0.1, ge=0, le=1)
    crossover: float = Field(0.0, ge=0, le=1)
    batch: int = Field(8, ge=1)

    def propose(self, situation: Situation[C]) -> list[Proposal[C]]:
        """Return the first population, or some children of what lives."""
        drawing, space = situation.drawing, situation.space
        missing = self.population - len(situation.trials)
        if missing > 0:
            first = drawing.random(min(missing, int(situation.left)))
            if first:
                return [Proposal(candidate) for candidate in first]
        living = situation.trials[-self.population :]

        def child() -> C:
            candidate = self._parent(living, drawing.generator)
            if drawing.chance(self.crossover):
                candidate = space.cross(candidate, self._parent(living, drawing.generator), drawing.generator)
            return space.mutate(candidate, drawing.generator, probability=self.mutation)

        count = min(self.batch, int(situation.left))
        found = drawing.new(count, child) if living else []
        found += drawing.random(count - len(found)) if len(found) < count else []
        return [Proposal(candidate) for candidate in found]

    def _parent(self, living: Sequence[Trial[C]], generator: torch.Generator) -> C:
        drawn = torch.randperm(len(living), generator=generator)[: self.tournament].tolist()
        best: Trial[C] = max((living[place] for place in drawn), key=lambda trial: trial.worth)
        return best.candidate
