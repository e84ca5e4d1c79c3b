"""Growing regularisation: what will be cut is chosen first and shrunk ever harder, so that the cut loses little."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from mil_cli.graph.coupling import analyse, group_norms
from mil_cli.graph.coupling.groups import WeightGroups
from mil_cli.stages.prune.regularise import RegularisedPruningConfig, train_and_prune
from mil_cli.stages.prune.schedule import choose
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import StepHook


class GrowingRegConfig(RegularisedPruningConfig):
    """Settings of growing regularisation.

    Attributes:
        strength: The ceiling of the penalty.
        growth: What it grows by.
        every: After how many steps it grows.
    """

    method: ClassVar[str] = "growing_reg"

    strength: float = Field(1.0, gt=0, allow_inf_nan=False)
    growth: float = Field(1e-3, gt=0, allow_inf_nan=False)
    every: int = Field(10, ge=1)


@stage(GrowingRegConfig)
def growing_reg(model: Model, config: GrowingRegConfig, context: Context) -> Model:
    """Choose the groups with the smallest norms under the target, train with a growing L2 penalty on them, cut them.

    Wang et al. 2021, "Neural Pruning via Growing Regularization" (ICLR), GReg-1; the penalty there grows by 1e-4 every
    10 steps over many epochs.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, training and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    coupling = analyse(model)
    removed, table = choose(model, coupling, group_norms(model.graph, coupling), config, context)
    groups = WeightGroups(model.graph, coupling)
    doomed = [torch.zeros(size, dtype=torch.float64) for size in groups.sizes]
    for number, classes in removed.items():
        doomed[number][sorted(classes)] = 1.0

    return train_and_prune(
        model,
        config.model_copy(update={"independent": False}),  # what was shrunk goes, at the same places in all groups
        context,
        lambda current, coupling: group_norms(current.graph, coupling),
        growing_penalty(groups, doomed, ceiling=config.strength, growth=config.growth, every=config.every),
        known=table,
    )


def growing_penalty(
    groups: WeightGroups, doomed: list[torch.Tensor], *, ceiling: float, growth: float, every: int
) -> StepHook:
    """Return what adds ``strength * weight`` to the gradients of some groups, the strength growing with the steps.

    Args:
        groups: The groups.
        doomed: By space and class: 1 for what will be cut, else 0.
        ceiling: Largest strength.
        growth: What it grows by.
        every: After how many steps.
    """

    def before_step(training: Model, steps: int, total: int) -> None:
        strength = min(ceiling, growth * (1 + steps // every))
        groups.shrink(training.named_parameters(), [strength * classes for classes in doomed])

    return before_step
