"""A supernet in each of whose steps all choices learn equally often; then a search over what its paths are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mil_cli.stages.nas.one_shot import OneShotConfig, search_shared, train_shared
from mil_cli.stages.nas.shared import SharedModule, forward, step_generator
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mil_cli.data.base import Batch
    from mil_cli.graph.model import Model
    from mil_cli.spaces import Architecture, DesignedSpace
    from mil_cli.stages.context import Context
    from mil_cli.task.base import Task
    from mil_cli.training.objective import Binding, Objective, Running


class FairNasConfig(OneShotConfig):
    """Settings of ``nas/fairnas``: those of all one-shot searches."""

    method: ClassVar[str] = "fairnas"

    def shared(self, model: Model, context: Context) -> SharedModule:
        """Return weights that strict fairness trained."""
        return train_shared(model, self, context, fair_paths(context.task, seed=context.seed))


@stage(FairNasConfig)
def fairnas(model: Model, config: FairNasConfig, context: Context) -> Model:
    """Return the architecture that a supernet trained with strict fairness thinks best within the bounds.

    Chu et al. 2021, "FairNAS: Rethinking Evaluation Fairness of Weight Sharing Neural Architecture Search"
    (arXiv:1907.01845).

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


def fair_paths(task: Task, *, seed: int) -> Binding[SharedModule]:
    """Return the objective of strict fairness: in each step every choice of every decision learns equally often.

    A step trains as many paths as the decision with the most choices has. Their losses are averaged, so that learning
    rates keep their meaning.

    Args:
        task: Gives inputs and loss.
        seed: Of the permutations.
    """

    def bind(running: Running[SharedModule]) -> Objective:
        model, space = running.model, running.model.space
        paths: list[Architecture] = []

        def first() -> Architecture:
            paths[:] = fair(space, step_generator(seed, running.steps()))
            return paths[0]

        def objective(outputs: Any, batch: Batch) -> torch.Tensor:
            total = task.loss(outputs, batch)
            for architecture in paths[1:]:
                total = total + task.loss(forward(running, architecture, task, batch), batch)
            return total / len(paths)

        model.run(first)
        return objective

    return bind


def fair(space: DesignedSpace, generator: torch.Generator) -> list[Architecture]:
    """Return as many architectures as the decision with the most choices has, which take all choices equally often.

    Along each decision they run through a permutation of its choices, where it has fewer, through several: if their
    number does not divide that of the architectures, some are taken once more. A decision inside an operator or a
    block acts in some of the architectures only; it is fair on average.
    """
    counts = [len(decision.choices) for decision in space.decisions]
    columns = [list(_permuted(count, max(counts), generator)) for count in counts]
    return [space.at(row) for row in zip(*columns, strict=True)]


def _permuted(count: int, length: int, generator: torch.Generator) -> Iterator[int]:
    """Yield `length` numbers below `count`, one permutation after another."""
    for start in range(0, length, count):
        yield from torch.randperm(count, generator=generator).tolist()[: length - start]
