"""The traces of a loss's Hessian over single weights: how much the loss bends along each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mil_cli.data.base import batch_length
from mil_cli.errors import StageError
from mil_cli.graph.nodes import get_attribute

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_BATCH = 64


def hessian_traces(
    model: Model,
    weights: Sequence[str],
    context: Context,
    *,
    samples: int,
    probes: int,
    found: list[list[float]],
    keep: Callable[[], None],
) -> list[float]:
    """Return for each weight the trace of the Hessian of the task's loss over it, on training samples.

    Hutchinson's estimate: the mean of ``v . H v`` over vectors `v` of random signs, as Dong et al. use it in HAWQ-V2
    (2020). One product with the Hessian of all weights together serves all of them: what couples two weights has a
    mean of 0.

    Args:
        model: A float model in evaluation mode; not changed.
        weights: The paths of its weights.
        context: Gives task, training samples, random signs and progress.
        samples: How many samples the loss is the mean over, about.
        probes: How many vectors are drawn.
        found: By vector, what it gave for each weight, as known from before an interruption; new ones are added.
        keep: Called after each new one.

    Raises:
        StageError: A derivative is missing in torch, or not finite.
    """
    model = model.clone().eval()
    tensors = [get_attribute(model.graph, name).requires_grad_() for name in weights]
    with context.progress.work(f"{context.name}: Hessian", probes, done=len(found)) as bar:
        for number in range(len(found), probes):
            generator = context.generator(f"hessian {number}")
            signs = [torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1.0 for tensor in tensors]
            found.append(_curvatures(model, tensors, signs, context, samples))
            keep()
            bar.advance()
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()


def _curvatures(
    model: Model, weights: Sequence[Tensor], vectors: Sequence[Tensor], context: Context, samples: int
) -> list[float]:
    """Return each vector's product with the part of ``H v`` that belongs to its weight."""
    task = context.task
    sums = torch.zeros(len(weights), dtype=torch.float64)
    seen = 0
    for batch in context.calibration_batches(samples=samples, batch_size=_BATCH, model=model):
        args, kwargs = task.inputs(batch)
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                loss = task.loss(model(*args, **kwargs), batch)
                first = torch.autograd.grad(loss, weights, create_graph=True)
                along = torch.stack([(one * vector).sum() for one, vector in zip(first, vectors, strict=True)]).sum()
                second = torch.autograd.grad(along, weights)
        except RuntimeError as error:  # an operator has none, or a weight is not reached through any
            reason = str(error).splitlines()[0]
            hint = "take sensitivity: loss"
            raise StageError(f"the loss has no second derivative: {reason}", where="sensitivity", hint=hint) from None
        here = [float((one.double() * vector).sum()) for one, vector in zip(second, vectors, strict=True)]
        sums += batch_length(batch) * torch.tensor(here, dtype=torch.float64)
        seen += batch_length(batch)
    if not bool(torch.isfinite(sums).all()):
        raise StageError("the Hessian of the loss is not finite", where="sensitivity", hint="take sensitivity: loss")
    return (sums / seen).tolist()
