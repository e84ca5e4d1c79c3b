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
    original = current = model.clone().eval()
    check_finite(current, context)
    shapes = {name: tuple(tensor.shape) for name, tensor in current.named_parameters()}
    multiple = width_multiple(config.round_to, config.multiple, context.device)
    slot = context.slot("steps")
    state = slot.load() or {"cuts": [], "facts": [], "compared": {}, "table": {}, "measured": [], "weights": None}
    coupling = analyse(current)
    frozen = frozen_facts(coupling)
    amount = Amount(config, context, state["table"] or known)
    start = amount.measure(coupling)({})
    goal = config.kept.resolve(start)
    tell_if_met(config, context, amount, start)
    current = _resumed(current, state)
    rounds = Rounds(config, context, amount=amount, multiple=multiple, shapes=shapes)

    def keep() -> None:  # before anything trains: a run that goes on must decide by the same figures
        state["table"] = amount.table
        slot.save(state)

    correction = Correction(
        original,
        start=start,
        goal=goal,
        context=context,
        measured=state["measured"],
        keep=keep,
        active=config.measures_latency,
    )
    with context.progress.work(f"{context.name}: pruning", total=config.steps) as bar:
        bar.advance(len(state["cuts"]))
        for step in range(len(state["cuts"]), config.steps):
            last = step == config.steps - 1
            target = start * (goal / start) ** ((step + 1) / config.steps)
            scored = rounds.score(current, importance)
            made = rounds.cut_to_measured(scored, correction) if last else rounds.cut(scored, target, must_reach=False)
            if amount.table:
                keep()
            state["facts"].append({"step": step + 1, **made.facts})
            recover = config.recover is not None and (not last or config.recover_last)
            compares = step == 0 and config.compare_samples > 0 and config.method != "random"
            fresh = made.model if recover and not compares else _fresh(made.model, config, context)
            if compares:
                state["compared"] = _compared(fresh, scored, made, rounds, config, context)
            current = fresh
            if recover:
                current = context.finetune(
                    made.model, stage=config.recover, name=f"step{step + 1}", trainer=config.recover_trainer
                )
            state["cuts"].append(by_space(made.removed))
            state["weights"] = weights_of(current)
            slot.save(state)
            bar.advance(note=f"{config.quantity} {made.facts['left'] / start:.1%}")
    after = {name: tuple(tensor.shape) for name, tensor in current.named_parameters()}
    context.note(
        quantity=config.quantity,
        before=start,
        target=goal,
        multiple=multiple,
        steps=state["facts"],
        **state["compared"],
        widths=describe_widths(shapes, after),
        frozen=frozen,
        latency_table=amount.table,
    )
    return current.eval()


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
    amount = Amount(config, context)
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


def _resumed(model: Model, state: Mapping[str, Any]) -> Model:
    """Return the model as an interruption left it: the same cuts, then the weights as they were."""
    for removed in state["cuts"]:
        model = cut(model, analyse(model), {int(number): set(classes) for number, classes in removed.items()})
    if state["weights"] is not None:
        model.load_state_dict(state["weights"])
    return model


def _compared(
    fresh: Model, scored: Scored, made: Round, rounds: Rounds, config: StructuredPruningConfig, context: Context
) -> dict[str, float | None]:
    """Return the quality after a cut, and after one of the same size whose classes are judged at random."""
    scores = random_scores(scored.coupling, context.generator("random"))
    judged = replace(scored, scores=scores)
    drawn = rounds.cut(judged, made.facts["left"], must_reach=False).model
    return {
        "quality_after_the_first_cut": _quality(fresh, config, context),
        "quality_after_a_random_cut": _quality(_fresh(drawn, config, context), config, context),
    }


def _fresh(model: Model, config: StructuredPruningConfig, context: Context) -> Model:
    return with_fresh_statistics(model, context, samples=config.recalibrate_samples)


def _quality(model: Model, config: StructuredPruningConfig, context: Context) -> float | None:
    """Return the quality of a cut model on some of val before anything trains it; None if outputs are not finite."""
    found = quality_or_worst(model, context, samples=config.compare_samples)
    return found if math.isfinite(found) else None
