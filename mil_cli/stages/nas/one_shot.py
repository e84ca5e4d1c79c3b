"""What one-shot searches share: weights of a space that are trained once, and the architectures judged on them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mil_cli.errors import StageError
from mil_cli.spaces import CostCounter
from mil_cli.stages.judging import quality_or_worst
from mil_cli.stages.nas.search.bounds import Bound, Bounds
from mil_cli.stages.nas.search.driver import search
from mil_cli.stages.nas.search.evolution import Evolution
from mil_cli.stages.nas.search.registry import Search
from mil_cli.stages.nas.shared import SharedModule
from mil_cli.stages.registry import StageConfig
from mil_cli.stages.targets import Target
from mil_cli.training.batch_norm import recalibrate_module
from mil_cli.units import parse_kept

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.graph.model import Model
    from mil_cli.spaces import Architecture, DesignedSpace
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import Binding

_CALIBRATION_BATCH = 64


class OneShotConfig(StageConfig):
    """Settings that all one-shot searches have.

    Attributes:
        macs: Multiply-accumulates that the winner may have, as a ratio of the largest architecture's (``0.3``, ``30%``)
            or a count (``6M``).
        params: Parameters that it may have, likewise. Without either, the best architecture is searched for whatever
            it costs.
        search: How architectures are chosen to be judged.
        trainer: Overrides of the recipe's trainer settings, for the shared weights.
        search_samples: Samples of val that an architecture is judged on.
        recalibrate_samples: Training samples from which its batch norms take their statistics.
        inherit: Whether the winner keeps its shared weights; else it begins with fresh ones, and `recover` trains it.
        recover: Key of a train or distill stage of the recipe that trains the winner; None does not, so that it is as
            good as its shared weights.
        recover_trainer: Trainer settings for that, over that stage's own.
    """

    family: ClassVar[str] = "nas"
    never_after: ClassVar[dict[str, str]] = dict.fromkeys(
        ("train", "nas", "prune", "distill", "quantize"),
        "it starts from the choices of the recipe's own model, and what came before would be lost",
    )

    macs: Target | None = None
    params: Target | None = None
    search: Search = Field(default_factory=Evolution)
    trainer: dict[str, Any] = Field(default_factory=dict)
    search_samples: int = Field(5000, ge=1)
    recalibrate_samples: int = Field(1024, ge=0)
    inherit: bool = False
    recover: str | None = None
    recover_trainer: dict[str, Any] = Field(default_factory=dict)

    @abstractmethod
    def shared(self, model: Model, context: Context) -> SharedModule:
        """Return the trained weights of the recipe's space.

        Args:
            model: The space's largest architecture; it says what the others take and give.
            context: Gives the space, data, trainer and checkpoints.
        """


def search_shared(model: Model, config: OneShotConfig, context: Context) -> Model:
    """Train the weights of a space, search for the best architecture within the bounds, and return that.

    Args:
        model: An architecture of the space, captured.
        config: The settings.
        context: Gives the space, data, fine-tuning and checkpoints.

    Raises:
        StageError: No architecture is within the bounds, or none gives finite outputs.
    """
    bounds = bounds_of(context.space(), model, config, context)
    shared = config.shared(model, context)
    judge = Judge(shared, config, context)
    found = search(shared.space, config.search, bounds=bounds, score=lambda one, effort: judge(one), context=context)
    best = found.best
    context.note(
        architecture=best.candidate.to_json(),
        search_quality=best.quality,
        **{name: int(cost) for name, cost in best.costs.items()},
        bounds=bounds.most,
        candidates=shared.space.size,
        scored=len(found.trials),
        front=[{"quality": one.quality, **one.costs} for one in found.front(bounds.names[:1])],
    )
    winner = judge.module(best.candidate) if config.inherit else shared.space.build(best.candidate, seed=context.seed)
    chosen = context.capture(winner)
    if config.recover is None:
        return chosen
    return context.finetune(chosen, stage=config.recover, name="winner", trainer=config.recover_trainer)


def bounds_of(space: DesignedSpace, model: Model, config: OneShotConfig, context: Context) -> Bounds[Architecture]:
    """Return what an architecture may cost.

    Args:
        space: The space.
        model: An architecture of it, captured.
        config: Gives the targets, as shares of the largest architecture's or as counts.
        context: Names the stage.

    Raises:
        StageError: Even the smallest architecture is above a bound.
    """
    args, kwargs = model.batch_input(1)
    counter = CostCounter(space, args, kwargs)
    costs: dict[str, Callable[[Architecture], int]] = {"macs": counter.macs, "params": counter.params}
    bounds = []
    for name, cost in costs.items():
        target = getattr(config, name)
        whole = cost(space.largest)
        most = math.inf if target is None else parse_kept(target).resolve(whole)
        least = cost(space.smallest)
        if least > most:
            raise StageError(
                f"the smallest architecture has {least:,} {name}, the largest {whole:,}",
                where=f"stages.{context.name}.{name}",
                value=target,
                hint="keep more, or put smaller choices into the model",
            )
        bounds.append(Bound(name, cost, most))
    return Bounds(bounds)


def train_shared(
    model: Model,
    config: OneShotConfig,
    context: Context,
    bind: Binding[SharedModule],
    *,
    start: SharedModule | None = None,
    overrides: Mapping[str, Any] | None = None,
    doing: str = "training the supernet",
    slot: str = "supernet",
) -> SharedModule:
    """Train the weights of a space.

    Args:
        model: An architecture of it, captured.
        config: The settings.
        context: Gives the space, data, trainer and checkpoints.
        bind: Says what a step trains.
        start: Where to start; None: the recipe's own weights.
        overrides: Of the trainer's settings, over those of `config`.
        doing: What progress calls it.
        slot: Where its checkpoint is kept.
    """
    settings = context.trainer({**config.trainer, **(overrides or {})})
    if settings.early_stopping is None:  # the largest architecture's quality decides nothing
        settings = settings.model_copy(update={"evaluate_every": settings.epochs})
    start = SharedModule.beside(model, context.space()) if start is None else start
    return context.fit(start, settings=settings, doing=doing, slot=slot, bind=bind)


class Judge:
    """Judges architectures on the weights that they share.

    Args:
        shared: The trained weights.
        config: The settings.
        context: Gives data and task.
    """

    def __init__(self, shared: SharedModule, config: OneShotConfig, context: Context) -> None:
        self._shared, self._config, self._context = shared, config, context
        samples = config.recalibrate_samples
        self._calls = list(context.calibration(samples=samples, batch_size=_CALIBRATION_BATCH)) if samples else []

    def module(self, architecture: Architecture) -> nn.Module:
        """Return an architecture as a plain module with copies of its weights and with its own statistics."""
        module = self._shared.space.build(architecture, inherit=True).eval()
        if self._calls:
            recalibrate_module(module, self._calls)
        return module

    def __call__(self, architecture: Architecture) -> float:
        """Return its quality on val; the worst there is if its outputs are not finite."""
        return quality_or_worst(self.module(architecture), self._context, samples=self._config.search_samples)
