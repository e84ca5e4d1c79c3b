"""Searches of a designed space under hard bounds: operations, parameters, memory, and a latency that is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.spaces import Architecture, CostCounter, DesignedSpace
from mil_cli.stages.measured import Choice, Correction
from mil_cli.stages.nas.designed import DesignedConfig
from mil_cli.stages.nas.latency import PredictedLatency
from mil_cli.stages.nas.memory import ArchitectureMemory
from mil_cli.stages.nas.search.bounds import Bound, Bounds
from mil_cli.stages.nas.search.driver import Found, search
from mil_cli.stages.nas.search.evolution import Evolution
from mil_cli.stages.nas.search.registry import Search
from mil_cli.stages.nas.search.trial import Score, ranked
from mil_cli.stages.targets import LatencyTarget, MemoryTarget, Target, parse_target

if TYPE_CHECKING:
    from mil_cli.stages.context import Context

_AGAIN = 0.25
"""What part of the evaluations another choice for a corrected latency takes; half of them were scored before."""

_UNITS = {"memory": "bytes of estimated memory"}


class LimitedConfig(DesignedConfig):
    """Settings of stages that search a designed space.

    Attributes:
        macs: Multiply-accumulates that the winner may have, as a share of the largest architecture's (``0.3``, ``30%``)
            or a count (``6M``).
        params: Parameters that it may have, likewise.
        memory: Estimated memory that it may take, as a share of the largest architecture's or a size (``2 MB``): the
            bytes of the weights, of the constants beside them, and of the largest set of activations that are live at
            once, for one sample in float, as pruning estimates them.
        latency: Latency that it may have, as a share of the largest architecture's or a duration (``2 ms``). Several
            bounds may be given, or none.
        latency_samples: Architectures that are measured so that the latency of others can be predicted.
        measured: Whether the winner by predicted latency is measured, and the search corrected until it keeps it.
        search: How architectures are chosen to be scored.
    """

    macs: Target | None = None
    params: Target | None = None
    memory: MemoryTarget | None = None
    latency: LatencyTarget | None = None
    latency_samples: int = Field(40, ge=8, le=1000)
    measured: bool = True
    search: Search = Field(default_factory=Evolution)

    @model_validator(mode="after")
    def _costs_are_known(self) -> Self:
        known = ["macs", "params", *(name for name in ("memory", "latency") if getattr(self, name) is not None)]
        unknown = [name for name in getattr(self.search, "costs", ()) if name not in known]
        if unknown:
            raise ValueError(
                f"search.costs: {unknown[0]} of architectures is not known here; choose from {', '.join(known)}, or "
                "bound memory or latency too"
            )
        return self


@dataclass(frozen=True)
class Limited:
    """What a search under bounds found.

    Attributes:
        found: Of the search that gave the winner; its best is the winner.
        bounds: What it keeps; a latency may have been corrected.
        latency: What predicted latencies; None where none is bounded.
        seconds: What the winner takes when it is measured; None where it was not.
    """

    found: Found[Architecture]
    bounds: Bounds[Architecture]
    latency: PredictedLatency | None
    seconds: float | None

    def facts(self) -> dict[str, Any]:
        """Return what a report shows."""
        best, searched = self.found.best, self.found.trials
        return {
            "architecture": best.candidate.to_json(),
            "search_quality": best.quality,
            **{name: cost if name == "latency" else int(cost) for name, cost in best.costs.items()},
            "bounds": self.bounds.most,
            "scored": len(searched),
            "front": [{"quality": trial.quality, **trial.costs} for trial in self.found.front(self.bounds.names[:1])],
            **({} if self.latency is None else {"latency_model": self.latency.describe()}),
            **({} if self.seconds is None else {"measured": self.seconds}),
        }


def search_limited(
    space: DesignedSpace,
    model: Model,
    config: LimitedConfig,
    *,
    score: Score[Architecture],
    build: Callable[[Architecture], Model],
    context: Context,
) -> Limited:
    """Search a space for the best architecture within the bounds of some settings.

    Args:
        space: The space.
        model: Its largest architecture, captured: what shares are of, and what latencies are timed beside.
        config: The bounds, and how to search.
        score: The quality of an architecture.
        build: Gives an architecture as a model; only its latency counts.
        context: Gives the device, samples, generators and checkpoints.

    Raises:
        ModelError: An operator does not run on the model's inputs.
        StageError: Even the smallest architecture is above a bound, or none was found that has a finite quality.
    """
    counter, where = CostCounter(space, *model.batch_input(1)), f"stages.{context.name}"
    kept = _countable(space, model, counter, config, where)
    if config.latency is None:
        bounds = Bounds(kept)
        return Limited(search(space, config.search, bounds=bounds, score=score, context=context), bounds, None, None)
    latency = PredictedLatency(
        space, counter, build=build, original=model, context=context, samples=config.latency_samples
    )
    bound = _bound(space, "latency", latency, config, where, whole=latency.seconds)
    choices = _Choices(space, config, Bounds([*kept, bound]), score, build, context)
    slot = context.slot("measured")
    state = slot.load() or {"measured": []}
    correction = Correction(
        model,
        start=latency.seconds,
        goal=bound.most,
        context=context,
        measured=state["measured"],
        keep=lambda: slot.save(state),
        active=config.measured,
    )
    (found, bounds), seconds = correction.search(choices)
    return Limited(found, bounds, latency, seconds)


def check_limits(space: DesignedSpace, model: Model, config: LimitedConfig, context: Context) -> None:
    """Check that all that can be chosen runs, and those bounds that need no measurement, before anything long.

    Args:
        space: The space.
        model: An architecture of it, captured.
        config: The bounds.
        context: Names the stage.

    Raises:
        ModelError: An operator does not run on the model's inputs.
        StageError: Even the smallest architecture is above a bound.
    """
    _countable(space, model, CostCounter(space, *model.batch_input(1)), config, f"stages.{context.name}")


def _countable(
    space: DesignedSpace, model: Model, counter: CostCounter, config: LimitedConfig, where: str
) -> list[Bound[Architecture]]:
    counter.check()
    costs: dict[str, Callable[[Architecture], float]] = {"macs": counter.macs, "params": counter.params}
    if config.memory is not None:  # an architecture is built for it, which takes longer than to count
        costs["memory"] = ArchitectureMemory(space, *model.batch_input(1))
    return [_bound(space, name, cost, config, where, whole=cost(space.largest)) for name, cost in costs.items()]


@dataclass
class _Choices:
    """Searches for one bound on latency after another; what was scored for one begins the next."""

    space: DesignedSpace
    config: LimitedConfig
    bounds: Bounds[Architecture]
    score: Score[Architecture]
    build: Callable[[Architecture], Model]
    context: Context
    known: dict[tuple[Architecture, float], float] = field(default_factory=dict)
    before: list[Found[Architecture]] = field(default_factory=list)

    def __call__(self, target: float, before: int) -> Choice[tuple[Found[Architecture], Bounds[Architecture]]]:
        """Return the best within a bound on latency."""
        bounds = self.bounds.bounded("latency", max(target, self.bounds["latency"](self.space.smallest)))
        settings: Search = self.config.search
        first: list[Architecture] = []
        if before:
            evaluations, minutes = max(2, round(settings.evaluations * _AGAIN)), settings.minutes
            less = {"evaluations": evaluations, "minutes": None if minutes is None else minutes * _AGAIN}
            settings = settings.model_copy(update=less)
            trials = ranked(trial for found in self.before for trial in found.trials if bounds.keep(trial.costs))
            first = [trial.candidate for trial in trials][: settings.evaluations // 2]
        found = search(
            self.space,
            settings,
            bounds=bounds,
            score=Remembering(self.score, self.known),
            context=self.context,
            name=f"search {before}" if before else "search",
            first=first,
        )
        self.known.update({(trial.candidate, trial.fidelity): trial.quality for trial in found.trials})
        self.before.append(found)
        best = found.best
        return Choice(
            best.candidate, best.costs["latency"], lambda: self.build(best.candidate), (found, bounds), best.worth
        )


@dataclass(frozen=True)
class Remembering:
    """A score that does not score again what is known.

    Attributes:
        score: The score.
        known: By architecture and effort, what it gave.
    """

    score: Score[Architecture]
    known: Mapping[tuple[Architecture, float], float]

    def __call__(self, architecture: Architecture, fidelity: float) -> float:
        """Return the quality of an architecture."""
        quality = self.known.get((architecture, fidelity))
        return self.score(architecture, fidelity) if quality is None else quality


def _bound(
    space: DesignedSpace,
    name: str,
    cost: Callable[[Architecture], float],
    config: LimitedConfig,
    where: str,
    *,
    whole: float,
) -> Bound[Architecture]:
    """Return the bound on one cost.

    Raises:
        StageError: Even the smallest architecture is above it.
    """
    target = getattr(config, name)
    if target is None:
        return Bound(name, cost)
    most = parse_target(name, target).resolve(whole)
    least = cost(space.smallest)
    if least > most:
        shown, unit = (".6g", "s") if name == "latency" else (",.0f", _UNITS.get(name, name))
        raise StageError(
            f"the smallest architecture has {least:{shown}} {unit}, the largest {whole:{shown}}",
            where=f"{where}.{name}",
            value=target,
            hint="keep more, or put smaller choices into the model",
        )
    return Bound(name, cost, most)
