"""What one-shot searches share: weights of a space that are trained once, and the architectures judged on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, field_validator

from mil_cli.stages.judging import quality_or_worst
from mil_cli.stages.nas.limits import LimitedConfig, check_limits, search_limited
from mil_cli.stages.nas.search.registry import Search
from mil_cli.stages.nas.shared import SharedModule
from mil_cli.stages.recovery import RecoveringConfig
from mil_cli.training.batch_norm import recalibrate_module

if TYPE_CHECKING:
    from torch import nn

    from mil_cli.graph.model import Model
    from mil_cli.spaces import Architecture, DesignedSpace
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import Binding

_CALIBRATION_BATCH = 64


class SharedWeights(Protocol):
    """Weights that were trained for all architectures of a space."""

    @property
    def space(self) -> DesignedSpace:
        """The space."""
        ...

    def plain(self, architecture: Architecture) -> nn.Module:
        """Return an architecture as a plain module with copies of its weights."""
        ...


class OneShotConfig(LimitedConfig, RecoveringConfig):
    """Settings that all one-shot searches have, beside the bounds.

    Attributes:
        trainer: Overrides of the recipe's trainer settings, for the shared weights.
        search_samples: Samples of val that an architecture is judged on.
        recalibrate_samples: Training samples from which its batch norms take their statistics.
        inherit: Whether the winner keeps its shared weights; else it begins with fresh ones, and `recover` trains it.
        recover: Key of a train or distill stage of the recipe that trains the winner; None does not, so that it is as
            good as its shared weights.
    """

    trainer: dict[str, Any] = Field(default_factory=dict)
    search_samples: int = Field(5000, ge=1)
    recalibrate_samples: int = Field(1024, ge=0)
    inherit: bool = False

    @field_validator("search")
    @classmethod
    def _one_process(cls, search: Search) -> Search:
        if search.jobs > 1:
            raise ValueError(
                f"jobs is {search.jobs}: the process that has the shared weights judges all; leave it at 1"
            )
        return search

    @abstractmethod
    def shared(self, model: Model, context: Context) -> SharedWeights:
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
    check_limits(context.space(), model, config, context)
    shared = config.shared(model, context)
    judge = Judge(shared, config, context)

    def build(architecture: Architecture) -> Model:
        return context.capture(shared.space.build(architecture, seed=context.seed))

    limited = search_limited(shared.space, model, config, score=judge, build=build, context=context)
    best = limited.found.best.candidate
    context.note(candidates=shared.space.size, **limited.facts())
    chosen = context.capture(judge.module(best)) if config.inherit else build(best)
    return config.recovered(chosen, context, name="winner")


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
    settings = context.trainer({**config.trainer, **(overrides or {})}).judged_at_the_end()
    start = SharedModule.beside(model, context.space()) if start is None else start
    return context.fit(start, settings=settings, doing=doing, slot=slot, bind=bind)


class Judge:
    """Judges architectures on the weights that they share.

    Args:
        shared: The trained weights.
        config: The settings.
        context: Gives data and task.
    """

    def __init__(self, shared: SharedWeights, config: OneShotConfig, context: Context) -> None:
        self._shared, self._config, self._context = shared, config, context
        samples = config.recalibrate_samples
        self._calls = list(context.calibration(samples=samples, batch_size=_CALIBRATION_BATCH)) if samples else []

    def module(self, architecture: Architecture) -> nn.Module:
        """Return an architecture as a plain module with copies of its weights and with its own statistics."""
        module = self._shared.plain(architecture).eval()
        if self._calls:
            recalibrate_module(module, self._calls)
        return module

    def __call__(self, architecture: Architecture, effort: float = 1.0) -> float:
        """Return its quality on a share of the samples of val; the worst there is if its outputs are not finite."""
        samples = max(1, round(effort * self._config.search_samples))
        return quality_or_worst(self.module(architecture), self._context, samples=samples)
