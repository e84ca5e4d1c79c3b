"""Distillation by attention transfer: the student is strong at the positions where the teacher is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mil_cli.stages.distill.alignment import Tokens, aligned
from mil_cli.stages.distill.features import FeatureConfig, distil_features
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class AttentionTransferConfig(FeatureConfig):
    """Settings of distillation by attention transfer, those of `FeatureConfig`."""

    method: ClassVar[str] = "attention_transfer"
    version: ClassVar[int] = 2

    feature_weight: float = Field(10.0, ge=0, allow_inf_nan=False)


@stage(AttentionTransferConfig)
def attention_transfer(model: Model, config: AttentionTransferConfig, context: Context) -> Model:
    """Train the student on soft labels and on the distance of attention maps.

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention": the attention of a layer is the sum of squares
    over its channels at each position of a map, or at each token, as a vector of length 1. Channels need not be as
    many; maps of other resolutions are averaged to the coarser one.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode.

    Raises:
        StageError: Teacher or student do not fit the model, or there is nothing to compare.
    """
    return distil_features(
        model, config, context, lambda pair: partial(attention_difference, tokens=pair.tokens), mapped=True
    )


def attention_difference(student: Tensor, teacher: Tensor, *, tokens: Tokens = (True, True)) -> Tensor:
    """Return the mean squared distance of the attention of features of shape (batch, channels, *positions).

    Between 0 and 2 for each sample, however many positions there are; the paper divides it by their number and
    multiplies it by 1000.

    Args:
        student: The student's.
        teacher: The teacher's; channels and positions may differ.
        tokens: Whether sequences of each are of tokens.
    """
    maps = [feature.square().mean(1, keepdim=True) for feature in (student, teacher)]
    one, other = aligned(*maps, tokens=tokens)
    return (functional.normalize(one.flatten(1)) - functional.normalize(other.flatten(1))).square().sum(1).mean()
