"""NetAdapt: each iteration keeps the cut that hurts least of all that save a given amount, after a short training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.graph.coupling import analyse, cut
from mil_cli.graph.residual import remove_branches, residual_chains
from mil_cli.stages.prune.schedule import weights_of
from mil_cli.stages.prune.searching import Search, SearchConfig
from mil_cli.stages.prune.selection import by_space
from mil_cli.stages.prune.structures import Structures, with_choice
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.breeding import Candidate
    from mil_cli.stages.context import Context

_HALVINGS = 30


class NetadaptConfig(SearchConfig):
    """Settings of NetAdapt.

    Attributes:
        reduction: What the first iteration must save, as a part of what the model has at first. No more than single
            layers can save: else only the widths that run through whole stages are left to choose from.
        decay: What that is multiplied by from one iteration to the next.
        finetune_steps: Steps of the optimizer for which every candidate is trained before it is scored; 0 trains none.
        finetune: Key of a train or distill stage of the recipe that does it; None trains on the task's loss.
        trainer: Trainer settings for that, over that stage's own.
    """

    method: ClassVar[str] = "netadapt"

    reduction: float = Field(0.03, gt=0, lt=1)
    decay: float = Field(0.98, gt=0, le=1)
    finetune_steps: int = Field(30, ge=0)
    finetune: str | None = None
    trainer: dict[str, Any] = Field(default_factory=lambda: {"learning_rate": 0.01})


@stage(NetadaptConfig)
def netadapt(model: Model, config: NetadaptConfig, context: Context) -> Model:
    """Narrow one space, or leave out one residual branch, per iteration until the target is met.

    Yang et al. 2018, "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications" (ECCV). An iteration
    proposes for each space the least removal, and each branch that may go, that saves the iteration's share; every
    proposal is trained shortly, and the best on val is kept. Where nothing saves as much, half of it is asked for. A
    latency is measured on the whole model half the way and at the end, and what is still to go follows from that.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, nothing can be cut, or the iterations never save enough.
    """
    slot = context.slot("iterations")
    state = slot.load() or {
        "iterations": [],
        "weights": None,
        "scored": [],
        "best": None,
        "table": {},
        "measured": [],
    }
    search = Search(model, config, context, state["table"])
    _check_reach(config, context, search)
    current, gone = _replayed(search.model, state)
    facts: list[dict[str, Any]] = state["iterations"]
    left = facts[-1]["left"] if facts else search.start
    whole = search.start - search.goal
    correction = search.correction(state["measured"], lambda: slot.save(state))
    stop = correction.next_stop()
    with context.progress.work(f"{context.name}: adapting", 100, done=_share(search.start - left, whole)) as bar:
        while stop is not None:
            if left <= stop:
                if not correction.active:
                    break
                correction.measure(left, current)
                stop = correction.next_stop()
                continue
            structures = search.structures(current, gone)
            if left <= search.goal and structures.cost(structures.smallest) >= left:
                break  # nothing more can go, whatever was measured
            step = config.reduction * config.decay ** len(facts) * search.start
            proposals = _proposals(structures, search, max(stop, left - step), left)
            _score(proposals, structures, search, config, context, state)
            state["table"] = search.amount.table
            chosen = proposals[state["best"]["place"]]
            current, check = search.proven(structures, chosen)
            current.load_state_dict(state["best"]["weights"])
            before, left = left, structures.cost(chosen)
            scored = [
                {"name": _name(structures, proposal), "quality": quality}
                for proposal, quality in zip(proposals, state["scored"], strict=True)
            ]
            done = {"left": left, "quality": state["best"]["quality"], "check": check, "proposals": scored}
            facts.append({**_made(structures, chosen), **done})
            gone.extend(facts[-1]["branches"])
            state.update(weights=state["best"]["weights"], scored=[], best=None)
            slot.save(state)
            bar.advance(
                _share(search.start - left, whole) - _share(search.start - before, whole),
                note=f"{config.quantity} {left / search.start:.1%}",
            )
    for name in ("history", "stopped"):  # of the last proposal
        context.notes.pop(name, None)
    shown = [{key: value for key, value in fact.items() if key not in ("removed", "branches")} for fact in facts]
    return search.finish(current, left, measured=correction.seconds, iterations=shown, left_out=gone)


def _share(saved: float, whole: float) -> int:
    return min(100, round(100 * saved / whole)) if whole > 0 else 100


def _name(structures: Structures, candidate: Candidate) -> str:
    """Return the name of the one axis that a proposal changes."""
    return next(name for name, choice in zip(structures.names, candidate, strict=True) if choice)


def _made(structures: Structures, candidate: Candidate) -> dict[str, Any]:
    """Return what a proposal changes, so that it can be made again."""
    return {
        "chosen": _name(structures, candidate),
        "removed": by_space(structures.removed(candidate)),
        "branches": [branch.addition for branch in structures.left_out(candidate)],
    }


def _check_reach(config: NetadaptConfig, context: Context, search: Search) -> None:
    needed = 1 - search.goal / search.start
    total = config.reduction / (1 - config.decay) if config.decay < 1 else float("inf")
    if total <= needed:
        raise StageError(
            f"all iterations together save at most {total:.0%}, reduction / (1 - decay), and the target asks for "
            f"{needed:.0%}",
            where=f"stages.{context.name}.reduction",
            value=config.reduction,
            hint="raise reduction or decay",
        )


def _replayed(model: Model, state: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """Return the model as an interruption left it, and the additions of the branches that are gone."""
    gone: list[str] = []
    for done in state["iterations"]:
        coupling = analyse(model)
        model = cut(model, coupling, done["removed"])
        chains = residual_chains(coupling.graph)
        remove_branches(
            model.graph, [branch for chain in chains for branch in chain if branch.addition in done["branches"]]
        )
        gone.extend(done["branches"])
    if state["weights"] is not None:
        model.load_state_dict(state["weights"])
    return model, gone


def _proposals(structures: Structures, search: Search, bound: float, left: float) -> list[Candidate]:
    """Return by space the least removal, and each branch, that leave at most `bound`; half the saving if none does.

    Raises:
        StageError: Nothing saves anything.
    """
    single = list(_single(structures))
    search.amount.prepare(structures.coupling, ((structures.removed(one), structures.dropped(one)) for one in single))
    for _ in range(_HALVINGS):
        found: dict[int, Candidate] = {}
        for candidate in single:
            place = next(place for place, choice in enumerate(candidate) if choice)
            if place not in found and structures.cost(candidate) <= bound:
                found[place] = candidate
        if found:
            return list(found.values())
        bound = (bound + left) / 2
    raise search.unreachable(structures.measure, left)


def _single(structures: Structures) -> Iterator[Candidate]:
    """Yield the candidates that differ from the whole model in one axis, the least removals of a space first."""
    for place, most in enumerate(structures.last):
        for choice in range(1, most + 1):
            yield with_choice(structures.whole, place, choice)


def _score(
    proposals: list[Candidate],
    structures: Structures,
    search: Search,
    config: NetadaptConfig,
    context: Context,
    state: dict[str, Any],
) -> None:
    """Train and score the proposals that are not scored yet; the state keeps their qualities and the best's weights.

    A proposal's checkpoint goes once its score is kept: there may be hundreds.
    """
    iteration = len(state["iterations"])
    higher = context.task.higher_is_better
    names = [f"iteration{iteration}-{place}" for place in range(len(proposals))]
    for name in names[: len(state["scored"])]:  # an interruption may have come between keeping a score and this
        context.slot(f"{name}-fit").clear()
    for place in range(len(state["scored"]), len(proposals)):
        name, small = names[place], search.fresh(structures, proposals[place])
        if config.finetune_steps:
            small = context.finetune(
                small, stage=config.finetune, name=name, trainer=config.trainer, steps=config.finetune_steps
            )
        quality = search.quality(small)
        best = state["best"]
        if best is None or (quality > best["quality"] if higher else quality < best["quality"]):
            state["best"] = {"place": place, "quality": quality, "weights": weights_of(small)}
        state["scored"].append(quality)
        state["table"] = search.amount.table
        context.slot("iterations").save(state)
        context.slot(f"{name}-fit").clear()
