"""What methods share that search a structure: settings, what there is to choose from, the proof of what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.graph.coupling import Coupling, analyse, cut, group_norms, repair, step_of
from mil_cli.graph.coupling.equivalence import TOLERANCE, relative_difference
from mil_cli.graph.coupling.record import flat_inputs
from mil_cli.graph.residual import Shortcuts, remove_branches, residual_chains
from mil_cli.stages.judging import quality_or_worst, with_fresh_statistics
from mil_cli.stages.measured import Correction
from mil_cli.stages.prune.activation import mean_magnitude
from mil_cli.stages.prune.amount import Amount, Measure
from mil_cli.stages.prune.fpgm import distances
from mil_cli.stages.prune.rounds import Rounds, Scored, check_facts
from mil_cli.stages.prune.schedule import check_finite, frozen_facts, tell_if_met
from mil_cli.stages.prune.selection import Scores, chunks_of, describe_widths, least_classes
from mil_cli.stages.prune.settings import CutConfig
from mil_cli.stages.prune.structures import Structures, Width, limits_of
from mil_cli.stages.prune.taylor import first_order
from mil_cli.stages.prune.values import score_values
from mil_cli.stages.targets import width_multiple
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.breeding import Candidate
    from mil_cli.stages.context import Context

_IMPORTANCE_BATCH = 128


class SearchConfig(CutConfig):
    """Settings of a method that searches how wide each space is and which residual branches stay.

    Attributes:
        importance: What decides which classes of a space go first, as in the pruning method of that name.
        importance_samples: Training samples that it looks at, if it looks at any.
        max_per_chain: Largest part of the branches of a residual chain that may be left out; 0 leaves the depth.
        search_samples: Samples of val on which structures are judged.
    """

    importance: Literal["magnitude", "taylor", "fpgm", "activation"] = "magnitude"
    importance_samples: int = Field(1024, ge=1)
    max_per_chain: float = Field(0.8, ge=0, le=1)
    search_samples: int = Field(2000, ge=1)


class Search:
    """What one stage searches in, and how what it found is cut, proven and reported.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.
        known: A latency's table of operators, as far as it was measured before an interruption.

    Attributes:
        model: The model before the stage, in evaluation mode.
        coupling: Its analysis.
        amount: The quantity that the target bounds.
        start: What the model has of it.
        goal: What it may have in the end.

    Raises:
        StageError: The weights are not finite.
    """

    def __init__(self, model: Model, config: SearchConfig, context: Context, known: Mapping[str, float]) -> None:
        self._config, self._context = config, context
        self.model = model.clone().eval()
        check_finite(self.model, context)
        size = fixed_batch(self.model)
        if size is not None and size > len(context.data.val):
            raise StageError(
                f"the model takes batches of {size}, and val has {len(context.data.val)} samples",
                where=f"stages.{context.name}",
                hint="capture the model with a free or smaller batch, or give val more samples",
            )
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.model.named_parameters()}
        self._multiple = width_multiple(config.round_to, config.multiple, context.device)
        self.coupling = analyse(self.model)
        self.amount = Amount(self.model, self.coupling, config, context, known)
        self._limits = limits_of(residual_chains(self.coupling.graph), most=config.max_per_chain)
        self.start = self.amount.measure(self.coupling)({})
        self.goal = config.kept.resolve(self.start)
        self._rounds = Rounds(config, context, amount=self.amount, multiple=self._multiple, shapes=self._shapes)
        tell_if_met(config, context, self.amount, self.start)

    def correction(self, measured: list[list[float]], keep: Callable[[], None]) -> Correction:
        """Return what corrects predicted latencies; it does nothing where the target bounds something else.

        Args:
            measured: What was measured before an interruption; new measurements are added.
            keep: Called after each new one.
        """
        return Correction(
            self.model,
            start=self.start,
            goal=self.goal,
            context=self._context,
            measured=measured,
            keep=keep,
            active=self._config.measures_latency,
        )

    def structures(self, model: Model, gone: Collection[str] = ()) -> Structures:
        """Return what can be chosen for a model, once a cut of all that can go has been compared with the model.

        Args:
            model: The model, or what earlier cuts made of it.
            gone: The additions of branches that were left out before.

        Raises:
            StageError: Nothing can be cut.
        """
        scored = self._rounds.score(model, self._importance, self.coupling if model is self.model else None)
        coupling = scored.coupling
        while True:
            widths = self._widths(scored, coupling)
            every = {width.space: {label for chunk in width.chunks for label in chunk} for width in widths}
            _, report = self._rounds.proven(scored.model, coupling, repair(coupling, every))
            if report.equivalent:
                break
            coupling = self._rounds.without_failed(coupling, report)
        limits = tuple(limit.without(gone) for limit in self._limits)
        may_go = frozenset[str]().union(*(limit.additions for limit in limits if limit.most > 0))
        branches = tuple(
            branch for chain in residual_chains(coupling.graph) for branch in chain if branch.addition in may_go
        )
        found = Structures(scored.model, coupling, widths, branches, limits, scored.measure)
        least = found.cost(found.smallest)
        if least > self.goal and model is self.model:
            raise self.unreachable(scored.measure, least)
        return found

    def _widths(self, scored: Scored, coupling: Coupling) -> tuple[Width, ...]:
        least = least_classes(coupling, self._shapes, max_per_layer=self._config.max_per_layer)
        found = []
        for number, space in enumerate(coupling.spaces):
            step = step_of(space, self._multiple)
            chunks = chunks_of(number, space, scored.scores[number], step=step, least=least[number])
            if chunks:
                found.append(Width(space.origin, number, space.size, tuple(chunk.classes for chunk in chunks)))
        return tuple(found)

    def _importance(self, model: Model, coupling: Coupling) -> Scores:
        config, context = self._config, self._context
        sampled = {"samples": config.importance_samples, "batch_size": _IMPORTANCE_BATCH}
        match config.importance:
            case "magnitude":
                return group_norms(model.graph, coupling)
            case "taylor":
                return first_order(model, coupling, context, normalise=True, **sampled)
            case "fpgm":
                return distances(model.graph, coupling)
            case "activation":
                return score_values(model, coupling, mean_magnitude, context, **sampled)

    def cut(self, structures: Structures, candidate: Candidate) -> Model:
        """Return a candidate as a model of its own, in evaluation mode, with the weights that it keeps."""
        result = cut(structures.model, structures.coupling, structures.removed(candidate))
        branches = structures.left_out(candidate)
        if branches:
            remove_branches(result.graph, branches)
        return result

    def fresh(self, structures: Structures, candidate: Candidate) -> Model:
        """Return a candidate with the statistics of its batch norms taken anew."""
        cut_ = self.cut(structures, candidate)
        return with_fresh_statistics(cut_, self._context, samples=self._config.recalibrate_samples)

    def result(self, structures: Structures, candidate: Candidate) -> Model:
        """Return a candidate as the stage gives it: with fresh statistics, but where nothing is cut, as it came in."""
        return self.model if candidate == structures.whole else self.fresh(structures, candidate)

    def quality(self, model: Model) -> float:
        """Return a model's quality on some of val; the worst there is if its outputs are not finite."""
        return quality_or_worst(model, self._context, samples=self._config.search_samples)

    def proven(self, structures: Structures, candidate: Candidate) -> tuple[Model, dict[str, Any]]:
        """Return a candidate after its widths, then its depth, were compared with the uncut model.

        Raises:
            StageError: They differ.
        """
        model, coupling = structures.model, structures.coupling
        result, report = self._rounds.proven(model, coupling, structures.removed(candidate))
        branches = structures.left_out(candidate)
        difference = report.difference
        if branches:
            calls = [flat_inputs(result.graph, args, kwargs) for args, kwargs in self._rounds.check_calls(model)]
            reference = Shortcuts(result.graph, branches)
            with torch.no_grad():
                expected = [reference.run(*call, enable_io_processing=False) for call in calls]
                remove_branches(result.graph, branches)
                given = [torch.fx.Interpreter(result.graph).run(*call, enable_io_processing=False) for call in calls]
            leaves = zip(*map(torch.utils._pytree.tree_leaves, (expected, given)), strict=True)
            difference = max([difference, *(relative_difference(one, other) for one, other in leaves)])
        if not difference <= TOLERANCE:
            raise StageError(
                f"the structure that was chosen does not compute what the model does without what was cut "
                f"(difference {difference:.1e})",
                where=f"stages.{self._context.name}",
                hint="take prune/magnitude, which leaves out what fails this comparison",
            )
        return result, {**check_facts(report), "difference": difference}

    def unreachable(self, measure: Measure, least: float) -> StageError:
        """Return the error of a target that cannot be met."""
        error = self._rounds.unreachable(measure, least)
        return StageError(
            f"{error.what}, and max_per_chain {self._config.max_per_chain}",
            where=error.where,
            value=error.value,
            hint="keep more, raise max_per_layer or max_per_chain, or lower round_to",
        )

    def finish(self, model: Model, left: float, *, measured: float | None = None, **facts: object) -> Model:
        """Note what was found, and fine-tune it if the settings say so.

        Args:
            model: What was found.
            left: What it has of the quantity.
            measured: What it has when it is measured as a whole, if it was.
            facts: More for the report.

        Returns:
            The model, in evaluation mode.
        """
        config, context = self._config, self._context
        after = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        context.note(
            quantity=config.quantity,
            before=self.start,
            target=self.goal,
            left=left,
            **({} if measured is None else {"measured": measured}),
            multiple=self._multiple,
            importance=config.importance,
            widths=describe_widths(self._shapes, after),
            frozen=frozen_facts(self.coupling),
            latency_table=self.amount.table,
            **facts,
        )
        return config.recovered(model.eval(), context, name="result")
