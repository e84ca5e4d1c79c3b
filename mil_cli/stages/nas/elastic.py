"""Architecture search inside a trained model: it becomes a weight-sharing supernet, and its best small net is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from mil_cli.errors import ModelError, StageError
from mil_cli.graph.coupling import Coupling, analyse, group_norms, reorder, shared_cut
from mil_cli.graph.model import Model
from mil_cli.graph.residual import ResidualBranch, leave_out, residual_chains
from mil_cli.stages.breeding import Candidate, Scored
from mil_cli.stages.fitting import Filling, Fitting
from mil_cli.stages.generations import Generations
from mil_cli.stages.judging import quality_or_worst, with_fresh_statistics
from mil_cli.stages.measured import Choice, Correction, latency_seconds
from mil_cli.stages.nas.cost import CandidateCost
from mil_cli.stages.nas.space import ElasticSpace, Resolution, depths_of, resolution_of, widths_of
from mil_cli.stages.nas.supernet import cut_candidate, sandwich
from mil_cli.stages.registry import stage
from mil_cli.stages.target_config import TargetConfig
from mil_cli.stages.targets import width_multiple

if TYPE_CHECKING:
    from mil_cli.stages.context import Context

_BATCH = 64
_PROVEN = 16
"""Samples on which a model with its channels in another order must give what it gave."""

_GENERATIONS = 5
_LEAST_EVALUATIONS = 8
_SHOWN = 20


class ElasticConfig(TargetConfig):
    """Settings of ``nas/elastic``.

    Attributes:
        min_width: Smallest share of any width (channels, heads, hidden units) that a candidate may have.
        min_depth: Smallest share of a chain of residual branches; one branch of each is always kept.
        min_resolution: Smallest share of the images' height and width: a candidate may shrink what it is given before
            all else. 1: images stay as they are.
        choices: Most widths, or sizes of images, to choose from on one axis.
        trainer: Overrides of the recipe's trainer settings, for the supernet.
        random: Random candidates that each step trains, beside the whole net and the smallest one.
        temperature: By which class scores are divided where candidates learn from the whole net.
        importance_samples: Training samples on which each residual branch is left out, to put them in order.
        evaluations: Candidates that are scored on val.
        population: How many of them each generation has.
        minutes: Time for scoring; sets `evaluations` and `population` by what one score takes here. The result then
            depends on the machine's speed. None: as many as `evaluations` says.
        search_samples: Samples of val that a score is taken on.
        recalibrate_samples: Training samples from which the batch norms of a candidate take their statistics.
    """

    family: ClassVar[str] = "nas"
    method: ClassVar[str] = "elastic"
    version: ClassVar[int] = 4

    min_width: float = Field(0.25, gt=0, le=1)
    min_depth: float = Field(0.3, gt=0, le=1)
    min_resolution: float = Field(1.0, ge=0.5, le=1)
    choices: int = Field(6, ge=2, le=1000)
    trainer: dict[str, Any] = Field(default_factory=dict)
    random: int = Field(2, ge=0, le=16)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    importance_samples: int = Field(512, ge=1)
    evaluations: int = Field(96, ge=1)
    population: int = Field(24, ge=2)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    search_samples: int = Field(5000, ge=1)
    recalibrate_samples: int = Field(1024, ge=0)


@stage(ElasticConfig)
def elastic(model: Model, config: ElasticConfig, context: Context) -> Model:
    """Return the best smaller net that a model holds under a bound.

    The channels and residual branches of the model are put in the order of their importance; a candidate keeps the
    first ones of each, and sees images of a size that it has chosen. All candidates share the model's weights while
    they are trained together (Yu et al. 2020, "BigNAS"; Cai et al. 2020, "Once-for-All"), then an evolutionary search
    scores candidates within the bound on val, each with the statistics of its batch norms taken anew. The best is cut
    out, and fine-tuned if `recover` says so. Where it takes another time than was predicted for a latency, the best are
    bred on, shortly, under a bound that makes up for it.

    Args:
        model: The trained model; not changed.
        config: The settings.
        context: Gives data, device, trainer, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: Nothing of the model can shrink, it takes no smaller images though some are asked for, or no
            candidate is within the bound.
    """
    ordered, space = prepare(model, config, context)
    search = _Search(model, space, config, context)
    found, measured = search.run(lambda: train_supernet(ordered, space, config, context))
    best = found[0]
    context.note(
        quantity=config.quantity,
        before=search.whole,
        target=search.bound,
        left=best.cost,
        **({} if measured is None else {"measured": measured}),
        candidates=space.size,
        scored=search.scored,
        search_quality=best.quality,
        architecture=space.describe(best.candidate),
        best=[{"quality": entry.quality, config.quantity: entry.cost} for entry in found[:_SHOWN]],
        latency_table=search.cost.table(),
    )
    chosen = candidate_model(search.supernet, space, best.candidate, config, context)
    return config.recovered(chosen, context, name="winner")


class _Search:
    """The search of one stage, with what it had reached when it was interrupted.

    Args:
        model: The model that came in.
        space: The space.
        config: The settings.
        context: Gives data, device and checkpoints.

    Raises:
        StageError: No candidate is within the bound.
    """

    supernet: Model

    def __init__(self, model: Model, space: ElasticSpace, config: ElasticConfig, context: Context) -> None:
        self._model, self._space, self._config, self._context = model, space, config, context
        self._slot = context.slot("search")
        self._state = self._slot.load() or {"plan": None, "scored": [], "table": {}, "measured": []}
        absolute = config.measures_latency and config.kept.absolute
        self.cost = CandidateCost(
            space,
            config.quantity,
            kernels=config.multiple,
            device=context.device,
            known=self._state["table"],
            progress=context.progress,
            whole=(lambda: latency_seconds(model, context)) if absolute else None,
        )
        self.whole = self.cost(space.largest)
        self.bound = config.kept.resolve(self.whole)
        self._generations = Generations(context, state=self._state, keep=self._keep, cost=self.cost, score=self._score)
        least = self.cost(space.smallest)
        if least > self.bound:
            raise self._too_small(f"the smallest candidate has {least:,.6g} of {self.whole:,.6g} {config.quantity}")

    def run(self, train: Callable[[], Model]) -> tuple[list[Scored], float | None]:
        """Train the supernet, score candidates, and return them, the best first, and the measured seconds of that.

        Args:
            train: Gives the trained supernet.

        Raises:
            StageError: No candidate within the bound was found, or none gives finite outputs.
        """
        self.supernet = train()
        if self._state["plan"] is None:
            self._state["plan"] = _plan(self._config, lambda: self._score(self._space.largest))
        correction = Correction(
            self._model,
            start=self.whole,
            goal=self.bound,
            context=self._context,
            measured=self._state["measured"],
            keep=self._keep,
            active=self._config.measures_latency,
        )
        return correction.search(self._choice)

    @property
    def scored(self) -> int:
        """How many candidates were scored."""
        return len(self._state["scored"])

    def _keep(self) -> None:
        self._state["table"] = self.cost.table()
        self._slot.save(self._state)

    def _choice(self, target: float, before: int) -> Choice[list[Scored]]:
        space, context = self._space, self._context
        bound = max(target, self.cost(space.smallest))
        fitting = Fitting(space, self.cost, bound)
        filling = Filling(space, fitting)
        found = self._generations.best(filling, fitting, bound, before=before, **self._state["plan"])
        if not found:
            raise self._too_small("no candidate within the bound was found")
        best = found[0]
        if not math.isfinite(best.quality):
            hint = f"lower stages.{context.name}.trainer.learning_rate, or keep more"
            raise StageError("no candidate gives finite outputs", where=f"stages.{context.name}", hint=hint)
        worth = best.quality if context.task.higher_is_better else -best.quality
        cut = partial(cut_candidate, space, best.candidate, self.supernet)
        return Choice(best.candidate, best.cost, cut, found, worth)

    def _score(self, candidate: Candidate) -> float:
        model = candidate_model(self.supernet, self._space, candidate, self._config, self._context)
        return quality_or_worst(model, self._context, samples=self._config.search_samples)

    def _too_small(self, problem: str) -> StageError:
        quantity = self._config.quantity
        return StageError(
            problem,
            where=f"stages.{self._context.name}.{quantity}",
            value=getattr(self._config, quantity),
            hint="keep more, or lower min_width, min_depth and min_resolution",
        )


def prepare(model: Model, config: ElasticConfig, context: Context) -> tuple[Model, ElasticSpace]:
    """Return the model with its channels in the order of importance, and the space of its candidates.

    Raises:
        StageError: Nothing of the model can shrink, or it takes no smaller images though some are asked for.
    """
    ordered = model.clone().eval()
    coupling = analyse(ordered)
    multiple = width_multiple(config.round_to, config.multiple, context.device)
    widths = widths_of(coupling, smallest=config.min_width, multiple=multiple, most=config.choices)
    chains = residual_chains(coupling.graph)
    costs = _branch_costs(ordered, coupling, chains, config, context)
    depths = depths_of(chains, costs, smallest=config.min_depth)
    if not widths and not depths and config.min_resolution == 1:
        raise StageError(
            "nothing of this model can shrink",
            where=f"stages.{context.name}",
            hint="lower min_width, min_depth or round_to; `mil inspect` says what cannot be cut and why",
        )
    calls = list(context.calibration(samples=_PROVEN, batch_size=_PROVEN, model=model))
    reorder(ordered.graph, coupling, group_norms(ordered.graph, coupling), calls)
    return ordered, ElasticSpace(coupling, widths, depths, _resolution(ordered, coupling, config, context))


def _resolution(model: Model, coupling: Coupling, config: ElasticConfig, context: Context) -> Resolution | None:
    """Return the sizes of images to choose from, if there is a choice."""
    if config.min_resolution == 1:
        return None
    try:
        return resolution_of(model, coupling, smallest=config.min_resolution, most=config.choices)
    except ModelError as error:
        raise StageError(
            error.what,
            where=f"stages.{context.name}.min_resolution",
            value=error.value,
            hint="leave min_resolution at 1; widths and depths can shrink all the same",
        ) from None


def _branch_costs(
    model: Model,
    coupling: Coupling,
    chains: list[list[ResidualBranch]],
    config: ElasticConfig,
    context: Context,
) -> dict[str, float]:
    """Return by the name of its addition what leaving each residual branch out adds to the task's loss."""
    drawn = context.calibration_batches(samples=config.importance_samples, batch_size=_BATCH, model=model)
    batches = list(drawn) if chains else []
    task = context.task
    costs = {}
    for branch in (branch for chain in chains for branch in chain):

        def edit(graph: torch.fx.Graph, copies: Any, branch: ResidualBranch = branch) -> None:
            leave_out(graph, copies, [branch])

        graph = shared_cut(coupling, {}, model.graph, edit=edit)
        with torch.no_grad():
            losses = []
            for batch in batches:
                args, kwargs = task.inputs(batch)
                losses.append(float(task.loss(graph(*args, **kwargs), batch)))
        costs[branch.addition] = sum(losses) / len(losses)
    return costs


