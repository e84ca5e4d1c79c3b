"""What fewer bits of single weights cost: measured, or estimated from how the loss bends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from mil_cli.data.base import batch_length
from mil_cli.errors import StageError
from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.quantize.calibrate import observe
from mil_cli.stages.quantize.hessian import hessian_traces
from mil_cli.stages.quantize.layers import Layer, once_for_each_weight
from mil_cli.stages.quantize.observers.channels import ChannelMean
from mil_cli.stages.quantize.ranges import CodeRange
from mil_cli.stages.quantize.rescale import channel_axis
from mil_cli.stages.quantize.weights import weight_scale
from mil_cli.training.evaluate import whole_batches

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.post_training import PostTrainingConfig, Prepared

_BATCH = 256

Curves = list[NDArray[np.float64]]
"""By weight: what each of its widths adds to the cost, from the most bits to the fewest; never less than more add."""


@dataclass(frozen=True)
class Weight:
    """A weight that is quantized, and the widths that it may have.

    Attributes:
        layer: The (first) layer that reads it.
        target: Its path.
        numbers: How many numbers it has.
        widths: Bits, from the most to the fewest.
        codes: The codes of each width.
    """

    layer: Layer
    target: str
    numbers: int
    widths: tuple[int, ...]
    codes: tuple[CodeRange, ...]


Changes = Sequence[tuple[Weight, CodeRange]]
"""Weights, and the codes that each is rounded to."""


def weights_of(prepared: Prepared, widths: Callable[[Layer], Sequence[int]]) -> list[Weight]:
    """Return the weights of a placement; one that several layers read is one.

    Args:
        prepared: The model and its placement.
        widths: Says which bits a layer's weight may have, in any order.
    """

    def weight(layer: Layer) -> Weight:
        target, falling = str(layer.weight.target), tuple(sorted(set(widths(layer)), reverse=True))
        codes = tuple(prepared.rules.codes(layer, bits) for bits in falling)
        return Weight(layer, target, get_attribute(prepared.model.graph, target).numel(), falling, codes)

    shared = once_for_each_weight(prepared.placement.layers, weight)
    return list({id(each): each for each in shared}.values())


@dataclass(frozen=True)
class Rounding:
    """Rounds some weights of a float model for a moment, to see what that does.

    Where biases will be corrected, they are here too, each by what rounding its layer's weight adds to the mean of its
    outputs: most of what a rounded weight does to the outputs may be that.

    Attributes:
        prepared: The float model.
        config: How the ranges of weights are found, and means of inputs.
        context: Gives task and val.
        samples: Samples of val that are looked at; drawn at random, always the same ones.
    """

    prepared: Prepared
    config: PostTrainingConfig
    context: Context
    samples: int

    def rounded(self, weight: Weight, codes: CodeRange) -> Tensor:
        """Return a weight as codes can write it."""
        tensor: Tensor = get_attribute(self.prepared.model.graph, weight.target).detach()
        axis = self.prepared.rules.axis(weight.layer)
        scale = weight_scale(tensor, axis=axis, codes=codes, observer=self.config.weight_observer)
        zero_point = torch.zeros(scale.shape, dtype=torch.int32)
        arguments = (tensor, scale, zero_point, axis, codes.quant_min, codes.quant_max)
        result: Tensor = torch.ops.mil.quantize_affine(*arguments)
        return result

    def loss(self, changes: Changes) -> float:
        """Return the task's loss with some weights rounded."""
        with self._applied(changes):
            return mean_loss(self.prepared.model, self.context, samples=self._samples)

    def distance(self, changes: Changes) -> float:
        """Return the task's distance from the float model's outputs to those with some weights rounded."""
        exact, val, task = self._exact, self.context.data.val, self.context.task
        weighted = seen = 0.0
        with self._applied(changes), torch.no_grad():
            shuffle = self._samples < len(val)
            for batch in whole_batches(exact.spec, val, "val", batch_size=_BATCH, shuffle=shuffle):
                args, kwargs = task.inputs(batch)
                wanted, given = exact(*args, **kwargs), self.prepared.model(*args, **kwargs)
                weighted += float(task.distance(given, wanted, batch, temperature=1.0)) * batch_length(batch)
                seen += batch_length(batch)
                if seen >= self._samples:
                    break
        return weighted / seen

    @cached_property
    def _exact(self) -> Model:
        return self.prepared.model.clone().eval()

    @property
    def _samples(self) -> int:
        return min(self.samples, len(self.context.data.val))

    @cached_property
    def _mean_inputs(self) -> dict[Node, Tensor]:
        """Where biases are corrected: by layer with a bias of its own the mean of each channel that it reads."""
        correction = self.prepared.correction
        layers = [] if correction is None else [layer for layer in correction.layers if layer.bias is not None]
        axes = {layer.node: channel_axis(layer.node) for layer in layers}
        seen = {layer.source: ChannelMean(axes[layer.node]) for layer in layers}
        observe(self.prepared.model, seen, self.config, self.context)
        return {layer.node: seen[layer.source].mean for layer in layers}

    @contextmanager
    def _applied(self, changes: Changes) -> Iterator[None]:
        graph, means = self.prepared.model.graph, self._mean_inputs
        before: list[tuple[Tensor, Tensor]] = []

        def add(path: str, change: Tensor) -> None:
            tensor = get_attribute(graph, path).data
            before.append((tensor, tensor.clone()))
            tensor.add_(change)

        for weight, codes in changes:
            change = self.rounded(weight, codes) - get_attribute(graph, weight.target).detach()
            add(weight.target, change)
            for layer in weight.layer.sharing:
                if layer.bias is not None and layer.node in means:
                    add(str(layer.bias.target), -_shift_of_means(layer, change, means[layer.node]))
        try:
            yield
        finally:
            for tensor, exact in reversed(before):
                tensor.copy_(exact)


