"""Pruning by evolution: structures under a bound are bred, and judged on val with the weights that they inherit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.stages.breeding import Scored, with_choice
from mil_cli.stages.fitting import Fitting
from mil_cli.stages.generations import Generations
from mil_cli.stages.measured import Choice
from mil_cli.stages.prune.searching import Search, SearchConfig
from mil_cli.stages.prune.structures import Structures
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
    bound is narrowed at random until it is within. Where the whole model takes another time than was predicted for a
    latency, the best are bred on, shortly, under a bound that makes up for it.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, nothing can be cut, or no structure gives finite outputs.
    """
    state = context.slot("generations").load() or {"scored": [], "table": {}, "measured": []}
    search = Search(model, config, context, state["table"])
    breeding = _Breeding(search, config, context, state)
    _measure_ahead(breeding.structures, search, context)
    found, measured = search.correction(state["measured"], breeding.keep).search(breeding.choice)
    best, structures = found[0], breeding.structures
    _, check = search.proven(structures, best.candidate)
    return search.finish(
        search.result(structures, best.candidate),
        best.cost,
        measured=measured,
        scored=len(state["scored"]),
        search_quality=best.quality,
        best=[{"quality": entry.quality, config.quantity: entry.cost} for entry in found[:_SHOWN]],
        check=check,
        **structures.describe(best.candidate),
    )


class _Breeding:
    """Breeds structures for one bound after another; what was scored for one begins the next.

    Args:
        search: What is searched in.
        config: The settings.
        context: Gives generators, progress and the checkpoint.
        state: What the checkpoint holds.

    Attributes:
        structures: All there are.
    """

    def __init__(self, search: Search, config: EvolutionConfig, context: Context, state: dict[str, Any]) -> None:
        self._search, self._config, self._context, self._state = search, config, context, state
        self._slot = context.slot("generations")
        self.structures = search.structures(search.model)
        self._generations = Generations(
            context, state=state, keep=self.keep, cost=self.structures.cost, score=self._quality
        )

    def keep(self) -> None:
        """Write the checkpoint."""
        self._state["table"] = self._search.amount.table
        self._slot.save(self._state)

    def choice(self, target: float, before: int) -> Choice[list[Scored]]:
        """Return what was scored within a bound, the best first; after the first choice with less breeding.

        Raises:
            StageError: No structure gives finite outputs.
        """
        structures = self.structures
        space = BoundedStructures(structures, max(target, structures.cost(structures.smallest)))
        found = self._generations.best(
            space,
            space.fitting,
            space.bound,
            before=before,
            evaluations=self._config.evaluations,
            population=self._config.population,
            first=[space.even()],
        )
        if not math.isfinite(found[0].quality):
            hint = "keep more, or fine-tune the model before it is pruned"
            raise StageError("no structure gives finite outputs", where=f"stages.{self._context.name}", hint=hint)
        best = found[0]
        worth = best.quality if self._context.task.higher_is_better else -best.quality
        return Choice(best.candidate, best.cost, lambda: self._search.cut(structures, best.candidate), found, worth)

    def _quality(self, candidate: Candidate) -> float:
        return self._search.quality(self._search.fresh(self.structures, candidate))


class BoundedStructures:
    """Structures within a bound, to be bred.

    Args:
        structures: All there are.
        bound: Largest cost; the smallest structure is within.

    Attributes:
        bound: The same.
        fitting: Fits structures to it.
    """

    def __init__(self, structures: Structures, bound: float) -> None:
        self._structures, self.bound = structures, bound
        self.fitting = Fitting(structures, structures.cost, bound)

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
            if structures.cost(candidate) <= self.bound:
                return candidate
        return structures.smallest

    def sample(self, generator: torch.Generator) -> Candidate:
        """Draw a structure: the whole one, shrunk at random, some axes much sooner than others."""
        return self.fitting.shrunk(self._structures.whole, generator)

    def mutate(self, candidate: Candidate, generator: torch.Generator, *, probability: float) -> Candidate:
        """Return a structure some of whose axes are drawn anew, each with the probability given, at least one."""
        draws = torch.rand(len(candidate), generator=generator)
        chosen = set((draws < probability).nonzero().flatten().tolist()) or {int(draws.argmin())}
        for place in sorted(chosen):
            choice = int(torch.randint(self._structures.last[place] + 1, (), generator=generator))
            changed = with_choice(candidate, place, choice)
            candidate = changed if self._structures.allows(changed) else candidate
        return self.fitting.shrunk(candidate, generator)

    def cross(self, first: Candidate, second: Candidate, generator: torch.Generator) -> Candidate:
        """Return a structure that has each axis from one of two; a chain that would lose too much is the first's."""
        coins = torch.rand(len(first), generator=generator).tolist()
        child = tuple(a if coin < 0.5 else b for a, b, coin in zip(first, second, coins, strict=True))
        if not self._structures.allows(child):
            child = (*child[: len(self._structures.widths)], *first[len(self._structures.widths) :])
        return self.fitting.shrunk(child, generator)


def _measure_ahead(structures: Structures, search: Search, context: Context) -> None:
    """Measure the operators of many structures in one go, where the bound is on a latency."""
    generator = context.generator("ahead")

    def drawn() -> Candidate:
        return tuple(int(torch.randint(most + 1, (), generator=generator)) for most in structures.last)

    pool = (drawn() for _ in range(_MEASURED_AHEAD))
    search.amount.prepare(structures.coupling, ((structures.removed(one), structures.dropped(one)) for one in pool))
