"""One round of structured pruning: score the classes, choose, cut, prove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mil_cli.errors import StageError
from mil_cli.graph.coupling import Coupling, EquivalenceReport, Removed, analyse, check_equivalence, cut
from mil_cli.stages.measured import Choice, Correction
from mil_cli.stages.prune.amount import Amount, Measure
from mil_cli.stages.prune.arrange import Importance, arranged
from mil_cli.stages.prune.selection import Scores, Selection, least_classes, select
from mil_cli.stages.prune.settings import CutConfig

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


@dataclass(frozen=True)
class Scored:
    """A model whose classes have been judged.

    Attributes:
        model: The model, its channels arranged by importance within groups and heads.
        coupling: Its analysis; classes without a score are frozen.
        scores: Importance, by space and class.
        measure: Tells what a cut leaves of the quantity that the target bounds.
        facts: For the report.
    """

    model: Model
    coupling: Coupling
    scores: Scores
    measure: Measure
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Round:
    """What one round made.

    Attributes:
        model: The cut model.
        removed: By space of the model's analysis, the classes that are gone.
        facts: For the report.
    """

    model: Model
    removed: dict[int, set[int]]
    facts: dict[str, Any]


class Rounds:
    """The rounds of one stage.

    Args:
        config: The settings.
        context: Gives data and device.
        amount: The quantity that the target bounds.
        multiple: What widths end on.
        shapes: The shapes of the weights before the stage.
    """

    def __init__(
        self,
        config: CutConfig,
        context: Context,
        *,
        amount: Amount,
        multiple: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._config, self._context = config, context
        self._amount, self._multiple, self._shapes = amount, multiple, shapes

    def score(self, model: Model, importance: Importance, coupling: Coupling | None = None) -> Scored:
        """Judge every class of a model.

        Args:
            model: The model.
            importance: Scores of a model's classes, by space.
            coupling: The model's analysis, if there is one already.

        Raises:
            StageError: Nothing can be cut, or no class has a score.
        """
        config, context = self._config, self._context
        coupling = coupling or analyse(model)
        if not any(space.free for space in coupling.spaces):
            raise StageError(
                "nothing of this model can be cut", where=f"stages.{context.name}", hint=_why_nothing(coupling)
            )
        if config.independent:
            model, scores, independent = arranged(model, coupling, importance, self.check_calls(model))
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
        self._check_analysis(model, coupling)
        facts = {
            "independent": [coupling.spaces[number].origin for number in independent],
            "unscored": [coupling.spaces[number].origin for number, classes in unscored.items() if classes],
        }
        measure = self._amount.measure(coupling)  # before the freeze: what has no score is counted like all else
        coupling = coupling.freeze_classes(unscored, f"prune/{config.method} has no score for it")
        return Scored(model, coupling, scores, measure, facts)

    def _check_analysis(self, model: Model, coupling: Coupling) -> None:
        """Check that the nodes that the analysis rewrote change nothing.

        Raises:
            StageError: They do, or the model has no fixed outputs.
        """
        report = check_equivalence(model, coupling, {}, model, self.check_calls(model))
        if not report.equivalent:
            raise StageError(
                f"the analysed model differs from the model (difference {report.difference:.1e}): either it does not "
                "give the same outputs twice, or the analysis misunderstands it",
                where=f"stages.{self._context.name}",
                hint="take random numbers out of what it does in evaluation; else report this model",
            )

    def cut(self, scored: Scored, target: float, *, must_reach: bool) -> Round:
        """Remove the least important classes, and prove the cut; groups that fail the proof are kept.

        Args:
            scored: The model.
            target: Bound on what is left.
            must_reach: Whether it is an error if the target cannot be reached.

        Raises:
            StageError: It cannot.
        """
        model, coupling = scored.model, scored.coupling
        failed: list[str] = []
        while True:
            chosen = self._choose(coupling, scored, target)
            if must_reach and not chosen.reached:
                raise self.unreachable(scored.measure, chosen.left, failed=len(failed))
            result, report = self.proven(model, coupling, chosen.removed)
            if report.equivalent:
                break
            failed.extend(coupling.spaces[number].origin for number in report.failed)
            coupling = self.without_failed(coupling, report)
        facts = {
            "target": target,
            "left": chosen.left,
            "check": check_facts(report),
            "failed": failed,
            **scored.facts,
        }
        return Round(result, chosen.removed, facts)

    def proven(self, model: Model, coupling: Coupling, removed: Removed) -> tuple[Model, EquivalenceReport]:
        """Return a cut, and how it compares with the uncut model on training samples."""
        result = cut(model, coupling, removed)
        return result, check_equivalence(model, coupling, removed, result, self.check_calls(model))

    def check_calls(self, model: Model) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the training samples on which cuts are compared, as (args, kwargs)."""
        samples = self._config.check_samples
        return list(self._context.calibration(samples=samples, batch_size=samples, model=model))

    def without_failed(self, coupling: Coupling, report: EquivalenceReport) -> Coupling:
        """Return an analysis with the spaces frozen that failed a comparison; says so."""
        names = [coupling.spaces[number].origin for number in report.failed]
        self._context.progress.notice(
            f"{self._context.name}: a cut of {', '.join(names)} changes more than it should "
            f"(difference {report.difference:.1e}); left as it is"
        )
        return coupling.freeze(report.failed, "the cut did not pass the comparison with the uncut model")

    def cut_to_measured(self, scored: Scored, correction: Correction) -> Round:
        """Cut to the goal as `correction` tells it.

        Args:
            scored: The model.
            correction: Tells whether what was predicted holds when the whole model is measured.

        Raises:
            StageError: The first choice cannot reach the goal by prediction.
        """

        def find(target: float, before: int) -> Choice[Round]:
            made = self.cut(scored, target, must_reach=not before)
            return Choice(made.removed, made.facts["left"], lambda: made.model, made)

        made, seconds = correction.search(find)
        if seconds is not None:
            made.facts["measured"] = seconds
        return made

    def choose(self, scored: Scored) -> dict[int, set[int]]:
        """Return what one cut down to the whole target would remove.

        Raises:
            StageError: The target cannot be met.
        """
        goal = self._config.kept.resolve(scored.measure({}))
        chosen = self._choose(scored.coupling, scored, goal)
        if not chosen.reached:
            raise self.unreachable(scored.measure, chosen.left)
        return chosen.removed

    def _choose(self, coupling: Coupling, scored: Scored, target: float) -> Selection:
        return select(
            coupling,
            scored.scores,
            target=target,
            measure=scored.measure,
            multiple=self._multiple,
            least=least_classes(coupling, self._shapes, max_per_layer=self._config.max_per_layer),
            returns=self._amount.returns,
        )

    def unreachable(self, measure: Measure, least: float, *, failed: int = 0) -> StageError:
        """Return the error of a target that cannot be met."""
        config, shown = self._config, self._amount.shown
        start = shown(measure({}))
        frozen = f" and {failed} groups that failed the check" if failed else ""
        return StageError(
            f"the smallest that can be kept of {start} is {shown(least)}, with max_per_layer "
            f"{config.max_per_layer}, widths in multiples of {self._multiple}{frozen}",
            where=f"stages.{self._context.name}.{config.quantity}",
            value=getattr(config, config.quantity),
            hint="keep more, raise max_per_layer, or lower round_to",
        )


def check_facts(report: EquivalenceReport) -> dict[str, Any]:
    """Return what a report says of a comparison; JSON-able."""
    return {"difference": report.difference, "calls": report.samples, "compacted": list(report.compacted)}


def _why_nothing(coupling: Coupling) -> str:
    reasons = sorted({f"{frozen.reason} ({frozen.source_line or frozen.node})" for frozen in coupling.frozen})
    return "; ".join(reasons[:3]) or "it has no layers with weights"
