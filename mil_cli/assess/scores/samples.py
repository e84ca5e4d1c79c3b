"""Which entries of a value inside a graph belong to which sample: found by running samples in another order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from mil_cli.assess.scores.subject import Subject
from mil_cli.errors import ModelError
from mil_cli.graph.samples import resize_batch
from mil_cli.graph.watch import watched

_TRIED = 3
"""Samples that are run twice; in the other order none keeps its place."""
_MOST_ASTRAY = 0.1
"""Of what samples differ by, what two runs of one sample may differ by."""


@dataclass(frozen=True)
class Layout:
    """Where a value has its samples.

    Attributes:
        axis: The axis.
        inner: Whether they are the inner part of an axis that counts something else too (tokens, then samples);
            otherwise they are the outer part, or all of it.
    """

    axis: int
    inner: bool

    def by_sample(self, value: Tensor, samples: int) -> Tensor:
        """Return a value as ``[samples, what else the axis counts, the other axes]``."""
        first = value.movedim(self.axis, 0)
        if self.inner:
            return first.reshape(-1, samples, *first.shape[1:]).transpose(0, 1)
        return first.reshape(samples, -1, *first.shape[1:])


def layouts(subject: Subject, nodes: Iterable[Node]) -> dict[Node, Layout]:
    """Return where values of the subject's network have their samples.

    Neither shapes nor operators tell that where a reshape has joined axes, as around the attention of
    `torch.nn.MultiheadAttention`. So a few samples run in two orders, in evaluation mode, where nothing is drawn: what
    belongs to them changes its place as they do.

    Raises:
        ModelError: Some value does not consist of one part for each sample.
    """
    call = subject.task.inputs(subject.batches[0])
    spec = subject.model.spec
    samples = spec.fixed_batch or _TRIED
    args, kwargs = resize_batch(call, spec, samples)
    axes = iter([tensor.batch_axis() if spec.batch else 0 for tensor in spec.inputs])
    moved: Any = pytree.tree_map_only(Tensor, lambda value: _next(value, next(axes)), (args, kwargs))
    seen: dict[Node, list[dict[Layout, Tensor]]] = {node: [] for node in nodes}
    runner = watched(
        subject.network.eval().graph, {node: partial(_sum_up, sums, samples) for node, sums in seen.items()}
    )
    subject.network.train()
    with torch.no_grad():
        runner(*args, **kwargs)
        runner(*moved[0], **moved[1])
    return {node: _layout(node, before, after) for node, (before, after) in seen.items()}


def _next(value: Tensor, axis: int | None) -> Tensor:
    return value.roll(1, axis) if axis is not None and value.ndim else value


def _sum_up(kept: list[dict[Layout, Tensor]], samples: int, value: Tensor) -> None:
    """Keep the sum over each sample's part, by every layout that a value may have."""
    kept.append(
        {
            layout: layout.by_sample(value, samples).flatten(1).sum(1, dtype=torch.float64)
            for layout in _candidates(value, samples)
        }
    )


def _candidates(value: Tensor, samples: int) -> Iterator[Layout]:
    for axis, size in enumerate(value.shape):
        if size and size % samples == 0:
            yield from (Layout(axis, inner) for inner in ((False, True) if size > samples else (False,)))


def _layout(node: Node, sums: dict[Layout, Tensor], moved: dict[Layout, Tensor]) -> Layout:
    """Return the layout by which the sums change places with the samples."""
    astray = {layout: _astray(each, moved[layout]) for layout, each in sums.items()}
    best = min(astray, key=lambda layout: astray[layout], default=None)
    if best is None or astray[best] > _MOST_ASTRAY:
        raise ModelError(
            f"the value of {node.name} does not consist of one part for each sample",
            hint="this score needs a model in which samples do not depend on each other",
        )
    return best


def _astray(sums: Tensor, moved: Tensor) -> float:
    """Return how far sums are from having moved by one place, over how far they would be if they had stayed."""
    expected = sums.roll(1)
    change = float((expected - sums).abs().max())
    return float((moved - expected).abs().max()) / change if change else _MOST_ASTRAY  # it says nothing
