"""Runs a search: hard bounds, a budget, progress, and checkpoints from which it goes on as if never killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import torch

from mil_cli.errors import StageError
from mil_cli.stages.nas.search.bounds import Bounds
from mil_cli.stages.nas.search.drawing import Drawing
from mil_cli.stages.nas.search.nsga2 import objectives
from mil_cli.stages.nas.search.pareto import fronts
from mil_cli.stages.nas.search.strategy import SearchConfig, Situation
from mil_cli.stages.nas.search.trial import C, Proposal, Score, SearchSpace, Trial, best_of, ranked, worth_of
from mil_cli.workers import workers

if TYPE_CHECKING:
    from mil_cli.stages.context import Context

_AHEAD = 4
"""How many candidates each process is given at once; in between, the clock is looked at."""

_KEPT_EVERY = 1.0
"""Seconds of scoring after which a checkpoint is written, so that it takes no time where scores take none."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Found(Generic[C]):
    """What a search found.

    Attributes:
        trials: All that was scored, the best first.
    """

    trials: Sequence[Trial[C]]

    @property
    def best(self) -> Trial[C]:
        """The best of those on which most was spent."""
        return self.trials[0]

    def front(self, costs: Sequence[str] = ()) -> list[Trial[C]]:
        """Return those on which most was spent that no other is better than in quality and costs, the best first.

        Args:
            costs: Names of costs; empty: all of them.
        """
        whole = [trial for trial in self.trials if trial.fidelity == self.best.fidelity]
        return [whole[row] for row in sorted(fronts(objectives(whole, costs))[0])]


