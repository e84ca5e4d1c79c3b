"""Pruning by a first-order Taylor expansion: what the loss would change by if a group of coupled channels were zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
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
        samples: Training samples whose gradients are taken.
        batch_size: How many of them at once: what each batch says is squared.
        normalise: Whether layers are compared by their scores over the layer's mean; otherwise by the loss alone, as
            the paper does.
    """

    method: ClassVar[str] = "taylor"
    version: ClassVar[int] = 3

    samples: int = Field(1024, ge=1)
    batch_size: int = Field(32, ge=1)
    normalise: bool = True


@stage(TaylorConfig)
def taylor(model: Model, config: TaylorConfig, context: Context) -> Model:
    """Remove the groups of coupled channels without which the loss would change least, to first order.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning": a weight's importance is its gradient
    times itself. In each member of a group (a weight's axis, or a norm's scale with its shift) they are summed over the
    class's weights and the batch; the root of the mean square over the batches is what the member says (summed over all
    batches instead, much would cancel). A class's score is the mean over its members.

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
    """Return by space the first-order change of the loss for each class, none below 0; NaN without any weights.

    Args:
        model: The model.
        coupling: Its analysis.
        context: Gives training samples.
        samples: How many of them.
        batch_size: How many at once.
        normalise: Whether to divide a member's scores by their mean.
    """
    graph = model.graph
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = {name: known for known in weights for name in _all_names(model, known)}
    norms = norm_parameters(graph, "weight")
    members = [scoring_members(graph, space) for space in coupling.spaces]
    totals: dict[tuple[int, int], NDArray[np.float64]] = {}
    count = 0
    for gradient in gradients(model, context, samples=samples, batch_size=batch_size):
        products = {name: value * weights[name] for name, value in gradient.items()}
        count += 1
        for number, space in enumerate(coupling.spaces):
            for place, member in enumerate(members[number]):
                if names.get(member.parameter) not in products:
                    continue  # no gradient reaches it
                lines = along(member, products[names[member.parameter]])
                shift = get_argument(norms[member.parameter], "bias") if member.parameter in norms else None
                if shift is not None and names.get(str(shift.target)) in products:
                    lines = lines + products[names[str(shift.target)]].double()
                totals[number, place] = totals.get((number, place), 0.0) + class_sums(member, space.size, lines) ** 2
    found = []
    for number, space in enumerate(coupling.spaces):
        rows = [np.sqrt(totals[key] / count) for key in sorted(totals) if key[0] == number]
        found.append(mean_of_members(space.size, rows, normalise=normalise))
    return found


def gradients(model: Model, context: Context, *, samples: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield for each batch of training samples the gradient of the task's loss by parameter, where there is one.

    The model is in evaluation mode, so that the statistics of batch norms are those that it has.
    """
    network = model.clone().eval()
    parameters = {name: parameter.requires_grad_(True) for name, parameter in network.named_parameters()}
    size = fixed_batch(model) or batch_size
    with context.progress.work(f"{context.name}: gradients", -(-samples // size)) as bar:
        for batch in context.calibration_batches(samples=samples, batch_size=batch_size, model=model):
            args, kwargs = context.task.inputs(batch)
            loss = context.task.loss(network(*args, **kwargs), batch)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            yield {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
            bar.advance()


def _all_names(model: Model, known: str) -> list[str]:
    """Return all names of a parameter: shared weights have several."""
    named = list(model.graph.named_parameters(remove_duplicate=False))
    value = next(parameter for name, parameter in named if name == known)
    return [name for name, parameter in named if parameter is value]
