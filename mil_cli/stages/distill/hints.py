"""Distillation by hints: layers of the student learn what layers of the teacher give, through learned adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.stages.distill.alignment import Tokens, aligned
from mil_cli.stages.distill.features import FeatureConfig, distil_features
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_SMALLEST = 1e-6  # of features that died


class HintsConfig(FeatureConfig):
    """Settings of distillation by hints, those of `FeatureConfig`."""

    method: ClassVar[str] = "hints"
    version: ClassVar[int] = 2


@stage(HintsConfig)
def hints(model: Model, config: HintsConfig, context: Context) -> Model:
    """Train the student on soft labels and on the squared error of adapted features.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets": the student's features, mapped by an adapter to as many
    channels as the teacher's have, are to equal those. Both terms are trained together from the start.

    Args:
        model: The model in the chain; not changed.
        config: The settings.
        context: Gives task, data, trainer, seed, and the teacher.

    Returns:
        The trained student, in evaluation mode; the adapters are dropped.

    Raises:
        StageError: Teacher or student do not fit the model, or there is nothing to compare.
    """
    generator = context.generator("adapters")
    return distil_features(
        model,
        config,
        context,
        lambda pair: Hint(pair.student.channels, pair.teacher.channels, generator=generator, tokens=pair.tokens),
    )


class Hint(nn.Module):
    """The mean squared error of a student's features behind an adapter, those of both relative to their mean size.

    The adapter maps channels at each position: a 1x1 convolution. It starts as the identity where channels are as many,
    else as an orthogonal map.

    Args:
        student: Channels of the student's features.
        teacher: Channels of the teacher's.
        generator: Draws the weights.
        tokens: Whether sequences of each are of tokens.
    """

    def __init__(
        self, student: int, teacher: int, *, generator: torch.Generator, tokens: Tokens = (True, True)
    ) -> None:
        super().__init__()
        self._tokens = tokens
        self.adapter = nn.Linear(student, teacher)
        nn.init.zeros_(self.adapter.bias)
        if student == teacher:
            nn.init.eye_(self.adapter.weight)
        else:
            nn.init.orthogonal_(self.adapter.weight, generator=generator)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the error of features of shape (batch, channels, *positions).

        Each is divided by the root of its mean square over the batch: the size of features differs a lot between layers
        and networks, and with it the weight of the error and the learning rate at which an adapter is stable would.
        """
        student, teacher = aligned(student, teacher, tokens=self._tokens)
        ours, theirs = _size(student), _size(teacher)
        # The adapter takes both sizes in, so that no feature has to be copied.
        weight, bias = self.adapter.weight * (theirs / ours), self.adapter.bias * theirs
        if student.ndim == 4:
            adapted = functional.conv2d(student, weight[:, :, None, None], bias)  # in either memory format
        else:
            adapted = functional.linear(student.movedim(1, -1), weight, bias).movedim(-1, 1)
        return functional.mse_loss(adapted, teacher) / theirs.square()


def _size(feature: Tensor) -> Tensor:
    """Return the root of the mean square."""
    size: Tensor = torch.linalg.vector_norm(feature) / math.sqrt(feature.numel())
    return size.clamp(min=_SMALLEST)
