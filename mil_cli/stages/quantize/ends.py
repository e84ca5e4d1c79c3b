"""The values at both ends of a part of a model: what the quantized one gives it, what the float one makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.data.base import Batch
from mil_cli.graph.model import Model
from mil_cli.graph.segment import Segment
from mil_cli.graph.watch import watched
from mil_cli.task.base import Task


@dataclass(frozen=True)
class Ends:
    """The values at both ends of a unit, by batch.

    Attributes:
        inputs: What the quantized units before it give it.
        smooth: What the float ones do; empty lists where that was not asked for.
        targets: What the float model has at its end.
        importance: The weight of each error, shaped like the targets, with a mean of 1; None: all weigh the same.
        channels: Output channels: errors are summed over them.
    """

    inputs: list[list[Any]]
    smooth: list[list[Any]]
    targets: list[Tensor]
    importance: list[Tensor] | None
    channels: int

    def error(self, output: Tensor, batch: int) -> Tensor:
        """Return the squared error of a position, summed over channels, in the mean of a batch."""
        squares = (output - self.targets[batch]).square()
        if self.importance is not None:
            squares = squares * self.importance[batch]
        return squares.sum() * (self.channels / squares.numel())

    @torch.no_grad()
    def whole_error(self, module: GraphModule) -> float:
        """Return the error of a module in the mean of all batches."""
        errors = [self.error(module(*inputs), batch) for batch, inputs in enumerate(self.inputs)]
        return float(torch.stack(errors).double().mean())


def read_ends(
    part: Segment,
    quantized: Model,
    original: Model,
    batches: Sequence[Batch],
    task: Task,
    *,
    channels: int,
    smooth: bool,
    fisher: bool,
) -> Ends:
    """Run two models on samples and keep what they have at both ends of a part that is in either, by the same names.

    Args:
        part: The part, in `quantized`.
        quantized: Gives the inputs.
        original: The float model: gives the targets. Its parameters need gradients for `fisher`.
        batches: The samples.
        task: Takes inputs out of them, and gives the loss.
        channels: Output channels of the part.
        smooth: Whether the inputs that the float model gives are kept too.
        fisher: Whether errors weigh by the squared gradient of the loss: the diagonal of the empirical Fisher matrix,
            by which Li et al., BRECQ (2021), approximate what an error costs the task.
    """
    names = [node.name for node in part.inputs]
    inputs = [values for values, _ in _values(quantized, names, batches, task)]
    given, targets, importance = [], [], []
    both = [*(names if smooth else []), part.end.name]
    for (*before, target), slope in _values(original, both, batches, task, gradient=fisher):
        given.append(before)
        targets.append(target)
        if slope is not None:
            importance.append(slope.square())
    mean = float(torch.stack([batch.mean() for batch in importance]).mean()) if importance else 0.0
    weights = [batch / mean for batch in importance] if mean > 0 else None
    return Ends(inputs, given, targets, weights, channels)


def _values(
    model: Model, names: Sequence[str], batches: Sequence[Batch], task: Task, *, gradient: bool = False
) -> Iterator[tuple[list[Any], Tensor | None]]:
    """Yield for each batch the values of some nodes, and the gradient of the task's loss at the last of them."""
    found: dict[str, Any] = {}
    nodes: dict[str, Node] = {node.name: node for node in model.graph.graph.nodes}
    runner = watched(model.graph, {nodes[name]: partial(found.__setitem__, name) for name in names})
    for batch in batches:
        args, kwargs = task.inputs(batch)
        slope = None
        with torch.set_grad_enabled(gradient):
            outputs = runner(*args, **kwargs)
            if gradient:
                loss = task.loss(outputs, batch)
                (slope,) = torch.autograd.grad(loss, found[names[-1]], materialize_grads=True)
        yield [_copied(found[name]) for name in names], slope


def _copied(value: Any) -> Any:
    """Return a value that nobody writes into; sizes are numbers."""
    return value.detach().clone() if isinstance(value, Tensor) else value
