"""The rounds that every structured pruning method runs: score, choose, cut, prove, fine-tune; they can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mil_cli.errors import StageError
from mil_cli.graph.coupling import Coupling, analyse, check_equivalence, cut
from mil_cli.stages.prune.amount import Amount
from mil_cli.stages.prune.arrange import Importance, arranged
from mil_cli.stages.prune.selection import Scores, describe_widths, least_classes, select
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.targets import width_multiple
from mil_cli.training.batch_norm import recalibrate
from mil_cli.training.evaluate import NotFiniteError, fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_CALIBRATION_BATCH = 64
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
    current = model.clone().eval()
    broken = [name for name, value in current.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        raise StageError(
            f"the weight '{broken[0]}' holds NaN or infinity",
            where=f"stages.{context.name}",
            hint="train the model again, with a lower learning rate, before it is pruned",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in current.named_parameters()}
    multiple = width_multiple(config.round_to, config.multiple, context.device)
    slot = context.slot("steps")
    state = slot.load() or {"cuts": [], "facts": [], "compared": {}, "table": {}, "weights": None}
    coupling = analyse(current)
    frozen = _frozen_facts(coupling)
    amount = Amount(config, context, state["table"] or known)
    start = amount.measure(coupling)({})
    goal = config.kept.resolve(start)
    if config.kept.absolute and goal >= start:
        has, allowed = amount.shown(start), amount.shown(goal)
        context.progress.notice(f"{context.name}: the model has {has}, the target allows {allowed}: nothing is cut")
    for removed in state["cuts"]:  # done before an interruption: the same cuts, then the weights as they were
        current = cut(current, analyse(current), {int(number): set(classes) for number, classes in removed.items()})
    if state["weights"] is not None:
        current.load_state_dict(state["weights"])
    with context.progress.work(f"{context.name}: pruning", total=config.steps) as bar:
        bar.advance(len(state["cuts"]))
        for step in range(len(state["cuts"]), config.steps):
            last = step == config.steps - 1
            target = goal if last else start * (goal / start) ** ((step + 1) / config.steps)
            before = current
            current, removed, facts = _round(
                before,
                config,
                context,
                importance,
                amount=amount,
                target=target,
                multiple=multiple,
                shapes=shapes,
                must_reach=last,
            )
            if amount.table:  # before anything trains: a run that goes on must decide by the same figures
                state["table"] = amount.table
                slot.save(state)
            state["facts"].append({"step": step + 1, **facts})
            if step == 0 and config.compare_samples and config.method != "random":
                drawn, _, _ = _round(
                    before,
                    config,
                    context,
                    lambda _, coupling: random_scores(coupling, context.generator("random")),
                    amount=amount,
                    target=target,
                    multiple=multiple,
                    shapes=shapes,
                    must_reach=False,
                )
                state["compared"] = {
                    "quality_after_the_first_cut": _quality(current, config, context),
                    "quality_after_a_random_cut": _quality(drawn, config, context),
                }
            if config.recover is not None and (not last or config.recover_last):
                current = context.finetune(
                    current, stage=config.recover, name=f"step{step + 1}", trainer=config.recover_trainer
                )
            else:
                current = _recalibrated(current, config, context)
            state["cuts"].append({number: sorted(classes) for number, classes in removed.items()})
            state["weights"] = {name: tensor.detach().clone() for name, tensor in current.state_dict().items()}
            slot.save(state)
            bar.advance(note=f"{config.quantity} {state['facts'][-1]['left'] / start:.1%}")
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
    measure = amount.measure(coupling)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    multiple = width_multiple(config.round_to, config.multiple, context.device)
    chosen = select(
        coupling,
        scores,
        target=config.kept.resolve(measure({})),
        measure=measure,
        multiple=multiple,
        least=least_classes(coupling, shapes, max_per_layer=config.max_per_layer),
        returns=amount.returns,
    )
    if not chosen.reached:
        raise _unreachable(config, context, amount.shown(measure({})), amount.shown(chosen.left), multiple, [])
    removed = {number: sorted(classes) for number, classes in chosen.removed.items()}
    slot.save({"removed": removed, "table": amount.table})
    return chosen.removed, amount.table


def random_scores(coupling: Coupling, generator: torch.Generator) -> Scores:
    """Return by space a random number for each class."""
    return [torch.rand(space.size, generator=generator, dtype=torch.float64).numpy() for space in coupling.spaces]


def _recalibrated(model: Model, config: StructuredPruningConfig, context: Context) -> Model:
    if not config.recalibrate_samples:
        return model
    size = fixed_batch(model) or _CALIBRATION_BATCH
    return recalibrate(model, context.calibration(samples=config.recalibrate_samples, batch_size=size))


def _quality(model: Model, config: StructuredPruningConfig, context: Context) -> float | None:
    """Return the quality of a cut model on some of val before anything trains it; None if outputs are not finite."""
    try:
        limit = min(config.compare_samples, len(context.data.val))
        return context.evaluate(_recalibrated(model, config, context), limit=limit).value
    except NotFiniteError:
        return None


def _round(
    model: Model,
    config: StructuredPruningConfig,
    context: Context,
    importance: Importance,
    *,
    amount: Amount,
    target: float,
    multiple: int,
    shapes: Mapping[str, tuple[int, ...]],
    must_reach: bool,
) -> tuple[Model, dict[int, set[int]], dict[str, Any]]:
    """Choose, cut and prove once; return the cut model, what was removed, and facts for the report."""
    coupling = analyse(model)
    if not any(space.free for space in coupling.spaces):
        raise StageError(
            "nothing of this model can be cut", where=f"stages.{context.name}", hint=_why_nothing(coupling)
        )
    measure = amount.measure(coupling)
    if config.independent:
        model, scores, independent = arranged(model, coupling, importance, context, samples=config.check_samples)
    else:
        scores, independent = importance(model, coupling), []
    unscored = {
        number: [label for label in space.free if np.isnan(scores[number][label])]
        for number, space in enumerate(coupling.spaces)
    }
    if all(len(unscored[number]) == len(space.free) for number, space in enumerate(coupling.spaces)):
        raise StageError(
            f"prune/{config.method} has no score for any channel of this model that can be cut",
            where=f"stages.{context.name}.method",
            hint="take another method: prune/magnitude scores every channel",
        )
    coupling = coupling.freeze_classes(unscored, f"prune/{config.method} has no score for it")
    failed: list[str] = []
    while True:
        least = least_classes(coupling, shapes, max_per_layer=config.max_per_layer)
        chosen = select(
            coupling,
            scores,
            target=target,
            measure=measure,
            multiple=multiple,
            least=least,
            returns=amount.returns,
        )
        if must_reach and not chosen.reached:
            raise _unreachable(config, context, amount.shown(measure({})), amount.shown(chosen.left), multiple, failed)
        result = cut(model, coupling, chosen.removed)
        size = fixed_batch(model) or config.check_samples
        calls = list(context.calibration(samples=config.check_samples, batch_size=size))
        report = check_equivalence(model, coupling, chosen.removed, result, calls)
        if report.equivalent:
            break
        names = [coupling.spaces[number].origin for number in report.failed]
        failed.extend(names)
        context.progress.notice(
            f"{context.name}: a cut of {', '.join(names)} changes more than it should "
            f"(difference {report.difference:.1e}); left as it is"
        )
        coupling = coupling.freeze(report.failed, "the cut did not pass the comparison with the uncut model")
    facts = {
        "target": target,
        "left": chosen.left,
        "check": {"difference": report.difference, "calls": report.samples, "compacted": list(report.compacted)},
        "failed": failed,
        "independent": [coupling.spaces[number].origin for number in independent],
        "unscored": [coupling.spaces[number].origin for number, classes in unscored.items() if classes],
    }
    return result, chosen.removed, facts


def _unreachable(
    config: StructuredPruningConfig,
    context: Context,
    start: str,
    least: str,
    multiple: int,
    failed: list[str],
) -> StageError:
    asked = getattr(config, config.quantity)
    frozen = f" and {len(failed)} groups that failed the check" if failed else ""
    return StageError(
        f"the smallest that can be kept of {start} is {least}, with max_per_layer "
        f"{config.max_per_layer}, widths in multiples of {multiple}{frozen}",
        where=f"stages.{context.name}.{config.quantity}",
        value=asked,
        hint="keep more, raise max_per_layer, or lower round_to",
    )


def _frozen_facts(coupling: Coupling) -> list[dict[str, Any]]:
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


def _why_nothing(coupling: Coupling) -> str:
    reasons = sorted({f"{frozen.reason} ({frozen.source_line or frozen.node})" for frozen in coupling.frozen})
    return "; ".join(reasons[:3]) or "it has no layers with weights"
