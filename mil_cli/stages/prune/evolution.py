"""Pruning by evolution: structures under a bound are bred, and judged on val with the weights that they inherit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.stages.breeding import Scored, evolve, from_state, ranked, to_state
from mil_cli.stages.prune.searching import Search, SearchConfig
from mil_cli.stages.prune.structures import Structures, with_choice
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.breeding import Candidate
    from mil_cli.stages.context import Context

_MEASURED_AHEAD = 300
_SHOWN = 20


class EvolutionConfig(SearchConfig):
    """Settings of pruning by evolution.

    Attributes:
        evaluations: Structures that are judged on val.
        population: How many of them each generation has.
    """

    method: ClassVar[str] = "evolution"

    evaluations: int = Field(128, ge=1)
    population: int = Field(32, ge=2)


@stage(EvolutionConfig)
def evolution(model: Model, config: EvolutionConfig, context: Context) -> Model:
    """Breed structures within the target and return the one that is best on val without any training.

    Liu et al. 2019, "MetaPruning" (ICCV), for evolution over widths; a structure keeps the weights that it inherits and
    takes the statistics of its batch norms anew, as Li et al. 2020, "EagleEye" (ECCV), judge theirs. A child above the
    bound is narrowed at random until it is within.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, nothing can be cut, or no structure gives finite outputs.
    """
    slot = context.slot("generations")
    state = slot.load() or {"scored": [], "table": {}}
    search = Search(model, config, context, state["table"])
    structures = search.structures(search.model)
    space = BoundedStructures(structures, search.goal)
    _measure_ahead(structures, search, context)
    known = from_state(state["scored"])
    higher = context.task.higher_is_better

    def keep(scored: list[Scored]) -> None:
        state["scored"], state["table"] = to_state(scored), search.amount.table
        slot.save(state)
        bar.advance(note=f"best {context.task.metric_name} {ranked(scored, higher)[0].quality:.4g}")

    with context.progress.work(f"{context.name}: searching", config.evaluations, done=len(known)) as bar:
        found = evolve(
            space,
            cost=structures.cost,
            bound=search.goal,
            score=lambda candidate: search.quality(search.fresh(structures, candidate)),
            higher_is_better=higher,
            evaluations=config.evaluations,
            population=config.population,
            generator=context.generator,
            first=[space.even()],
            known=known,
            on_scored=keep,
        )
    if not math.isfinite(found[0].quality):
        hint = "keep more, or fine-tune the model before it is pruned"
        raise StageError("no structure gives finite outputs", where=f"stages.{context.name}", hint=hint)
    best = found[0]
    _, check = search.proven(structures, best.candidate)
    return search.finish(
        search.fresh(structures, best.candidate),
        best.cost,
        scored=len(found),
        search_quality=best.quality,
        best=[{"quality": entry.quality, config.quantity: entry.cost} for entry in found[:_SHOWN]],
        check=check,
        **structures.describe(best.candidate),
    )


class BoundedStructures:
    """Structures within a bound, to be bred.

    Args:
        structures: All there are.
        bound: Largest cost; the smallest structure is within.
    """

    def __init__(self, structures: Structures, bound: float) -> None:
        self._structures, self._bound = structures, bound

    @property
    def smallest(self) -> Candidate:
        """The structure that costs least."""
        return self._structures.smallest

    def even(self) -> Candidate:
        """Return what keeps all branches and the same part of every width, as much as the bound allows."""
        structures = self._structures
        levels = 100
        for level in range(levels + 1):
            widths = (round(len(width.chunks) * level / levels) for width in structures.widths)
            candidate = (*widths, *(0 for _ in structures.branches))
            if structures.cost(candidate) <= self._bound:
                return candidate
        return structures.smallest

    def sample(self, generator: torch.Generator) -> Candidate:
        """Draw a structure: the whole one, shrunk at random, some axes much sooner than others."""
        return self.shrunk(self._structures.whole, generator)

    def mutate(self, candidate: Candidate, generator: torch.Generator, *, probability: float) -> Candidate:
        """Return a structure some of whose axes are drawn anew, each with the probability given, at least one."""
        draws = torch.rand(len(candidate), generator=generator)
        chosen = set((draws < probability).nonzero().flatten().tolist()) or {int(draws.argmin())}
        for place in sorted(chosen):
            choice = int(torch.randint(self._structures.last[place] + 1, (), generator=generator))
            changed = with_choice(candidate, place, choice)
            candidate = changed if self._structures.allows(changed) else candidate
        return self.shrunk(candidate, generator)

    def cross(self, first: Candidate, second: Candidate, generator: torch.Generator) -> Candidate:
        """Return a structure that has each axis from one of two; a chain that would lose too much is the first's."""
        coins = torch.rand(len(first), generator=generator).tolist()
        child = tuple(a if coin < 0.5 else b for a, b, coin in zip(first, second, coins, strict=True))
        if not self._structures.allows(child):
            child = (*child[: len(self._structures.widths)], *first[len(self._structures.widths) :])
        return self.shrunk(child, generator)

    def shrunk(self, candidate: Candidate, generator: torch.Generator) -> Candidate:
        """Return a structure within the bound: the given one after as few steps as are needed of a random sequence.

        Args:
            candidate: A structure that keeps the limits of chains.
            generator: Draws the sequence.
        """
        structures = self._structures
        paths = [candidate]
        for place in self._sequence(candidate, generator):
            step = with_choice(paths[-1], place, paths[-1][place] + 1)
            if structures.allows(step):
                paths.append(step)
        low, high = 0, len(paths) - 1
        if structures.cost(paths[high]) > self._bound:
            return structures.smallest
        while low < high:
            middle = (low + high) // 2
            if structures.cost(paths[middle]) <= self._bound:
                high = middle
            else:
                low = middle + 1
        return structures.canonical(paths[low])

    def _sequence(self, candidate: Candidate, generator: torch.Generator) -> list[int]:
        """Return all axes in a random order, each as often as it can still be narrowed; a share of them goes first."""
        weights = torch.rand(len(candidate), generator=generator).tolist()
        steps = []
        for place, (choice, most) in enumerate(zip(candidate, self._structures.last, strict=True)):
            times = torch.rand(most - choice, generator=generator).sort().values.tolist()
            steps += [(weights[place] * time, place) for time in times]
        return [place for _, place in sorted(steps)]


def _measure_ahead(structures: Structures, search: Search, context: Context) -> None:
    """Measure the operators of many structures in one go, where the bound is on a latency."""
    generator = context.generator("ahead")

    def drawn() -> Candidate:
        return tuple(int(torch.randint(most + 1, (), generator=generator)) for most in structures.last)

    pool = (drawn() for _ in range(_MEASURED_AHEAD))
    search.amount.prepare(structures.coupling, ((structures.removed(one), structures.dropped(one)) for one in pool))
