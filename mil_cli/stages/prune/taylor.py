"""Pruning by a first-order Taylor expansion: what the loss would change by if a group of coupled channels were zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mil_cli.graph.coupling.members import along, class_sums, mean_of_members, norm_parameters, scoring_members
from mil_cli.graph.nodes import get_argument
from mil_cli.stages.prune.schedule import prune
from mil_cli.stages.prune.settings import StructuredPruningConfig
from mil_cli.stages.registry import stage
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.coupling import Coupling
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.prune.selection import Scores


class TaylorConfig(StructuredPruningConfig):
    """Settings of pruning by Taylor expansion.

    Attributes:
        samples: Training samples whose gradients are summed.
        batch_size: How many of them at once.
        normalise: Whether layers are compared by their scores over the layer's mean; otherwise by the loss alone, as
            the paper does.
    """

    method: ClassVar[str] = "taylor"

    samples: int = Field(1024, ge=1)
    batch_size: int = Field(128, ge=1)
    normalise: bool = True


@stage(TaylorConfig)
def taylor(model: Model, config: TaylorConfig, context: Context) -> Model:
    """Remove the groups of coupled channels without which the loss would change least, to first order.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning": a weight's importance is its gradient
    times itself. In each member of a group (a weight's axis, or a norm's scale with its shift) they are summed over the
    class's weights and over all samples before the magnitude is taken, so that what cancels cancels (the paper squares
    the sum of each batch); a class's score is the mean over its members.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, device, fine-tuning and checkpoints.

    Returns:
        The smaller model, in evaluation mode.

    Raises:
        StageError: The target cannot be met, or nothing can be cut.
    """
    return prune(
        model,
        config,
        context,
        lambda current, coupling: first_order(
            current,
            coupling,
            context,
            samples=config.samples,
            batch_size=config.batch_size,
            normalise=config.normalise,
        ),
    )


def first_order(
    model: Model, coupling: Coupling, context: Context, *, samples: int, batch_size: int, normalise: bool
) -> Scores:
    """Return by space the absolute first-order change of the loss for each class; NaN without any weights.

    Args:
        model: The model.
        coupling: Its analysis.
        context: Gives training samples.
        samples: How many of them.
        batch_size: How many at once.
        normalise: Whether to divide a member's scores by their mean.
    """
    products = {
        name: gradient * dict(model.named_parameters())[name].detach()
        for name, gradient in gradients(model, context, samples=samples, batch_size=batch_size).items()
    }
    graph = model.graph
    names = {name: known for known in products for name in _all_names(model, known)}
    norms = norm_parameters(graph, "weight")
    found = []
    for space in coupling.spaces:
        rows = []
        for member in scoring_members(graph, space):
            if member.parameter not in names:
                continue  # no gradient reaches it
            lines = along(member, products[names[member.parameter]])
            shift = get_argument(norms[member.parameter], "bias") if member.parameter in norms else None
            if shift is not None and str(shift.target) in names:
                lines = lines + products[names[str(shift.target)]].double()
            rows.append(np.abs(class_sums(member, space.size, lines)))
        found.append(mean_of_members(space.size, rows, normalise=normalise))
    return found


def gradients(model: Model, context: Context, *, samples: int, batch_size: int) -> dict[str, Tensor]:
    """Return by parameter the gradient of the task's loss, summed over batches of training samples.

    The model is in evaluation mode, so that the statistics of batch norms are those that it has.
    """
    network = model.clone().eval()
    parameters = {name: parameter.requires_grad_(True) for name, parameter in network.named_parameters()}
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    reached: set[str] = set()
    size = fixed_batch(model) or batch_size
    with context.progress.work(f"{context.name}: gradients", -(-samples // size)) as bar:
        for batch in context.calibration_batches(samples=samples, batch_size=size):
            args, kwargs = context.task.inputs(batch)
            loss = context.task.loss(network(*args, **kwargs), batch)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient
                    reached.add(name)
            bar.advance()
    return {name: totals[name] for name in totals if name in reached}


def _all_names(model: Model, known: str) -> list[str]:
    """Return all names of a parameter: shared weights have several."""
    named = list(model.graph.named_parameters(remove_duplicate=False))
    value = next(parameter for name, parameter in named if name == known)
    return [name for name, parameter in named if parameter is value]
