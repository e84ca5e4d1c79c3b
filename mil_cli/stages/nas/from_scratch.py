"""Architecture search without a supernet: each candidate is trained by itself, from fresh weights, for a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mil_cli.data.base import Data
from mil_cli.errors import StageError
from mil_cli.graph.model import Model
from mil_cli.graph.spec import ModelSpec
from mil_cli.spaces import Architecture, DesignedSpace
from mil_cli.stages.nas.limits import LimitedConfig, search_limited
from mil_cli.stages.nas.search.halving import Halving
from mil_cli.stages.nas.search.registry import Search
from mil_cli.stages.recovery import RecoveringConfig
from mil_cli.stages.registry import stage
from mil_cli.task.base import Task
from mil_cli.training.config import TrainerConfig
from mil_cli.training.eager import EagerModule, Samples
from mil_cli.training.evaluate import NotFiniteError, evaluate
from mil_cli.training.loop import fit

if TYPE_CHECKING:
    from mil_cli.stages.context import Context


class FromScratchConfig(LimitedConfig, RecoveringConfig):
    """Settings of ``nas/from_scratch``.

    Attributes:
        search: How architectures are chosen to be trained.
        trainer: Overrides of the recipe's trainer settings for the training of a candidate; ``epochs`` is what the
            whole effort is: ``halving`` gives most candidates a part of them.
        search_samples: Samples of val that a candidate is judged on.
        recover: Key of a train or distill stage of the recipe that trains the winner, from fresh weights; None trains
            it by the recipe's trainer.
    """

    method: ClassVar[str] = "from_scratch"

    search: Search = Field(default_factory=lambda: Halving(evaluations=20))
    trainer: dict[str, Any] = Field(default_factory=dict)
    search_samples: int = Field(5000, ge=1)


@stage(FromScratchConfig)
def from_scratch(model: Model, config: FromScratchConfig, context: Context) -> Model:
    """Return the architecture that is best within the bounds when each is trained by itself, and train that.

    The search of Zoph and Le 2017, "Neural Architecture Search with Reinforcement Learning", by other strategies: dear,
    and free of what shared weights get wrong. Each candidate gets the same weights' seed, order and augmentation.

    Args:
        model: The space's largest architecture; not changed.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The trained winner, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice, no architecture is within the bounds, or rungs of the search
            train for as many epochs as each other.
    """
    space = context.space()
    trained = TrainedAlone(
        space=space,
        spec=model.spec,
        samples=model.samples,
        task=context.task,
        data=Data(name=context.data.name, train=context.data.train, val=context.data.val, test=context.data.val),
        settings=context.trainer(config.trainer),
        judged=config.search_samples,
        seed=context.seed,
    )
    if isinstance(config.search, Halving):
        _check_rungs(config.search, trained, where=f"stages.{context.name}")

    def build(architecture: Architecture) -> Model:
        return context.capture(space.build(architecture, seed=context.seed))

    limited = search_limited(space, model, config, score=trained, build=build, context=context)
    context.note(candidates=space.size, **limited.facts())
    winner = build(limited.found.best.candidate)
    return context.finetune(winner, stage=config.recover, name="winner", trainer=config.recover_trainer)


@dataclass(frozen=True)
class TrainedAlone:
    """Scores an architecture by training it; it can be sent to another process.

    Attributes:
        space: The space.
        spec: What its architectures take and give.
        samples: Example ``(args, kwargs)`` of them.
        task: Gives inputs, loss and metric.
        data: What it is trained and judged on; ``test`` is not there.
        settings: How it is trained; all epochs are the whole effort.
        judged: Samples of val that it is judged on.
        seed: Of weights, order and augmentation.
    """

    space: DesignedSpace
    spec: ModelSpec
    samples: Samples
    task: Task
    data: Data
    settings: TrainerConfig
    judged: int
    seed: int

    def epochs(self, fidelity: float) -> int:
        """Return for how many epochs that share of the whole effort trains."""
        return max(1, round(fidelity * self.settings.epochs))

    def __call__(self, architecture: Architecture, fidelity: float) -> float:
        """Return its quality on val; NaN if its outputs are not finite."""
        start = EagerModule(self.space.build(architecture, seed=self.seed), spec=self.spec, samples=self.samples)
        epochs = self.epochs(fidelity)
        settings = self.settings.model_copy(update={"epochs": epochs, "evaluate_every": epochs})
        result = fit(start, task=self.task, data=self.data, settings=settings, seed=self.seed)
        limit = min(self.judged, len(self.data.val))
        try:
            return evaluate(result.model, task=self.task, split=self.data.val, split_name="val", limit=limit).value
        except NotFiniteError:
            return float("nan")


def _check_rungs(search: Halving, trained: TrainedAlone, *, where: str) -> None:
    """Refuse rungs of which one trains no longer than the one before: it would only repeat its trainings."""
    epochs = [trained.epochs(share) for share in search.shares]
    if len({*epochs}) < len(epochs):
        raise StageError(
            f"two rungs train for as many epochs: they are of {', '.join(map(str, epochs))}",
            where=f"{where}.trainer.epochs",
            value=trained.settings.epochs,
            hint=f"give more epochs, {search.eta ** (search.rungs - 1)} say, or take fewer rungs (search.rungs)",
        )
