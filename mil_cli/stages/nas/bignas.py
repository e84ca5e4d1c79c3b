"""A supernet whose largest net teaches the smaller ones as it learns, so that each works as it is; then a search."""

from __future__ import annotations

from contextlib import contextmanager
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mil_cli.errors import StageError
from mil_cli.stages.nas.one_shot import OneShotConfig, search_shared, train_shared
from mil_cli.stages.nas.shared import SharedModule, forward, step_generator
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Binding, Objective, Running


class BigNasConfig(OneShotConfig):
    """Settings of ``nas/bignas``, beside those of all one-shot searches.

    Attributes:
        random: Random architectures that each step trains, beside the largest and the smallest one.
        temperature: By which class scores are divided where architectures learn from the largest one.
        zero_init: Paths, or patterns such as ``*.body.7``, of the norms whose scale begins at 0: the last one of each
            residual branch, so that a deep net begins as a shallow one.
        inherit: Whether the winner keeps its shared weights; see `OneShotConfig`.
    """

    method: ClassVar[str] = "bignas"

    random: int = Field(2, ge=0, le=16)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    zero_init: tuple[str, ...] = ()
    inherit: bool = True

    def shared(self, model: Model, context: Context) -> SharedModule:
        """Return weights that the sandwich rule trained.

        Raises:
            StageError: `zero_init` fits no norm.
        """
        bind = sandwiched(context.task, random=self.random, temperature=self.temperature, seed=context.seed)
        start = SharedModule.beside(model, context.space())
        silence(start.space.module, self.zero_init, where=f"stages.{context.name}.zero_init")
        return train_shared(model, self, context, bind, start=start)


@stage(BigNasConfig)
def bignas(model: Model, config: BigNasConfig, context: Context) -> Model:
    """Return the best architecture within the bounds of a supernet whose architectures need no training of their own.

    Yu et al. 2020, "BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage Models" (arXiv:2003.11142),
    with the sandwich rule, in-place distillation, dropout for the largest architecture alone and residual branches that
    begin at zero; its learning rate is the trainer's schedule ``exponential``. Weight decay acts on the shared weights
    once a step, which are those of the largest architecture.

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The architecture found, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice, `zero_init` fits no norm, or no architecture is within the
            bounds.
    """
    return search_shared(model, config, context)


def silence(module: nn.Module, patterns: Sequence[str], *, where: str) -> None:
    """Set the scales of some norms to 0.

    Args:
        module: Changed in place.
        patterns: Their paths; ``*`` stands for anything.
        where: The setting, for messages.

    Raises:
        StageError: A pattern fits nothing that has a one-dimensional weight.
    """
    for pattern in patterns:
        fitting = [
            weight
            for path, part in module.named_modules()
            if fnmatch(path, pattern)
            and isinstance(weight := getattr(part, "weight", None), nn.Parameter)
            and weight.ndim == 1
        ]
        if not fitting:
            hint = "give paths of norms as the model's named_modules() has them"
            raise StageError("fits no norm of the model", where=where, value=pattern, hint=hint)
        for weight in fitting:
            nn.init.zeros_(weight)


def sandwiched(task: Task, *, random: int, temperature: float, seed: int) -> Binding[SharedModule]:
    """Return the objective of the sandwich rule with in-place distillation.

    In each step the largest architecture learns the labels; the smallest and some random ones learn what it gives,
    without a gradient through it. Losses are averaged, so that learning rates keep their meaning.

    Args:
        task: Gives inputs, loss and distance.
        random: How many random architectures a step trains.
        temperature: Softens class scores.
        seed: Of the architectures: which ones a step trains follows from it and the number of the step alone.
    """

    def bind(running: Running[SharedModule]) -> Objective:
        space = running.model.space

        def objective(outputs: Any, batch: Batch) -> Tensor:
            total = task.loss(outputs, batch)
            targets = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
            generator = step_generator(seed, running.steps())
            smaller = [space.smallest, *(space.sample(generator) for _ in range(random))]
            with _without_dropout(space.module):
                for architecture in smaller:
                    given = forward(running, architecture, task, batch)
                    total = total + task.distance(given, targets, batch, temperature=temperature)
            return total / (1 + len(smaller))

        return objective

    return bind


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    layers = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
