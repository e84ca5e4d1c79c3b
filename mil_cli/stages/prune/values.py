"""The values that layers read, class by class: what methods look at that judge channels by what flows through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from mil_cli.graph.coupling import Coupling, Space
from mil_cli.graph.coupling.members import Scores, mean_of_members
from mil_cli.graph.nodes import op_name
from mil_cli.graph.watch import watched
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from mil_cli.graph.coupling.disjoint import Labels
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul")

Measure = Callable[[Tensor], Tensor]
"""``(samples, channels, any positions)`` -> one number for each channel: its mean over the samples."""


def score_values(
    model: Model, coupling: Coupling, measure: Measure, context: Context, *, samples: int, batch_size: int
) -> list[Scores]:
    """Return by space the mean of what `measure` gives for each class, over samples and over the values that it is in.

    Values are those that convolutions, linear layers and matrix products read; in a space that has none, all that have
    its channels. Each is divided by its mean over the classes.

    Args:
        model: The model.
        coupling: Its analysis.
        measure: What is measured.
        context: Gives training samples.
        samples: How many.
        batch_size: How many at once.

    Returns:
        By space: one score per class; NaN where no value has its channels.
    """
    places = [list(_places(coupling, space)) for space in coupling.spaces]
    means = {(node, axis): _Mean(measure, axis) for found in places for node, axis, _ in found}
    by_node: dict[Node, list[_Mean]] = {}
    for (node, _), mean in means.items():
        by_node.setdefault(node, []).append(mean)
    runner = watched(coupling.graph, {node: _all(looks) for node, looks in by_node.items()})
    size = fixed_batch(model) or batch_size
    with context.progress.work(f"{context.name}: watching channels", -(-samples // size)) as bar, torch.no_grad():
        for args, kwargs in context.calibration(samples=samples, batch_size=batch_size, model=model):
            runner(*args, **kwargs)
            bar.advance()
    scores = []
    for space, found in zip(coupling.spaces, places, strict=True):
        rows = [_by_class(means[node, axis].result(), labels, space.size) for node, axis, labels in found]
        scores.append(mean_of_members(space.size, rows, normalise=True))
    return scores


class _Mean:
    """The mean over batches of a measure of a value's channels."""

    def __init__(self, measure: Measure, axis: int) -> None:
        self._measure, self._axis = measure, axis
        self._total: Tensor | float = 0.0
        self._count = 0

    def update(self, value: Tensor) -> None:
        # The first axis is that of the samples, which no channel lies on.
        channels = value.detach().movedim(self._axis, 1)
        self._total = self._total + self._measure(channels).double() * len(value)
        self._count += len(value)

    def result(self) -> Tensor:
        return torch.as_tensor(self._total) / self._count


def _all(looks: list[_Mean]) -> Callable[[Tensor], None]:
    def look(value: Tensor) -> None:
        for mean in looks:
            mean.update(value)

    return look


def _places(coupling: Coupling, space: Space) -> Iterator[tuple[Node, int, Labels]]:
    """Yield the nodes that have the channels of a space, with the axis and the class of each index."""
    recording = coupling.recording
    found = []
    for node in coupling.graph.graph.nodes:
        if (
            node.op not in ("call_function", "placeholder")
            or not recording.dtypes.get(node.name, torch.int).is_floating_point
        ):
            continue
        for axis, labels in space.labels.get(node.name, {}).items():
            if axis > 0:
                found.append((node, axis, labels))
    read = [place for place in found if any(op_name(user) in _LAYERS for user in place[0].users)]
    yield from read or found


def _by_class(values: Tensor, labels: Labels, size: int) -> Scores:
    present = labels >= 0
    sums = np.bincount(labels[present], weights=values.numpy()[present], minlength=size)
    counts = np.bincount(labels[present], minlength=size)
    means: Scores = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
    return means
