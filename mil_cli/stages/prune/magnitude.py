"""Pruning by magnitude: coupled channels whose weights are small go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from mil_cli.graph.coupling import group_norms
from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class MagnitudeConfig(StructuredPruningConfig):
    """Settings of pruning by magnitude.

    Attributes:
        norm: 1 sums absolute weights, 2 takes the root of the sum of squares.
    """

    method: ClassVar[str] = "magnitude"

    norm: Literal[1, 2] = 2


@stage(MagnitudeConfig)
def magnitude(model: Model, config: MagnitudeConfig, context: Context) -> Model:
    """Remove the groups of coupled channels with the smallest norms, over the whole model.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", for single layers; Fang et al. 2023, "DepGraph: Towards
    Any Structural Pruning", for coupled groups and their normalisation.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    return prune(
        model, config, context, lambda current, coupling: group_norms(current.graph, coupling, order=config.norm)
    )
