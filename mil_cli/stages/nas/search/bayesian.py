"""Bayesian search: what a predictor thinks most promising is scored next."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from mil_cli.assess.active import Acquisition, next_trainings
from mil_cli.assess.predictors.ensemble import AnyPredictor
from mil_cli.assess.predictors.ridge import Ridge
from mil_cli.stages.nas.search.strategy import SearchConfig, Situation
from mil_cli.stages.nas.search.trial import C, Proposal, ranked

_ELITE = 10
"""Of so many of the best, mutations are looked at; the other half of what is looked at is random."""

_MUTATION = 0.1


class Bayesian(SearchConfig):
    """A predictor learns from what was scored; of many candidates those that it finds most promising are scored next.

    White et al. 2021, "BANANAS" (arXiv:1910.11858): a predictor over the encoding with an uncertainty, an acquisition
    that is maximised over mutations of the best and random candidates.

    Attributes:
        start: Candidates that are drawn at random first.
        pool: Candidates that are looked at for each batch.
        predictor: What learns; see `mil_cli.assess.predictors`.
        acquisition: What is promising, and how many are scored at a time (`batch`): by ``thompson`` each is the best of
            what the predictor may believe, for which it is fitted once.
    """

    strategy: Literal["bayesian"] = "bayesian"
    start: int = Field(20, ge=4)
    pool: int = Field(100, ge=2)
    predictor: AnyPredictor = Ridge()
    acquisition: Acquisition = Acquisition(strategy="thompson", batch=8)

    def propose(self, situation: Situation[C]) -> list[Proposal[C]]:
        """Return the first candidates, or the most promising of the pool."""
        trials, drawing, left = situation.trials, situation.drawing, int(situation.left)
        if len(trials) < self.start:
            first = drawing.random(min(self.start - len(trials), left))
            if first:
                return [Proposal(candidate) for candidate in first]
        pool = self._pool(situation)
        if not pool:
            return []
        rows = [trial.candidate for trial in trials] + pool
        worths = np.array([trial.worth for trial in trials] + [np.nan] * len(pool))
        known = np.isfinite(worths)
        chosen = next_trainings(
            self.predictor,
            np.stack([situation.space.encode(candidate) for candidate in rows]).astype(np.float64),
            np.where(known, worths, np.nan),
            self.acquisition.model_copy(update={"batch": min(self.acquisition.batch, left)}),
            seed=int(torch.randint(2**31, (), generator=situation.generator)),
            excluded=~known & (np.arange(len(rows)) < len(trials)),
        )
        return [Proposal(rows[row]) for row in chosen]

    def _pool(self, situation: Situation[C]) -> list[C]:
        drawing = situation.drawing
        elite = [trial.candidate for trial in ranked(situation.trials)[:_ELITE]]

        def near() -> C:
            candidate = elite[drawing.place(len(elite))]
            return situation.space.mutate(candidate, drawing.generator, probability=_MUTATION)

        return [*drawing.new(self.pool // 2, near), *drawing.random(self.pool - self.pool // 2)]
