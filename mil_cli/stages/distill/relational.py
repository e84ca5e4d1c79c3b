"""Distillation by relations: samples lie to each other in the student as they do in the teacher."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mil_cli.stages.distill.features import FeatureConfig, distil_features
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_ANGLED = 128  # angles take memory for the cube of so many samples


class RelationalConfig(FeatureConfig):
    """Settings of distillation by relations, beside those of `FeatureConfig`.

    Attributes:
        distance_weight: Of the differences of distances in that of the features.
        angle_weight: Of the differences of angles.
    """

    method: ClassVar[str] = "relational"
    version: ClassVar[int] = 2

    feature_weight: float = Field(25.0, ge=0, allow_inf_nan=False)
    count: int = Field(1, ge=1)
    distance_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    angle_weight: float = Field(2.0, ge=0, allow_inf_nan=False)


@stage(RelationalConfig)
def relational(model: Model, config: RelationalConfig, context: Context) -> Model:
    """Train the student on soft labels and on the distances and angles between the samples of a batch.

    Park et al. 2019, "Relational Knowledge Distillation": distances between the features of two samples, relative to
    the batch's mean distance, and cosines of the angles between those of three, are compared by the Huber loss. The
    feature of a sample is the average over its positions.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Teacher or student do not fit the model, or there is nothing to compare.
    """
    difference = partial(
        relational_difference, distance_weight=config.distance_weight, angle_weight=config.angle_weight
    )
    return distil_features(model, config, context, lambda pair: difference)


def relational_difference(student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """Return the weighted mean differences of distances and of angles.

    Angles are those among the first 128 samples of a batch.

    Args:
        student: Features of shape (batch, channels, *positions).
        teacher: The same; channels and positions may differ.
        distance_weight: Of distances; 0 leaves them out.
        angle_weight: Of angles; 0 leaves them out.
    """
    one, other = _vector(student), _vector(teacher)
    result = one.new_zeros(())
    if distance_weight and len(one) > 1:
        result = result + distance_weight * distance_difference(one, other)
    if angle_weight and len(one) > 2:
        result = result + angle_weight * angle_difference(one[:_ANGLED], other[:_ANGLED])
    return result


def distance_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Huber loss of relative distances over all pairs of at least two vectors (batch, channels)."""
    pairs = len(student) * (len(student) - 1)
    one, other = (_relative_distances(vectors, pairs) for vectors in (student, teacher))
    return functional.smooth_l1_loss(one, other, reduction="sum") / pairs


def angle_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Huber loss of the cosines over all triples of at least three vectors (batch, channels)."""
    samples = len(student)
    triples = samples * (samples - 1) * (samples - 2)
    # Where two of the three are the same sample both cosines are 0, or both 1.
    return functional.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="sum") / triples


def _vector(feature: Tensor) -> Tensor:
    return feature.flatten(2).mean(2) if feature.ndim > 2 else feature


def _relative_distances(vectors: Tensor, pairs: int) -> Tensor:
    # Not as |a|^2 + |b|^2 - 2ab, in which small distances drown.
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return distances * (pairs / distances.sum().clamp(min=1e-12))


def _cosines(vectors: Tensor) -> Tensor:
    """Return, at [i, j, k], the cosine of the angle at sample i between samples j and k."""
    directions = functional.normalize(vectors[None] - vectors[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
