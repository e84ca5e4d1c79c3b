"""Searches under one bound after another, as a latency is corrected: what was scored for one begins the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mil_cli.stages.breeding import Breedable, Candidate, Scored, evolve, from_state, ranked, to_state
from mil_cli.stages.fitting import Fitting

if TYPE_CHECKING:
    from mil_cli.stages.context import Context

_AGAIN = 0.25
"""What part of the evaluations, and of the population, another choice for a corrected latency takes."""


class Generations:
    """Breeds candidates for one bound after another.

    Args:
        context: Gives generators, progress and what is better.
        state: What the checkpoint holds; ``scored`` of it is written here.
        keep: Writes the checkpoint.
        cost: What bounds are on.
        score: The quality of a candidate.
    """

    def __init__(
        self,
        context: Context,
        *,
        state: dict[str, Any],
        keep: Callable[[], None],
        cost: Callable[[Candidate], float],
        score: Callable[[Candidate], float],
    ) -> None:
        self._context, self._state, self._keep = context, state, keep
        self._cost, self._score = cost, score
        self._scored: list[Scored] = []

    def best(
        self,
        space: Breedable[Candidate],
        fitting: Fitting,
        bound: float,
        *,
        before: int,
        evaluations: int,
        population: int,
        first: Sequence[Candidate] = (),
    ) -> list[Scored]:
        """Return what was scored within a bound, the best first.

        Args:
            space: The space.
            fitting: Fits what was best before to the bound.
            bound: Largest cost.
            before: How many searches there were before; each of the later ones scores fewer candidates.
            evaluations: How many candidates the first search scores.
            population: How many of them each of its generations has.
            first: Candidates that the first search begins with.
        """
        higher = self._context.task.higher_is_better
        if before:
            evaluations, population = (max(2, round(count * _AGAIN)) for count in (evaluations, population))
            generator = self._context.generator(f"choice {before}")
            elite = ranked(self._scored, higher)[:population]
            first = [fitting.fitted(entry.candidate, generator) for entry in elite]
        known = from_state(self._state["scored"])
        done = 0 if before else min(len(known), evaluations)
        with self._context.progress.work(f"{self._context.name}: searching", evaluations, done=done) as bar:

            def keep(scored: list[Scored]) -> None:
                self._state["scored"] = to_state(scored)
                self._keep()
                best = ranked(scored[len(known) :], higher)[0].quality
                bar.advance(note=f"best {self._context.task.metric_name} {best:.4g}")

            found = evolve(
                space,
                cost=self._cost,
                bound=bound,
                score=self._score,
                higher_is_better=higher,
                evaluations=evaluations,
                population=population,
                generator=lambda purpose: self._context.generator(f"choice {before} {purpose}" if before else purpose),
                first=first,
                known=known,
                on_scored=keep,
            )
        self._scored += found
        return found
