"""Pruning by activation: channels that layers read as small, or as zero most of the time, go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.prune.values import score_values
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class ActivationConfig(StructuredPruningConfig):
    """Settings of pruning by activation.

    Attributes:
        statistic: ``mean``: the mean magnitude; ``apoz``: the share that is not zero (the complement of the average
            percentage of zeros).
        samples: Training samples that are looked at, without augmentation.
        batch_size: How many of them at once.
    """

    method: ClassVar[str] = "activation"

    statistic: Literal["mean", "apoz"] = "mean"
    samples: int = Field(512, ge=1)
    batch_size: int = Field(64, ge=1)


@stage(ActivationConfig)
def activation(model: Model, config: ActivationConfig, context: Context) -> Model:
    """Remove the channels that layers read with the smallest mean magnitude, or the most zeros.

    Hu et al. 2016, "Network Trimming", for the zeros; Molchanov et al. 2017, "Pruning Convolutional Neural Networks for
    Resource Efficient Inference", for the means.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    measure = {"mean": mean_magnitude, "apoz": share_of_nonzero}[config.statistic]
    return prune(
        model,
        config,
        context,
        lambda current, coupling: score_values(
            current, coupling, measure, context, samples=config.samples, batch_size=config.batch_size
        ),
    )


def mean_magnitude(values: Tensor) -> Tensor:
    """Return by channel the mean magnitude of ``(samples, channels, any positions)``."""
    return values.abs().mean(_all_but_channels(values))


def share_of_nonzero(values: Tensor) -> Tensor:
    """Return by channel the share of ``(samples, channels, any positions)`` that is not 0."""
    return (values != 0).float().mean(_all_but_channels(values))


def _all_but_channels(values: Tensor) -> list[int]:
    return [axis for axis in range(values.ndim) if axis != 1]
