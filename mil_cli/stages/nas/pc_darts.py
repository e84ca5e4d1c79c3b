"""Architecture search by gradients on a part of the channels, with weights of edges beside those of operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from mil_cli.stages.nas.relaxed import Relaxation, RelaxedConfig, search_relaxed
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class PcDartsConfig(RelaxedConfig):
    """Settings of ``nas/pc_darts``, beside those of all differentiable searches.

    Attributes:
        share: One of so many channels passes through the operators of an edge, the others pass by.
        normalise_edges: Whether the edges into a node have strengths too, whose softmax weighs them.
    """

    method: ClassVar[str] = "pc_darts"
    version: ClassVar[int] = 2

    strength_learning_rate: float = Field(6e-4, gt=0, allow_inf_nan=False)
    frozen: float = Field(0.3, ge=0, lt=1)
    share: int = Field(4, ge=1)
    normalise_edges: bool = True


@stage(PcDartsConfig)
def pc_darts(model: Model, config: PcDartsConfig, context: Context) -> Model:
    """Return the architecture whose operators have the largest weights in a mixture of all on a part of the channels.

    Xu et al. 2020, "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search"
    (arXiv:1907.05737). It is `darts` with two changes: only one of `share` channels passes through the mixture, after
    which channels are shuffled, so that a step costs less and operators without weights gain less by starting well; and
    the edges into a node have weights, which makes up for which channels happen to be drawn. Strengths learn only after
    a first part of the search.

    Args:
        model: The space's largest architecture; it says what the others take and give.
        config: The settings.
        context: Gives the space, data, trainer, fine-tuning and checkpoints.

    Returns:
        The architecture found, in evaluation mode.

    Raises:
        StageError: The recipe's model holds no choice between operators.
        ModelError: Their channels cannot be divided so.
    """
    return search_relaxed(model, config, Relaxation(edges=config.normalise_edges, share=config.share), context)
