"""Distillation by hints: layers of the student learn what layers of the teacher give, through learned adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mil_cli.stages.distill.alignment import aligned
from mil_cli.stages.distill.features import FeatureConfig, distil_features
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class HintsConfig(FeatureConfig):
    """Settings of distillation by hints, those of `FeatureConfig`."""

    method: ClassVar[str] = "hints"


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
        lambda pair: Hint(pair.student.channels, pair.teacher.channels, generator=generator),
    )


class Hint(nn.Module):
    """The squared error of a student's features behind an adapter, relative to the mean square of the teacher's.

    The adapter maps channels at each position: a 1x1 convolution. It starts as the identity where channels are as many,
    else as an orthogonal map.

    Args:
        student: Channels of the student's features.
        teacher: Channels of the teacher's.
        generator: Draws the weights.
    """

    def __init__(self, student: int, teacher: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.adapter = nn.Linear(student, teacher)
        nn.init.zeros_(self.adapter.bias)
        if student == teacher:
            nn.init.eye_(self.adapter.weight)
        else:
            nn.init.orthogonal_(self.adapter.weight, generator=generator)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the error of features of shape (batch, channels, *positions)."""
        student, teacher = aligned(student, teacher)
        weight, bias = self.adapter.weight, self.adapter.bias
        if student.ndim == 4:
            adapted = functional.conv2d(student, weight[:, :, None, None], bias)  # in either memory format
        else:
            adapted = self.adapter(student.movedim(1, -1)).movedim(-1, 1)
        # Relative, since the scale of features differs between layers and networks: predicting 0 gives 1.
        scale = teacher.square().mean().clamp(min=torch.finfo(teacher.dtype).tiny)
        return functional.mse_loss(adapted, teacher) / scale