def search(
    space: SearchSpace[C],
    config: SearchConfig,
    *,
    bounds: Bounds[C],
    score: Score[C],
    context: Context,
    name: str = "search",
    key: str = "search",
    first: Sequence[C] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Found[C]:
    """Score candidates within the bounds until the budget is spent; each net only once, whatever was chosen for it.

    A checkpoint has all that was scored and what is still to be scored of the present batch, so that a search that goes
    on gives what it would have given; a kill loses what was scored in its last second.

    Args:
        space: The space.
        config: The strategy with its settings.
        bounds: What a candidate keeps, or it is not scored.
        score: The quality of a candidate; expensive.
        context: Gives generators, progress, checkpoints and which quality is better.
        name: Tells searches of one stage apart: of checkpoints and of what is drawn.
        key: The setting of the stage that holds `config`, for errors.
        first: Candidates that are scored before random ones, those within the bounds.
        clock: Seconds, from any zero.

    Returns:
        What was scored, and so far the best.

    Raises:
        StageError: No candidate is within the bounds, or none has a finite quality.
    """
    running = _Running(space, config, bounds=bounds, context=context, name=name, first=first)
    where = f"stages.{context.name}.{key}"
    asked = f"{where}.{'jobs' if config.backend == 'processes' else 'backend'}"
    with (
        workers(config.jobs, threads=torch.get_num_threads(), where=asked, backend=config.backend) as call_all,
        context.progress.work(f"{context.name}: searching", config.scores(), done=len(running.trials)) as bar,
    ):
        began, before = clock(), running.seconds
        try:
            for proposals in running.batches():
                scored = call_all(score, ((proposal.candidate, proposal.fidelity) for proposal in proposals))
                for quality in scored:
                    running.add(quality, seconds=before + clock() - began)
                    best = best_of(running.trials)
                    bar.advance(note=f"best {context.task.metric_name} {best.quality:.4g}")
        finally:
            running.keep()
    found = Found(ranked(running.trials))
    if not found.trials:
        raise _none_within(space, bounds, where)
    if not np.isfinite(found.best.worth):
        raise StageError("no candidate has a finite quality", where=where, hint="look at one candidate by itself")
    return found


class _Running(Generic[C]):
    """A search under way.

    Attributes:
        trials: What was scored, in order.
        seconds: Time that scoring took, with that before an interruption.
    """

    def __init__(
        self,
        space: SearchSpace[C],
        config: SearchConfig,
        *,
        bounds: Bounds[C],
        context: Context,
        name: str,
        first: Sequence[C],
    ) -> None:
        self._space, self._config, self._bounds, self._context, self._name = space, config, bounds, context, name
        self._first = first
        self._slot = context.slot(name)
        self._higher = context.task.higher_is_better
        state = self._slot.load() or {"trials": [], "waiting": [], "batch": -1, "seconds": 0.0}
        self._entries: list[list[Any]] = state["trials"]
        self._batch: int = state["batch"]
        self.seconds: float = state["seconds"]
        self._kept_at = self.seconds
        self.trials = [self._trial(entry) for entry in self._entries]
        self._waiting = [Proposal(space.at(indices), fidelity) for indices, fidelity in state["waiting"]]
        self._seen: set[Hashable] = {space.form(trial.candidate) for trial in self.trials}
        self._seen |= {space.form(proposal.candidate) for proposal in self._waiting}

    def batches(self) -> Iterator[list[Proposal[C]]]:
        """Yield what is to be scored next, until nothing is, or the budget is spent; each is to be added."""
        config = self._config
        while not self._late():
            if not self._waiting:
                self._waiting = self._affordable(self._proposals())
                if not self._waiting:
                    return
                self._seen |= {self._space.form(proposal.candidate) for proposal in self._waiting}
            yield self._waiting[: config.jobs * _AHEAD if config.jobs > 1 else 1]

    def add(self, quality: float, *, seconds: float) -> None:
        """Add the quality of what is the next to be scored, and the seconds that all took so far."""
        proposal = self._waiting.pop(0)
        costs = self._bounds.costs(proposal.candidate)
        self._entries.append(
            [self._space.indices(proposal.candidate), proposal.fidelity, float(quality), costs, self._batch]
        )
        self.trials.append(self._trial(self._entries[-1]))
        self.seconds = seconds
        if seconds - self._kept_at >= _KEPT_EVERY:
            self.keep()

    def keep(self) -> None:
        """Write the checkpoint."""
        self._kept_at = self.seconds
        waiting = [[self._space.indices(one.candidate), one.fidelity] for one in self._waiting]
        self._slot.save({"trials": self._entries, "waiting": waiting, "batch": self._batch, "seconds": self.seconds})

    def _proposals(self) -> list[Proposal[C]]:
        self._batch += 1
        generator = self._context.generator(f"{self._name} {self._batch}")
        # What is drawn and not proposed may be drawn again.
        drawing = Drawing(self._space, self._bounds, generator, set(self._seen), self._first)
        situation = Situation(self._space, self._bounds, tuple(self.trials), self._left, drawing)
        return self._config.propose(situation)

    @property
    def _left(self) -> float:
        return self._config.evaluations - sum(trial.fidelity for trial in self.trials) + _ROUNDING

    def _affordable(self, proposals: Sequence[Proposal[C]]) -> list[Proposal[C]]:
        spent = np.cumsum([proposal.fidelity for proposal in proposals])
        return list(proposals[: int((spent <= self._left).sum())])

    def _late(self) -> bool:
        minutes = self._config.minutes
        return minutes is not None and bool(self.trials) and self.seconds >= 60 * minutes

    def _trial(self, entry: Sequence[Any]) -> Trial[C]:
        indices, fidelity, quality, costs, batch = entry
        worth = worth_of(quality, higher_is_better=self._higher)
        return Trial(self._space.at(indices), fidelity, quality, worth, costs, batch)


def _none_within(space: SearchSpace[C], bounds: Bounds[C], where: str) -> StageError:
    costs = bounds.costs(space.smallest)
    shown = ", ".join(f"{name} {costs[name]:,.6g} of {most:,.6g}" for name, most in bounds.most.items())
    return StageError(
        f"no candidate within the bounds was found; the smallest one has {shown}", where=where, hint="keep more"
    )
