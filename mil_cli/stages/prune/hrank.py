"""Pruning by the rank of feature maps: channels whose maps hold little go first."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.prune.values import score_values
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


_TIE = 1e-6
"""What energy may add to a rank: less than the smallest difference of two mean ranks."""

_NUMBERS_AT_ONCE = 2**22
"""Numbers that are decomposed at once, one sample's or channel's at least: LAPACK works on copies of them."""


class HrankConfig(StructuredPruningConfig):
    """Settings of pruning by the rank of feature maps.

    Attributes:
        samples: Training samples that are looked at, without augmentation.
        batch_size: How many of them at once.
        rtol: Singular values below this share of a map's largest count as 0.
    """

    method: ClassVar[str] = "hrank"

    samples: int = Field(500, ge=1)
    batch_size: int = Field(50, ge=1)
    rtol: float = Field(1e-4, gt=0, lt=1)


@stage(HrankConfig)
def hrank(model: Model, config: HrankConfig, context: Context) -> Model:
    """Remove the channels whose feature maps have the lowest rank, in the mean over some images.

    Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map" (CVPR), on the maps that layers read. Values
    without maps, such as the tokens of a transformer, are judged by the rank of samples times positions. Ranks of small
    maps tie; of those the channel with less energy goes first.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    measure = partial(ranks, rtol=config.rtol)
    return prune(
        model,
        config,
        context,
        lambda current, coupling: score_values(
            current, coupling, measure, context, samples=config.samples, batch_size=config.batch_size
        ),
    )


def ranks(values: Tensor, *, rtol: float) -> Tensor:
    """Return by channel the mean rank of its maps, plus next to nothing for its energy, float64.

    Args:
        values: ``(samples, channels, height, width)``, or any other positions.
        rtol: Smallest share of the largest singular value that counts.
    """
    found: Tensor
    if values.ndim == 4:
        found = _matrix_ranks(values, rtol=rtol).mean(0)
    else:
        matrices = values.reshape(*values.shape[:2], -1).transpose(0, 1)  # by channel: samples times positions
        found = _matrix_ranks(matrices, rtol=rtol) / len(values)
    others = [axis for axis in range(values.ndim) if axis != 1]
    energy = torch.linalg.vector_norm(values, dim=others, dtype=torch.float64)  # a mean would copy all in float64
    found = found + _TIE * energy / energy.max().clamp(min=torch.finfo(energy.dtype).tiny)
    return found


def _matrix_ranks(matrices: Tensor, *, rtol: float) -> Tensor:
    """Return the rank of each of ``[first, ..., rows, columns]``, float64, taking some of the first axis at a time.

    Args:
        matrices: The matrices.
        rtol: Smallest share of the largest singular value that counts.
    """
    every = max(_NUMBERS_AT_ONCE // max(matrices[0].numel(), 1), 1)
    return torch.cat([torch.linalg.matrix_rank(part, rtol=rtol) for part in torch.split(matrices, every)]).double()
