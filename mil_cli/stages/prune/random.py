"""Pruning at random: the baseline that every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mil_cli.stages.prune.schedule import prune, random_scores
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class RandomConfig(StructuredPruningConfig):
    """Settings of pruning at random."""

    method: ClassVar[str] = "random"


@stage(RandomConfig)
def random(model: Model, config: RandomConfig, context: Context) -> Model:
    """Remove groups of coupled channels that the seed draws.

    Mittal et al. 2018, "Recovering from Random Pruning" (WACV): after fine-tuning it is closer to the other methods
    than one would think.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    return prune(model, config, context, lambda _, coupling: random_scores(coupling, context.generator("random")))
