"""NetAdapt: each iteration keeps the cut that hurts least for what it saves, after a short training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.graph.coupling import analyse, cut
from mil_cli.graph.residual import remove_branches, residual_chains
from mil_cli.stages.breeding import with_choice
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.prune.schedule import weights_of
from mil_cli.stages.prune.searching import Search, SearchConfig
from mil_cli.stages.prune.selection import by_space
from mil_cli.stages.prune.structures import Structures
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.breeding import Candidate
    from mil_cli.stages.context import Context
    from mil_cli.stages.measured import Correction

_HALVINGS = 30


class NetadaptConfig(SearchConfig):
    """Settings of NetAdapt.

    Attributes:
        reduction: What the first iteration must save, as a part of what the model has at first. No more than single
            layers can save: else only the widths that run through whole stages are left to choose from.
        decay: What that is multiplied by from one iteration to the next.
        judge: What an iteration keeps: the candidate whose loss on val grows least for what it saves (``loss``), beside
            that of the uncut model after the same short training, and of those whose loss does not grow the one that
            saves most; or, as in the paper, the one of the best quality (``quality``), whatever it saves.
        finetune_steps: Steps of the optimizer for which every candidate is trained before it is scored; 0 trains none.
        finetune: Key of a train or distill stage of the recipe that does it; None trains on the task's loss.
        trainer: Trainer settings for that, over that stage's own.
    """

    method: ClassVar[str] = "netadapt"

    reduction: float = Field(0.04, gt=0, lt=1)
    decay: float = Field(0.98, gt=0, le=1)
    judge: Literal["loss", "quality"] = "loss"
    finetune_steps: int = Field(10, ge=0)
    finetune: str | None = None
    trainer: dict[str, Any] = Field(default_factory=lambda: {"learning_rate": 0.01})


@stage(NetadaptConfig)
def netadapt(model: Model, config: NetadaptConfig, context: Context) -> Model:
    """Narrow one space, or leave out one residual branch, per iteration until the target is met.

    Yang et al. 2018, "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications" (ECCV). An iteration
    proposes for each space the least removal, and each branch that may go, that saves the iteration's share; every
    proposal is trained shortly. The paper keeps the most accurate one, which leaves branches and the widths of whole
    stages no chance, since they save more than was asked for; here losses are compared per saving, unless `judge` says
    else. Where nothing saves as much, half of it is asked for. A latency is measured on the whole model half the way
    and at the end, and what is still to go follows from that.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, nothing can be cut, or the iterations never save enough.
    """
    adaptation = _Adaptation(model, config, context)
    correction = adaptation.correction()
    stop = correction.next_stop()
    with context.progress.work(f"{context.name}: adapting", 100, done=adaptation.share) as bar:
        while stop is not None:
            if adaptation.left > stop:
                before = adaptation.share
                if not adaptation.iterate(stop):
                    correction.conclude(adaptation.left, adaptation.model)
                    break
                note = f"{config.quantity} {adaptation.left / adaptation.search.start:.1%}"
                bar.advance(adaptation.share - before, note=note)
            elif correction.active:
                correction.measure(adaptation.left, adaptation.model)
                stop = correction.next_stop()
            else:
                break
    return adaptation.finish(correction.seconds)


class _Adaptation:
    """The iterations of one stage, and the checkpoint of those that are done.

    Args:
        model: The model before the stage; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Attributes:
        search: What is searched in.
        model: What the iterations have made of the model so far.

    Raises:
        StageError: The weights are not finite, or the iterations never save enough.
    """

    def __init__(self, model: Model, config: NetadaptConfig, context: Context) -> None:
        self._config, self._context = config, context
        self._slot = context.slot("iterations")
        self._state: dict[str, Any] = self._slot.load() or {
            "iterations": [],
            "weights": None,
            "scored": [],
            "best": None,
            "table": {},
            "measured": [],
        }
        self.search = Search(model, config, context, self._state["table"])
        _check_reach(config, context, self.search)
        self.model, self._gone = _replayed(self.search, self._state)

    @property
    def left(self) -> float:
        """What is left of the quantity."""
        done = self._state["iterations"]
        return float(done[-1]["left"]) if done else self.search.start

    @property
    def share(self) -> int:
        """How much of what must go has gone, in percent."""
        whole = self.search.start - self.search.goal
        return min(100, round(100 * (self.search.start - self.left) / whole)) if whole > 0 else 100

    def correction(self) -> Correction:
        """Return what corrects predicted latencies."""
        return self.search.correction(self._state["measured"], self._keep)

    def iterate(self, stop: float) -> bool:
        """Cut once; returns False if the target holds by prediction and nothing more can go.

        Args:
            stop: Less than this need not go.

        Raises:
            StageError: The target cannot be met, or nothing can be cut.
        """
        config, state, search, left = self._config, self._state, self.search, self.left
        structures = search.structures(self.model, self._gone)
        if left <= search.goal and structures.cost(structures.smallest) >= left:
            return False
        step = config.reduction * config.decay ** len(state["iterations"]) * search.start
        proposals = _proposals(structures, search, max(stop, left - step), left)
        if not proposals:
            if left <= search.goal:
                return False
            raise search.unreachable(structures.measure, left)
        if config.judge == "loss":
            proposals.insert(0, structures.whole)  # what the losses of the others are compared with
        self._score(proposals, structures)
        chosen = proposals[state["best"]["place"]]
        self.model, check = search.proven(structures, chosen)
        self.model.load_state_dict(state["best"]["weights"])
        scored = [
            {
                "name": _name(structures, proposal),
                config.judge: score if math.isfinite(score) else None,
                "left": structures.cost(proposal),
            }
            for proposal, score in zip(proposals, state["scored"], strict=True)
        ]
        done = {"left": structures.cost(chosen), "quality": search.quality(self.model), "check": check}
        state["iterations"].append({**_made(structures, chosen), **done, "proposals": scored})
        self._gone.extend(state["iterations"][-1]["branches"])
        state.update(weights=state["best"]["weights"], scored=[], best=None)
        self._keep()
        return True

    def _score(self, proposals: list[Candidate], structures: Structures) -> None:
        """Train and score the proposals that are not scored yet; the state keeps their scores and the best's weights.

        A proposal's checkpoint goes once its score is kept: there may be hundreds.
        """
        state, context, config = self._state, self._context, self._config
        names = [f"iteration{len(state['iterations'])}-{place}" for place in range(len(proposals))]
        for name in names[: len(state["scored"])]:  # an interruption may have come between keeping a score and this
            context.slot(f"{name}-fit").clear()
        for place in range(len(state["scored"]), len(proposals)):
            name, proposal = names[place], proposals[place]
            small = self.search.fresh(structures, proposal)
            if config.finetune_steps:
                small = context.finetune(
                    small, stage=config.finetune, name=name, trainer=config.trainer, steps=config.finetune_steps
                )
            state["scored"].append(self._judged(small))
            if proposal != structures.whole:
                price = self._price(state["scored"], self.left - structures.cost(proposal))
                if state["best"] is None or price < state["best"]["price"]:
                    state["best"] = {"place": place, "price": price, "weights": weights_of(small)}
            self._keep()
            context.slot(f"{name}-fit").clear()

    def _judged(self, model: Model) -> float:
        """Return a model's loss or quality on some of val."""
        if self._config.judge == "quality":
            return self.search.quality(model)
        samples = min(self._config.search_samples, len(self._context.data.val))
        return mean_loss(model, self._context, samples=samples)

    def _price(self, scores: list[float], saved: float) -> float:
        """Return what is paid for the last of some scored proposals; less is better."""
        if self._config.judge == "quality":
            return -scores[-1] if self._context.task.higher_is_better else scores[-1]
        growth = scores[-1] - (scores[0] if math.isfinite(scores[0]) else 0.0)
        return growth / saved if growth > 0 else -saved  # what costs nothing is the better, the more it saves

    def finish(self, measured: float | None) -> Model:
        """Note what was done, and fine-tune the result if the settings say so.

        Args:
            measured: What the result takes when it is measured as a whole, if it was.
        """
        for name in ("history", "stopped"):  # of the last proposal
            self._context.notes.pop(name, None)
        facts = self._state["iterations"]
        shown = [{key: value for key, value in fact.items() if key not in ("removed", "branches")} for fact in facts]
        return self.search.finish(self.model, self.left, measured=measured, iterations=shown, left_out=self._gone)

    def _keep(self) -> None:
        self._state["table"] = self.search.amount.table
        self._slot.save(self._state)


def _name(structures: Structures, candidate: Candidate) -> str:
    """Return the name of the one axis that a proposal changes; empty for the uncut model."""
    return next((name for name, choice in zip(structures.names, candidate, strict=True) if choice), "")


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


def _replayed(search: Search, state: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """Return the model as an interruption left it, and the additions of the branches that are gone."""
    model, gone = search.model, list[str]()
    for number, done in enumerate(state["iterations"]):
        coupling = analyse(model) if number else search.coupling
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

    There are none if nothing alone saves anything.
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
    return []


def _single(structures: Structures) -> Iterator[Candidate]:
    """Yield the candidates that differ from the whole model in one axis, the least removals of a space first."""
    for place, most in enumerate(structures.last):
        for choice in range(1, most + 1):
            yield with_choice(structures.whole, place, choice)
