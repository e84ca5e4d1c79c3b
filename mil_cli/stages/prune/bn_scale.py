"""Pruning by the scales of norms: channels that their norm makes small go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from mil_cli.graph.coupling.members import class_sums, mean_of_members, norm_parameters
from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from mil_cli.graph.coupling import Coupling
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.prune.selection import Scores

BY_CHANNEL = ("batch_norm", "instance_norm", "group_norm")


class BnScaleConfig(StructuredPruningConfig):
    """Settings of pruning by the scales of norms."""

    method: ClassVar[str] = "bn_scale"


@stage(BnScaleConfig)
def bn_scale(model: Model, config: BnScaleConfig, context: Context) -> Model:
    """Remove the channels with the smallest scales of their batch, group or instance norms, over the whole model.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (ICCV), for a model that was
    trained already; scales say most where training pushed them towards 0. Channels without such a norm are left alone.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or no channels that can be cut have a norm.
    """
    return prune(model, config, context, lambda current, coupling: scales(current.graph, coupling))


def scales(graph: GraphModule, coupling: Coupling) -> Scores:
    """Return by space the mean absolute scale that norms give each class; NaN without a norm."""
    norms = norm_parameters(graph, "weight", BY_CHANNEL)
    found = []
    for space in coupling.spaces:
        rows = []
        for member in space.members:
            if member.parameter in norms:
                scale = get_attribute(graph, member.parameter).detach().abs()
                rows.append(
                    class_sums(member, space.size, scale) / class_sums(member, space.size, torch.ones_like(scale))
                )
        found.append(mean_of_members(space.size, rows, normalise=False))
    return found
