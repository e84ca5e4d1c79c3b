"""Distillation by similarity: samples that are alike to the teacher are alike to the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mil_cli.stages.distill.features import FeatureConfig, distil_features
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class SimilarityConfig(FeatureConfig):
    """Settings of distillation by similarity, those of `FeatureConfig`."""

    method: ClassVar[str] = "similarity"

    feature_weight: float = Field(25.0, ge=0, allow_inf_nan=False)
    count: int = Field(1, ge=1)


@stage(SimilarityConfig)
def similarity(model: Model, config: SimilarityConfig, context: Context) -> Model:
    """Train the student on soft labels and on the similarities of the samples of a batch.

    Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation": similarities are the scalar products of whole
    features, each sample's a vector of length 1. Channels and positions need not be as many.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Teacher or student do not fit the model, or there is nothing to compare.
    """
    return distil_features(model, config, context, lambda pair: similarity_difference)


def similarity_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of the samples' similarities.

    Between 0 and 4, however large the batch; the paper divides it by the batch size once more and multiplies it by
    3000.

    Args:
        student: Features of shape (batch, channels, *positions).
        teacher: The same; channels and positions may differ.
    """
    return (_similarities(student) - _similarities(teacher)).square().sum(1).mean()


def _similarities(feature: Tensor) -> Tensor:
    vectors = feature.flatten(1)
    return functional.normalize(vectors @ vectors.T)
