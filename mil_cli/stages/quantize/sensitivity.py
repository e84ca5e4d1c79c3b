"""What fewer bits of single weights add to the loss: measured, or estimated from how the loss bends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mil_cli.errors import StageError
from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.judging import mean_loss
from mil_cli.stages.quantize.hessian import hessian_traces
from mil_cli.stages.quantize.placement import Layer
from mil_cli.stages.quantize.ranges import CodeRange, weight_codes
from mil_cli.stages.quantize.weights import WeightObserverName, weight_scale

if TYPE_CHECKING:
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.post_training import Prepared

Curves = list[NDArray[np.float64]]
"""By weight: what each of its widths adds to the loss, from the most bits to the fewest; never less than more add."""


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


def weights_of(prepared: Prepared, widths: Callable[[Layer], Sequence[int]]) -> list[Weight]:
    """Return the weights of a placement; one that several layers read is one.

    Args:
        prepared: The model and its placement.
        widths: Says which bits a layer's weight may have, in any order.
    """
    found: dict[str, Weight] = {}
    for layer in prepared.placement.layers:
        target = str(layer.weight.target)
        if target not in found:
            falling = tuple(sorted(set(widths(layer)), reverse=True))
            codes = tuple(weight_codes(bits, reduce_range=prepared.rules.reduce_range) for bits in falling)
            numbers = get_attribute(prepared.model.graph, target).numel()
            found[target] = Weight(layer, target, numbers, falling, codes)
    return list(found.values())


def rounded(prepared: Prepared, weight: Weight, codes: CodeRange, observer: WeightObserverName) -> Tensor:
    """Return a weight as codes can write it."""
    tensor: Tensor = get_attribute(prepared.model.graph, weight.target).detach()
    axis = prepared.rules.axis(weight.layer)
    scale = weight_scale(tensor, axis=axis, codes=codes, observer=observer)
    zero_point = torch.zeros(scale.shape, dtype=torch.int32)
    result: Tensor = torch.ops.mil.quantize_affine(tensor, scale, zero_point, axis, codes.quant_min, codes.quant_max)
    return result


def loss_when_rounded(
    prepared: Prepared,
    changes: Sequence[tuple[Weight, CodeRange]],
    observer: WeightObserverName,
    context: Context,
    *,
    samples: int,
) -> float:
    """Return the loss on some samples of val with some weights rounded, which are put back."""
    tensors = [get_attribute(prepared.model.graph, weight.target).data for weight, _ in changes]
    before = [tensor.clone() for tensor in tensors]
    for tensor, (weight, codes) in zip(tensors, changes, strict=True):
        tensor.copy_(rounded(prepared, weight, codes, observer))
    loss = mean_loss(prepared.model, context, samples=min(samples, len(context.data.val)))
    for tensor, exact in zip(tensors, before, strict=True):
        tensor.copy_(exact)
    return loss


def measured_rises(
    prepared: Prepared,
    weights: Sequence[Weight],
    observer: WeightObserverName,
    context: Context,
    *,
    samples: int,
    losses: list[float],
    keep: Callable[[], None],
) -> Curves:
    """Return what each weight in each width, alone, adds to the loss on some samples of val.

    Args:
        prepared: The float model; its weights are changed and put back.
        weights: The weights.
        observer: How their ranges are found.
        context: Gives task, val and progress.
        samples: How many samples of val.
        losses: What was measured before an interruption, in order, the float model's first; new ones are added.
        keep: Called after each new one.

    Raises:
        StageError: The loss of the float model is not finite.
    """
    asked = [(weight, codes) for weight in weights if len(weight.widths) > 1 for codes in weight.codes]
    with context.progress.work(f"{context.name}: sensitivity", 1 + len(asked), done=len(losses)) as bar:
        for place in range(len(losses), 1 + len(asked)):
            one = asked[place - 1 : place] if place else []
            losses.append(loss_when_rounded(prepared, one, observer, context, samples=samples))
            keep()
            bar.advance()
    if not math.isfinite(losses[0]):
        raise StageError("the model's loss on val is not finite", where=f"stages.{context.name}")
    rises = iter(losses[1:])
    return [
        _rising([next(rises) - losses[0] for _ in weight.widths] if len(weight.widths) > 1 else [0.0])
        for weight in weights
    ]


def estimated_rises(
    prepared: Prepared,
    weights: Sequence[Weight],
    observer: WeightObserverName,
    context: Context,
    *,
    samples: int,
    probes: int,
    found: list[list[float]],
    keep: Callable[[], None],
) -> Curves:
    """Return what each weight in each width adds to the loss by its curvature: half the mean trace times the error.

    Dong et al. 2020, HAWQ-V2: the trace of the Hessian over the weight, divided by how many numbers it has, times the
    squared error of rounding.

    Args:
        prepared: The float model; not changed.
        weights: The weights.
        observer: How their ranges are found.
        context: Gives task, training samples and progress.
        samples: How many training samples the Hessian is taken on.
        probes: How many random vectors its traces are estimated from.
        found: What those vectors gave before an interruption; new ones are added.
        keep: Called after each new one.

    Raises:
        StageError: The loss has no finite second derivative.
    """
    free = [weight for weight in weights if len(weight.widths) > 1]
    targets = [weight.target for weight in free]
    traces = hessian_traces(prepared.model, targets, context, samples=samples, probes=probes, found=found, keep=keep)
    means = {weight.target: max(trace, 0.0) / weight.numbers for weight, trace in zip(free, traces, strict=True)}

    def error(weight: Weight, codes: CodeRange) -> float:
        exact = get_attribute(prepared.model.graph, weight.target).detach().double()
        return float((rounded(prepared, weight, codes, observer).double() - exact).square().sum())

    return [
        _rising([0.5 * means.get(weight.target, 0.0) * error(weight, codes) for codes in weight.codes])
        for weight in weights
    ]


def _rising(rises: Sequence[float]) -> NDArray[np.float64]:
    values = np.nan_to_num(np.array([0.0, *rises]), nan=math.inf, posinf=math.inf)
    return np.maximum.accumulate(values)[1:]
