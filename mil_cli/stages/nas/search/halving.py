"""Successive halving: many candidates get little effort, the better ones of them more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from mil_cli.stages.nas.search.strategy import SearchConfig, Situation
from mil_cli.stages.nas.search.trial import C, Proposal, Trial


class Halving(SearchConfig):
    """Successive halving, or ASHA: of each rung the best part is scored again with more effort.

    Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"; Li et al.
    2020, "A system for massively parallel hyperparameter tuning" (ASHA, arXiv:1810.05934). Worths are only compared
    within a rung.

    Attributes:
        eta: Of so many candidates of a rung one goes on, to so many times the effort.
        rungs: How many there are; the last has the whole effort, the first ``eta ** (1 - rungs)`` of it.
        asynchronous: Whether a candidate goes on as soon as it is among the best of its rung so far, as in ASHA, so
            that there is always something to score; else when its rung is full.
        batch: Candidates that are chosen at a time, where it is asynchronous.
    """

    strategy: Literal["halving"] = "halving"
    eta: int = Field(3, ge=2, le=16)
    rungs: int = Field(3, ge=1, le=12)
    asynchronous: bool = False
    batch: int = Field(8, ge=1)

    def propose(self, situation: Situation[C]) -> list[Proposal[C]]:
        """Return the next rung; if it is asynchronous, some promotions, or new candidates where there are none."""
        rungs = [[trial for trial in situation.trials if trial.fidelity == share] for share in self.shares]
        if self.asynchronous:
            return self._next(situation, rungs)
        if not situation.trials:
            return [Proposal(candidate, self.shares[0]) for candidate in situation.drawing.random(self.first)]
        reached = max(number for number, rung in enumerate(rungs) if rung)
        return [] if reached + 1 == self.rungs else self._promotions(rungs, reached)

    @property
    def shares(self) -> tuple[float, ...]:
        """The effort of each rung, the last being 1."""
        return tuple(float(self.eta) ** (number + 1 - self.rungs) for number in range(self.rungs))

    @property
    def first(self) -> int:
        """How many candidates the budget allows on the first of full rungs; all rungs then take the same effort."""
        count = max(1, int(self.evaluations / (self.rungs * self.shares[0])))
        while count > 1 and self._effort(count) > self.evaluations:
            count -= 1
        return count

    def scores(self) -> int:
        """Return how many scores full rungs take."""
        return sum(_sizes(self.first, self.eta, self.rungs))

    def _effort(self, first: int) -> float:
        sizes = _sizes(first, self.eta, self.rungs)
        return sum(size * share for size, share in zip(sizes, self.shares, strict=True))

    def _promotions(self, rungs: Sequence[Sequence[Trial[C]]], number: int) -> list[Proposal[C]]:
        """Return what of a rung is among its best and not yet on the next one, the best first."""
        best = sorted(rungs[number], key=lambda trial: -trial.worth)
        best = best[: _promoted(len(best), self.eta, full=not self.asynchronous)]
        above = {trial.candidate for trial in rungs[number + 1]}
        return [Proposal(one.candidate, self.shares[number + 1]) for one in best if one.candidate not in above]

    def _next(self, situation: Situation[C], rungs: Sequence[Sequence[Trial[C]]]) -> list[Proposal[C]]:
        found: list[Proposal[C]] = []
        for number in reversed(range(self.rungs - 1)):
            found += self._promotions(rungs, number)
        found = found[: self.batch]
        new = situation.drawing.random(self.batch - len(found)) if len(found) < self.batch else []
        return [*found, *(Proposal(candidate, self.shares[0]) for candidate in new)]


def _promoted(count: int, eta: int, *, full: bool) -> int:
    """Return how many of a rung go on: of a full one at least one."""
    return max(1, count // eta) if full else count // eta


def _sizes(first: int, eta: int, rungs: int) -> list[int]:
    sizes = [first]
    for _ in range(rungs - 1):
        sizes.append(_promoted(sizes[-1], eta, full=True))
    return sizes
