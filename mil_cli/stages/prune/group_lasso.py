"""Group lasso: training shrinks whole groups of coupled weights, the small ones most, then the smallest go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.graph.coupling import analyse, group_norms
from mil_cli.graph.coupling.groups import WeightGroups
from mil_cli.stages.prune.regularise import RegularisedPruningConfig, train_and_prune
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import StepHook

_STEEPEST = 4.0
"""With `adaptive`, the smallest group of a space shrinks by ``2 ** 4`` times what the largest does."""


class GroupLassoConfig(RegularisedPruningConfig):
    """Settings of pruning by group lasso.

    Attributes:
        strength: Weight of the penalty's gradient.
        adaptive: Whether a group shrinks in proportion to its weights, and more the smaller it is beside the others of
            its space (Fang 2023); otherwise each group's norm is penalised alike (Wen 2016).
    """

    method: ClassVar[str] = "group_lasso"

    strength: float = Field(1e-3, gt=0, allow_inf_nan=False)
    adaptive: bool = True


@stage(GroupLassoConfig)
def group_lasso(model: Model, config: GroupLassoConfig, context: Context) -> Model:
    """Train with a penalty on the norms of whole groups of coupled weights, then cut the smallest groups.

    Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks", for the group lasso; Fang et al. 2023,
    "DepGraph: Towards Any Structural Pruning", for coupled groups and the adaptive form.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, training and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    return train_and_prune(
        model,
        config,
        context,
        lambda current, coupling: group_norms(current.graph, coupling),
        norm_penalty(model, config.strength, adaptive=config.adaptive),
    )


def norm_penalty(model: Model, strength: float, *, adaptive: bool) -> StepHook:
    """Return what adds the penalty's gradient before a step: that of ``strength * sum ||group||``, or the adaptive one.

    Args:
        model: The model whose groups are meant.
        strength: Weight of the penalty.
        adaptive: See `GroupLassoConfig`.
    """
    groups = WeightGroups(model.graph, analyse(model))
    factor = _adaptive if adaptive else _lasso

    def before_step(training: Model, steps: int, total: int) -> None:
        parameters = dict(training.named_parameters())
        factors = []
        for norms, free in zip(groups.norms(parameters), groups.free, strict=True):
            found = torch.zeros_like(norms)
            found[free] = strength * factor(norms[free])
            factors.append(found)
        groups.shrink(parameters.items(), factors)

    return before_step


def _lasso(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms.clamp(min=1e-12), 0.0)


def _adaptive(norms: Tensor) -> Tensor:
    if not len(norms):
        return norms
    spread = (norms.max() - norms.min()).clamp(min=1e-12)
    factors: Tensor = 2 ** (_STEEPEST * (norms.max() - norms) / spread)
    return factors
