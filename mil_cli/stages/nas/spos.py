"""A supernet of which each step trains one path, drawn evenly; then a search over what its paths are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mil_cli.stages.nas.one_shot import OneShotConfig, search_shared, train_shared
from mil_cli.stages.nas.shared import P, SharedModule, step_generator
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Binding, Objective, Running


class SposConfig(OneShotConfig):
    """Settings of ``nas/spos``: those of all one-shot searches."""

    method: ClassVar[str] = "spos"

    def shared(self, model: Model, context: Context) -> SharedModule:
        """Return weights that single paths trained."""
        return train_shared(model, self, context, single_path(context.task, seed=context.seed))


@stage(SposConfig)
def spos(model: Model, config: SposConfig, context: Context) -> Model:
    """Return the architecture that a supernet of single paths thinks best within the bounds.

    Guo et al. 2020, "Single Path One-Shot Neural Architecture Search with Uniform Sampling" (arXiv:1904.00420).

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The architecture found, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice, or no architecture is within the bounds.
    """
    return search_shared(model, config, context)


def single_path(task: Task, *, seed: int) -> Binding[P]:
    """Return the objective of one path a step, each choice of it equally likely.

    Args:
        task: Gives the loss.
        seed: Of the paths: which one a step trains follows from it and the number of the step alone.
    """

    def bind(running: Running[P]) -> Objective:
        space = running.model.space
        running.model.run(lambda: space.sample(step_generator(seed, running.steps())))
        return task.loss

    return bind