def _shift_of_means(layer: Layer, change: Tensor, inputs: Tensor) -> Tensor:
    """Return what a change of a layer's weight adds to the mean of each of its outputs, borders left aside.

    Args:
        layer: A convolution or a linear layer.
        change: Of the shape of its weight, outputs first.
        inputs: The mean of each channel that it reads.
    """
    taps = change.double().flatten(2).sum(2) if change.ndim > 2 else change.double()
    groups = len(inputs) // taps.shape[1]
    return (taps.view(groups, -1, taps.shape[1]) @ inputs.view(groups, -1, 1)).flatten()


def measured_rises(
    weights: Sequence[Weight],
    cost: Callable[[Changes], float],
    context: Context,
    *,
    costs: list[float],
    keep: Callable[[], None],
) -> Curves:
    """Return what each weight in each width, alone, adds to a cost.

    Args:
        weights: The weights.
        cost: What it costs to round some of them.
        context: Gives progress.
        costs: What was measured before an interruption, in order, that of the float model first; new ones are added.
        keep: Called after each new one.

    Raises:
        StageError: The cost of the float model is not finite.
    """
    asked = [(weight, codes) for weight in weights if len(weight.widths) > 1 for codes in weight.codes]
    with context.progress.work(f"{context.name}: sensitivity", 1 + len(asked), done=len(costs)) as bar:
        for place in range(len(costs), 1 + len(asked)):
            costs.append(cost(asked[place - 1 : place] if place else []))
            keep()
            bar.advance()
    if not math.isfinite(costs[0]):
        raise StageError("the model's loss or outputs on val are not finite", where=f"stages.{context.name}")
    rises = iter(costs[1:])
    return [
        _rising([next(rises) - costs[0] for _ in weight.widths] if len(weight.widths) > 1 else [0.0])
        for weight in weights
    ]


def estimated_rises(
    weights: Sequence[Weight],
    rounding: Rounding,
    context: Context,
    *,
    probes: int,
    found: list[list[float]],
    keep: Callable[[], None],
) -> Curves:
    """Return what each weight in each width adds to the loss by its curvature: half the mean trace times the error.

    Dong et al. 2020, HAWQ-V2: the trace of the Hessian over the weight, divided by how many numbers it has, times the
    squared error of rounding.

    Args:
        weights: The weights.
        rounding: The float model, and how its weights are rounded.
        context: Gives task, training samples, as many as `rounding` looks at, and progress.
        probes: How many random vectors the traces are estimated from.
        found: What those vectors gave before an interruption; new ones are added.
        keep: Called after each new one.

    Raises:
        StageError: The loss has no finite second derivative.
    """
    free = [weight for weight in weights if len(weight.widths) > 1]
    targets, model = [weight.target for weight in free], rounding.prepared.model
    traces: list[float] = []
    if targets:
        traces = hessian_traces(
            model, targets, context, samples=rounding.samples, probes=probes, found=found, keep=keep
        )
    means = {weight.target: max(trace, 0.0) / weight.numbers for weight, trace in zip(free, traces, strict=True)}

    def error(weight: Weight, codes: CodeRange) -> float:
        exact = get_attribute(model.graph, weight.target).detach().double()
        return float((rounding.rounded(weight, codes).double() - exact).square().sum())

    return [
        _rising([0.5 * means.get(weight.target, 0.0) * error(weight, codes) for codes in weight.codes])
        for weight in weights
    ]


def _rising(rises: Sequence[float]) -> NDArray[np.float64]:
    values = np.nan_to_num(np.array([0.0, *rises]), nan=math.inf, posinf=math.inf)
    return np.maximum.accumulate(values)[1:]
