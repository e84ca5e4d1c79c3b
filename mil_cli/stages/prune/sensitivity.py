"""Pruning by sensitivity: how much the loss grows as each space narrows, and an integer programme over these curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.stages.breeding import with_choice
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.knapsack import choose
from mil_cli.stages.measured import Choice
from mil_cli.stages.prune.searching import Search, SearchConfig
from mil_cli.stages.prune.structures import Structures
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.breeding import Candidate
    from mil_cli.stages.context import Context

Curves = Sequence[NDArray[np.float64]]
"""By axis: what each choice adds to the loss; the first one, which keeps all, adds 0."""

_ROUNDS = 6
"""Bounds between the whole and the target at which the costs are linearised: they hold near a point only."""

_CORRECTIONS = 20


class SensitivityConfig(SearchConfig):
    """Settings of pruning by sensitivity.

    Attributes:
        points: Widths of each space at which the loss is measured; it is interpolated between them.
    """

    method: ClassVar[str] = "sensitivity"

    points: int = Field(6, ge=1)


@stage(SensitivityConfig)
def sensitivity(model: Model, config: SensitivityConfig, context: Context) -> Model:
    """Choose the widths and branches for which the losses of single cuts add up to least under the target.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", cut every layer alone to see what it bears. Here the loss
    on a part of val is measured without training, with the statistics of batch norms taken anew, and an integer
    programme chooses, as Shen et al. 2022 (HALP) do for a latency. What a space costs depends on the widths around it:
    costs are taken at the choice so far, the programme is solved again there, and so on, in several rounds of ever
    lower bounds; what is chosen in the end keeps the true bound. A latency is measured then, and chosen again by the
    same curves where the whole model takes another time than predicted.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    slot = context.slot("curves")
    state = slot.load() or {"losses": [], "table": {}, "chosen": [], "measured": []}
    search = Search(model, config, context, state["table"])
    structures = search.structures(search.model)

    def keep() -> None:
        state["table"] = search.amount.table
        slot.save(state)

    curves = measured_curves(structures, search, config, context, state["losses"], keep)

    def prepare(candidates: Iterator[Candidate]) -> None:
        cuts = ((structures.removed(one), structures.dropped(one)) for one in candidates)
        search.amount.prepare(structures.coupling, cuts)

    def find(target: float, before: int) -> Choice[Candidate]:
        if len(state["chosen"]) == before:
            bound = max(target, structures.cost(structures.smallest))
            state["chosen"].append(list(structures.canonical(choose_structure(structures, curves, bound, prepare))))
            keep()
        candidate = tuple(state["chosen"][before])
        cost, worth = structures.cost(candidate), -total(curves, candidate)
        return Choice(candidate, cost, lambda: search.cut(structures, candidate), candidate, worth)

    chosen, measured = search.correction(state["measured"], keep).search(find)
    _, check = search.proven(structures, chosen)
    facts = [
        {"name": name, "added_loss": [float(value) if math.isfinite(value) else None for value in curve]}
        for name, curve in zip(structures.names, curves, strict=True)
    ]
    return search.finish(
        search.result(structures, chosen),
        structures.cost(chosen),
        measured=measured,
        curves=facts,
        summed_loss=total(curves, chosen),
        check=check,
        **structures.describe(chosen),
    )


def measured_curves(
    structures: Structures,
    search: Search,
    config: SensitivityConfig,
    context: Context,
    losses: list[float],
    keep: Callable[[], None],
) -> Curves:
    """Return what each choice on each axis alone adds to the loss on val; never less than a wider one adds.

    Args:
        structures: What can be chosen.
        search: Makes the cuts.
        config: The settings.
        context: Gives val.
        losses: What was measured before an interruption, in order; new losses are added.
        keep: Called after each new one.

    Raises:
        StageError: The loss of the model as it is is not finite.
    """
    asked = [(place, choice) for place, most in enumerate(structures.last) for choice in _spread(most, config.points)]
    candidates = [structures.whole, *(with_choice(structures.whole, place, choice) for place, choice in asked)]
    samples = min(config.search_samples, len(context.data.val))
    with context.progress.work(f"{context.name}: measuring", len(candidates), done=len(losses)) as bar:
        for candidate in candidates[len(losses) :]:
            losses.append(mean_loss(search.fresh(structures, candidate), context, samples=samples))
            keep()
            bar.advance()
    if not math.isfinite(losses[0]):
        raise StageError("the model's loss on val is not finite", where=f"stages.{context.name}")
    curves = []
    for place, most in enumerate(structures.last):
        points = [0, *(choice for where, choice in asked if where == place)]
        added = [0.0, *(loss - losses[0] for (where, _), loss in zip(asked, losses[1:], strict=True) if where == place)]
        values = np.interp(np.arange(most + 1), points, np.nan_to_num(added, posinf=math.inf, nan=math.inf))
        curves.append(np.maximum.accumulate(np.where(np.isnan(values), math.inf, values)))
    return curves


