"""The rounds that every structured pruning method runs, with fine-tuning between them; they can be resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mil_cli.errors import StageError
from mil_cli.graph.coupling import Coupling, analyse, cut
from mil_cli.stages.judging import quality_or_worst, with_fresh_statistics
from mil_cli.stages.measured import Correction
from mil_cli.stages.prune.amount import Amount
from mil_cli.stages.prune.rounds import Round, Rounds, Scored
from mil_cli.stages.prune.selection import Scores, by_space, describe_widths
from mil_cli.stages.prune.settings import CutConfig, StructuredPruningConfig
from mil_cli.stages.targets import width_multiple

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.prune.arrange import Importance

_SHOWN_REASONS = 50


def prune(
    model: Model,
    config: StructuredPruningConfig,
    context: Context,
    importance: Importance,
    *,
    known: Mapping[str, float] | None = None,
) -> Model:
    """Cut a model down to its target in `config.steps` rounds.

    Each round analyses the graph, scores every class, removes the least important ones, and compares the cut with the
    uncut model on training samples; a group of coupled channels that fails the comparison is frozen, noted, and the
    round chosen again without it. What a round decided and the weights after it are checkpointed.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.
        importance: Scores of a model's classes, by space.
        known: A latency's table of operators, as far as it was measured already.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met with `max_per_layer` and the rounding, nothing can be cut, or the weights
            are not finite.
    """
    run = _Run(model, config, context, importance, known)
    with context.progress.work(f"{context.name}: pruning", total=config.steps) as bar:
        bar.advance(run.done)
        while run.done < config.steps:
            left = run.step()
            bar.advance(note=f"{config.quantity} {left:.1%}")
    run.note()
    return run.model.eval()


class _Run:
    """The steps of one stage, and the checkpoint of those that are done.

    Args:
        model: The model before the stage; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.
        importance: Scores of a model's classes, by space.
        known: A latency's table of operators, as far as it was measured already.

    Attributes:
        model: What the steps have made of the model so far.

    Raises:
        StageError: The weights are not finite.
    """

    def __init__(
        self,
        model: Model,
        config: StructuredPruningConfig,
        context: Context,
        importance: Importance,
        known: Mapping[str, float] | None,
    ) -> None:
        self._config, self._context, self._importance = config, context, importance
        original = model.clone().eval()
        check_finite(original, context)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in original.named_parameters()}
        self._multiple = width_multiple(config.round_to, config.multiple, context.device)
        self._slot = context.slot("steps")
        self._state: dict[str, Any] = self._slot.load() or {
            "cuts": [],
            "facts": [],
            "compared": {},
            "table": {},
            "measured": [],
            "weights": None,
        }
        self._coupling = analyse(original)
        self._amount = Amount(original, self._coupling, config, context, self._state["table"] or known)
        self._start = self._amount.measure(self._coupling)({})
        self._goal = config.kept.resolve(self._start)
        tell_if_met(config, context, self._amount, self._start)
        self._rounds = Rounds(config, context, amount=self._amount, multiple=self._multiple, shapes=self._shapes)
        self._correction = Correction(
            original,
            start=self._start,
            goal=self._goal,
            context=context,
            measured=self._state["measured"],
            keep=self._keep,
            active=config.measures_latency,
        )
        self.model = self._resumed(original)

    @property
    def done(self) -> int:
        """How many steps are done."""
        return len(self._state["cuts"])

    def step(self) -> float:
        """Cut once more, and fine-tune; returns the share of the quantity that is left.

        Raises:
            StageError: Nothing can be cut, or the target cannot be met.
        """
        first = self.done == 0
        scored = self._rounds.score(self.model, self._importance, self._coupling if first else None)
        made = self._cut(scored)
        if self._amount.table:
            self._keep()  # before anything trains: a run that goes on must decide by the same figures
        self._state["facts"].append({"step": self.done + 1, **made.facts})
        self.model = self._recovered(made, scored)
        self._state["cuts"].append(by_space(made.removed))
        self._state["weights"] = weights_of(self.model)
        self._keep()
        return float(made.facts["left"] / self._start)

    def note(self) -> None:
        """Tell the report what was done."""
        after = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters()}
        self._context.note(
            quantity=self._config.quantity,
            before=self._start,
            target=self._goal,
            multiple=self._multiple,
            steps=self._state["facts"],
            **self._state["compared"],
            widths=describe_widths(self._shapes, after),
            frozen=frozen_facts(self._coupling),
            latency_table=self._amount.table,
        )

    def _cut(self, scored: Scored) -> Round:
        steps = self._config.steps
        if self.done == steps - 1:
            return self._rounds.cut_to_measured(scored, self._correction)
        target = self._start * (self._goal / self._start) ** ((self.done + 1) / steps)
        return self._rounds.cut(scored, target, must_reach=False)

    def _recovered(self, made: Round, scored: Scored) -> Model:
        """Return what was cut, fine-tuned if the settings say so, else with fresh statistics of its batch norms."""
        config = self._config
        recovers = config.recover is not None and (self.done < config.steps - 1 or config.recover_last)
        compares = self.done == 0 and config.compare_samples > 0 and config.method != "random"
        fresh = made.model if recovers and not compares else self._fresh(made)
        if compares:
            self._state["compared"] = self._compared(fresh, scored, made)
        if not recovers:
            return fresh
        name = f"step{self.done + 1}"
        return self._context.finetune(made.model, stage=config.recover, name=name, trainer=config.recover_trainer)

    def _compared(self, fresh: Model, scored: Scored, made: Round) -> dict[str, float | None]:
        """Return the quality after a cut, and after one of the same size whose classes are judged at random."""
        scores = random_scores(scored.coupling, self._context.generator("random"))
        drawn = self._rounds.cut(replace(scored, scores=scores), made.facts["left"], must_reach=False)
        return {
            "quality_after_the_first_cut": self._quality(fresh),
            "quality_after_a_random_cut": self._quality(self._fresh(drawn)),
        }

    def _fresh(self, made: Round) -> Model:
        """Return what a round made with fresh statistics; as it is where nothing was cut, since they hold then."""
        samples = self._config.recalibrate_samples if any(made.removed.values()) else 0
        return with_fresh_statistics(made.model, self._context, samples=samples)

    def _quality(self, model: Model) -> float | None:
        """Return the quality of a cut model on some of val before anything trains it; None if it is not finite."""
        found = quality_or_worst(model, self._context, samples=self._config.compare_samples)
        return found if math.isfinite(found) else None

    def _resumed(self, model: Model) -> Model:
        """Return the model as an interruption left it: the same cuts, then the weights as they were."""
        for number, removed in enumerate(self._state["cuts"]):
            coupling = analyse(model) if number else self._coupling
            model = cut(model, coupling, {int(number): set(classes) for number, classes in removed.items()})
        if self._state["weights"] is not None:
            model.load_state_dict(self._state["weights"])
        return model

    def _keep(self) -> None:
        self._state["table"] = self._amount.table
        self._slot.save(self._state)


def choose(
    model: Model, coupling: Coupling, scores: Scores, config: StructuredPruningConfig, context: Context
) -> tuple[dict[int, set[int]], dict[str, float]]:
    """Return what one cut down to the whole target would remove, and the table of a latency; the same after a kill.

    Args:
        model: The model.
        coupling: Its analysis.
        scores: Importance of its classes, by space.
        config: The settings.
        context: Gives the device.

    Raises:
        StageError: The target cannot be met.
    """
    slot = context.slot("choice")
    state = slot.load()
    if state is not None:
        return {int(number): set(classes) for number, classes in state["removed"].items()}, state["table"]
    amount = Amount(model, coupling, config, context)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    multiple = width_multiple(config.round_to, config.multiple, context.device)
    rounds = Rounds(config, context, amount=amount, multiple=multiple, shapes=shapes)
    removed = rounds.choose(Scored(model, coupling, scores, amount.measure(coupling), {}))
    slot.save({"removed": by_space(removed), "table": amount.table})
    return removed, amount.table


def check_finite(model: Model, context: Context) -> None:
    """Check the weights that are going to be pruned.

    Raises:
        StageError: One is not finite.
    """
    broken = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        raise StageError(
            f"the weight '{broken[0]}' holds NaN or infinity",
            where=f"stages.{context.name}",
            hint="train the model again, with a lower learning rate, before it is pruned",
        )


def tell_if_met(config: CutConfig, context: Context, amount: Amount, start: float) -> None:
    """Say so where a model has no more than an absolute target allows."""
    goal = config.kept.resolve(start)
    if config.kept.absolute and goal >= start:
        has, allowed = amount.shown(start), amount.shown(goal)
        context.progress.notice(f"{context.name}: the model has {has}, the target allows {allowed}: nothing is cut")


def random_scores(coupling: Coupling, generator: torch.Generator) -> Scores:
    """Return by space a random number for each class."""
    return [torch.rand(space.size, generator=generator, dtype=torch.float64).numpy() for space in coupling.spaces]


def frozen_facts(coupling: Coupling) -> list[dict[str, Any]]:
    """Return what cannot be cut and why, one entry per parameter axis; JSON-able."""
    facts = [
        {
            "parameter": frozen.parameter,
            "axis": frozen.axis,
            "entries": frozen.entries,
            "size": frozen.size,
            "reason": frozen.reason,
            "node": frozen.node,
            "source": frozen.source_line,
        }
        for frozen in coupling.frozen
    ]
    return facts[:_SHOWN_REASONS]


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """Return a model's weights and statistics in the form that a checkpoint keeps."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
