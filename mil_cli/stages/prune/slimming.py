"""Network slimming: training pushes the scales of norms towards zero, then the smallest channels go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mil_cli.errors import StageError
from mil_cli.graph.coupling.members import norm_parameters
from mil_cli.stages.prune.bn_scale import BY_CHANNEL, scales
from mil_cli.stages.prune.regularise import RegularisedPruningConfig, train_and_prune
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import StepHook


class SlimmingConfig(RegularisedPruningConfig):
    """Settings of network slimming."""

    method: ClassVar[str] = "slimming"


@stage(SlimmingConfig)
def slimming(model: Model, config: SlimmingConfig, context: Context) -> Model:
    """Train with an L1 penalty on the scales of batch, group and instance norms, then cut the smallest channels.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (ICCV); strengths between
    1e-5 and 1e-4 there.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, training and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: No channel has such a norm, the target cannot be met, or nothing can be cut.
    """
    penalty = sign_penalty(model, config.strength, where=f"stages.{context.name}.method")
    return train_and_prune(model, config, context, lambda current, coupling: scales(current.graph, coupling), penalty)


def sign_penalty(model: Model, strength: float, *, where: str) -> StepHook:
    """Return what adds the gradient of ``strength * sum |gamma|`` before a step.

    Args:
        model: The model whose norms are meant.
        strength: Weight of the penalty.
        where: What an error names.

    Raises:
        StageError: The model has no such norm with a scale.
    """
    own = {name for name, _ in model.named_parameters()}
    names = sorted(own & norm_parameters(model.graph, "weight", BY_CHANNEL).keys())
    if not names:
        raise StageError(
            "the model has no batch, group or instance norm with a scale",
            where=where,
            hint="take another method: prune/group_lasso penalises the weights themselves",
        )

    def before_step(training: Model, steps: int, total: int) -> None:
        parameters = dict(training.named_parameters())
        for name in names:
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.add_(parameters[name].detach().sign(), alpha=strength)

    return before_step
