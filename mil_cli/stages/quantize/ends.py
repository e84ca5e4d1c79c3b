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
from mil_cli.graph.taps import Tapped
from mil_cli.graph.watch import watched
from mil_cli.task.base import Task

_SLOPE = "gradient of the loss"


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
    inputs = [[_copied(value) for value in values.values()] for values in _seen(quantized, names, batches, task)]
    both = [*(names if smooth else []), part.end.name]
    given, targets, importance = [], [], []
    for values in (_differentiated if fisher else _seen)(original, both, batches, task):
        if _SLOPE in values:
            importance.append(values.pop(_SLOPE).square())
        *before, target = (_copied(value) for value in values.values())
        given.append(before)
        targets.append(target)
    mean = float(torch.stack([batch.mean() for batch in importance]).mean()) if importance else 0.0
    weights = [batch / mean for batch in importance] if mean > 0 else None
    return Ends(inputs, given, targets, weights, channels)


def _seen(model: Model, names: Sequence[str], batches: Sequence[Batch], task: Task) -> Iterator[dict[str, Any]]:
    """Yield the values of some nodes by name, in the order of the names, for each batch."""
    found: dict[str, Any] = {}
    nodes = _by_name(model, names)
    runner = watched(model.graph, {node: partial(found.__setitem__, name) for name, node in nodes.items()})
    for batch in batches:
        args, kwargs = task.inputs(batch)
        with torch.no_grad():
            runner(*args, **kwargs)
        yield {name: found[name] for name in names}


def _differentiated(
    model: Model, names: Sequence[str], batches: Sequence[Batch], task: Task
) -> Iterator[dict[str, Any]]:
    """Yield the same, with the gradient of the task's loss at the last of the nodes."""
    tapped = Tapped(model, _by_name(model, names))
    for batch in batches:
        args, kwargs = task.inputs(batch)
        outputs, values = tapped(*args, **kwargs)
        loss = task.loss(outputs, batch)
        (slope,) = torch.autograd.grad(loss, values[names[-1]], materialize_grads=True)
        yield {**values, _SLOPE: slope}


def _by_name(model: Model, names: Sequence[str]) -> dict[str, Node]:
    nodes = {node.name: node for node in model.graph.graph.nodes}
    return {name: nodes[name] for name in names}


def _copied(value: Any) -> Any:
    """Return a value that nobody writes into; sizes are numbers."""
    return value.detach().clone() if isinstance(value, Tensor) else value