def _spread(most: int, count: int) -> list[int]:
    """Return at most `count` of the choices from 1 to `most`, evenly spread, the last among them."""
    return sorted({round(most * number / min(count, most)) for number in range(1, min(count, most) + 1)})


def total(curves: Curves, candidate: Candidate) -> float:
    """Return what a candidate adds to the loss, if the axes did not depend on each other."""
    return float(sum(curve[choice] for curve, choice in zip(curves, candidate, strict=True)))


def choose_structure(
    structures: Structures,
    curves: Curves,
    bound: float,
    prepare: Callable[[Iterator[Candidate]], Any] = lambda candidates: None,
) -> Candidate:
    """Return the candidate of least summed loss that was found within a bound; the smallest there is fits it.

    Args:
        structures: What can be chosen.
        curves: What is added to the loss.
        bound: Largest true cost.
        prepare: Given the candidates whose costs will be asked for, to measure them in one go.
    """
    point, whole = structures.whole, structures.cost(structures.whole)
    limits = _limits(structures)
    best = _repaired(structures, curves, structures.smallest, bound)
    for number in range(1, _ROUNDS + 1):
        target = max(bound, whole * (bound / whole) ** (number / _ROUNDS))
        aim = target
        for _ in range(_CORRECTIONS):
            here, savings = structures.cost(point), _savings(structures, point, prepare)
            found = choose(curves, savings, here - aim, limits)
            if found is None:  # the linear costs say that nothing reaches it
                point = best
                break
            cost = structures.cost(found)
            if cost <= bound and total(curves, found) < total(curves, best):
                best = found
            settled, point = found == point, found
            if cost <= target and (settled or aim < target):
                break
            aim -= max(cost - target, 0.0)  # what the linear costs left out
    return min(
        (_repaired(structures, curves, one, bound) for one in (best, point)),
        key=lambda candidate: (total(curves, candidate), structures.cost(candidate), candidate),
    )


def _limits(structures: Structures) -> list[tuple[list[int], int]]:
    places = {branch.addition: len(structures.widths) + number for number, branch in enumerate(structures.branches)}
    chains = [
        ([places[name] for name in sorted(limit.additions) if name in places], limit) for limit in structures.limits
    ]
    return [(axes, limit.most) for axes, limit in chains if axes]


def _savings(
    structures: Structures, point: Candidate, prepare: Callable[[Iterator[Candidate]], Any]
) -> list[NDArray[np.float64]]:
    """Return what each choice saves beside that of a point, all else as it is there."""
    prepare(
        with_choice(point, place, choice) for place, most in enumerate(structures.last) for choice in range(most + 1)
    )
    here = structures.cost(point)
    return [
        np.array([here - structures.cost(with_choice(point, place, choice)) for choice in range(most + 1)])
        for place, most in enumerate(structures.last)
    ]


def _repaired(structures: Structures, curves: Curves, candidate: Candidate, bound: float) -> Candidate:
    """Return a candidate within the bound: narrowed where that costs least, then widened where most is gained."""
    while (cost := structures.cost(candidate)) > bound:
        steps = [one for one in _neighbours(structures, candidate, 1) if math.isfinite(total(curves, one))]
        gains = [(cost - structures.cost(one), one) for one in steps]
        gains = [(saved, one) for saved, one in gains if saved > 0]
        if not gains:
            return structures.smallest
        candidate = min(gains, key=lambda pair: (total(curves, pair[1]) - total(curves, candidate)) / pair[0])[1]
    while True:
        wider = [
            one
            for one in _neighbours(structures, candidate, -1)
            if total(curves, one) <= total(curves, candidate) and structures.cost(one) <= bound
        ]
        if not wider:
            return candidate
        candidate = min(wider, key=lambda one: total(curves, one))


def _neighbours(structures: Structures, candidate: Candidate, step: int) -> Iterator[Candidate]:
    """Yield the candidates that differ by one step on one axis."""
    for place, most in enumerate(structures.last):
        one = with_choice(candidate, place, candidate[place] + step)
        if 0 <= one[place] <= most and structures.allows(one):
            yield one