def train_supernet(model: Model, space: ElasticSpace, config: ElasticConfig, context: Context) -> Model:
    """Train all candidates of a space together and return the whole net."""
    settings = context.trainer(config.trainer).judged_at_the_end()
    bind = sandwich(space, context.task, random=config.random, temperature=config.temperature, seed=context.seed)
    return context.fit(model, settings=settings, doing="training the supernet", slot="supernet", bind=bind)


def candidate_model(
    supernet: Model, space: ElasticSpace, candidate: Candidate, config: ElasticConfig, context: Context
) -> Model:
    """Return a candidate as a model of its own, with its own statistics of batch norms."""
    model = cut_candidate(space, candidate, supernet)
    return with_fresh_statistics(model, context, samples=config.recalibrate_samples)


def _plan(config: ElasticConfig, score: Callable[[], float]) -> dict[str, int]:
    """Return how many candidates are scored and bred: as the settings say, or as the time for it allows."""
    if config.minutes is None:
        return {"evaluations": config.evaluations, "population": config.population}
    started = time.monotonic()
    score()
    seconds = time.monotonic() - started
    evaluations = max(_LEAST_EVALUATIONS, int(config.minutes * 60 / seconds))
    return {"evaluations": evaluations, "population": max(2, evaluations // _GENERATIONS)}
