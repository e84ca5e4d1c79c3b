"""Architecture search by gradients: all operators run at once, weighted, and the weights are learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mil_cli.stages.nas.relaxed import Relaxation, RelaxedConfig, search_relaxed
from mil_cli.stages.nas.strengths import zero_one
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class DartsConfig(RelaxedConfig):
    """Settings of ``nas/darts``, beside those of all differentiable searches.

    Attributes:
        fair: Whether each operator has a weight of its own (FairDARTS), so that one need not push out another.
        zero_one_weight: Of the loss that drives such weights to 0 or 1.
        threshold: Of such weights: an edge whose operators all have less passes nothing on, if it may and another edge
            into its node does.
    """

    method: ClassVar[str] = "darts"
    version: ClassVar[int] = 3

    fair: bool = False
    zero_one_weight: float = Field(10.0, ge=0, allow_inf_nan=False)
    threshold: float = Field(0.85, ge=0, lt=1)


@stage(DartsConfig)
def darts(model: Model, config: DartsConfig, context: Context) -> Model:
    """Return the architecture whose operators have the largest weights in a mixture of all.

    Liu et al. 2019, "DARTS: Differentiable Architecture Search" (arXiv:1806.09055), of first order: the weights of the
    operators' layers are trained on one half of train, the strengths of the operators by Adam on the other half, in
    turn. An operator's weight is the softmax of the strengths on its edge; an edge gets the strongest that passes
    something on, and a node keeps its strongest `edges`. In the search, a norm without parameters follows pooling.

    With `fair`, weights are sigmoids that are driven to 0 or 1 (Chu et al. 2020, "Fair DARTS: Eliminating Unfair
    Advantages in Differentiable Architecture Search", arXiv:1911.12126). The paper keeps every operator above the
    threshold; here an edge has one.

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The architecture found, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice between operators.
    """
    if not config.fair:
        return search_relaxed(model, config, Relaxation(), context)
    weight = config.zero_one_weight
    fair = Relaxation(apart=True, penalty=lambda weights: weight * zero_one(weights), threshold=config.threshold)
    return search_relaxed(model, config, fair, context)
