"""Scales of weights, whose zero point is 0: one per output channel or one for the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.export.packing import widening
from mil_cli.graph.fold import reads_alone
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, schema_index, set_attribute
from mil_cli.ops import QUANTIZERS
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.ops.levels import level_codes
from mil_cli.stages.quantize.ranges import CodeRange

WeightObserverName = Literal["min_max", "mse"]

_BY_CHANNEL = frozenset({"quantize_affine", "quantize_levels"})
"""Quantizers of weights whose codes integer kernels multiply as they are."""

_CANDIDATES = 71
_AT_ONCE = 2**16
_LEVELS_SHARE = 0.1
"""The share of the whole range below which no best scale of levels lies, ternary ones included."""


def _smallest_share(codes: CodeRange) -> float:
    """Return the share of the whole range below which no best scale lies: with few codes, clipping many pays."""
    return min(0.3, 0.1 * codes.quant_max)


def weight_scale(weight: Tensor, *, axis: int | None, codes: CodeRange, observer: WeightObserverName) -> Tensor:
    """Return the scale of a weight's codes (zero point 0).

    Args:
        weight: The weight, any shape.
        axis: The axis of its output channels, each of which gets a scale; None gives one for all.
        codes: The codes.
        observer: ``min_max`` reaches the smallest and the largest weight; ``mse`` tries 71 shares of that scale, from
            0.3 (with 2 bits 0.1) to 1, and takes that of the smallest squared error.

    Returns:
        float32, shape ``[weight.shape[axis]]``, or ``[]``. A channel of zeros gets the scale that the whole tensor
        would have.
    """
    rows = rows_of(weight, axis)
    scale = rows.new_zeros(len(rows))
    if rows.shape[1]:
        scale = torch.maximum(rows.amax(1) / codes.quant_max, rows.amin(1) / codes.quant_min)
    scale = torch.where(scale > 0, scale, scale.max())
    if observer == "mse":
        scale = _least_squared_error(
            rows, scale, _smallest_share(codes), lambda steps: steps.round_().clamp_(codes.quant_min, codes.quant_max)
        )
    return as_scale(scale, axis)


def level_scale(weight: Tensor, *, axis: int | None, levels: Tensor) -> Tensor:
    """Return the scale with which levels stand for a weight at the smallest squared error, searched as above.

    Args:
        weight: The weight, any shape.
        axis: The axis of its output channels, each of which gets a scale; None gives one for all.
        levels: ``[levels]``, sorted, the largest as far from 0 as the smallest.

    Returns:
        float32, shape ``[weight.shape[axis]]``, or ``[]``.
    """
    rows, known, one = rows_of(weight, axis), levels.double(), torch.ones((), dtype=torch.float64)
    full = rows.abs().amax(1) / known[-1]
    full = torch.where(full > 0, full, full.max())
    scale = _least_squared_error(rows, full, _LEVELS_SHARE, lambda steps: known[level_codes(steps, one, known, None)])
    return as_scale(scale, axis)


def rows_of(weight: Tensor, axis: int | None) -> Tensor:
    """Return a row in double precision for each scale."""
    rows = weight.detach().double()
    return rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).reshape(weight.shape[axis], -1)


def as_scale(scale: Tensor, axis: int | None) -> Tensor:
    """Return scales of rows as a quantizer holds them: float32, positive, ``[]`` where there is no axis."""
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).clamp(min=SMALLEST_SCALE).float()
    return scale.reshape(()) if axis is None else scale


def _least_squared_error(
    rows: Tensor, full: Tensor, smallest_share: float, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return for each row the share of the whole range, as a scale, whose rounding is nearest to it."""
    # So many rows at a time as the processor's cache holds: a table has millions of numbers, read for each candidate.
    count = max(_AT_ONCE // max(rows.shape[1], 1), 1)
    parts = zip(torch.split(rows, count), torch.split(full, count), strict=True)
    return torch.cat([_least_of_few(part, scale, smallest_share, rounded) for part, scale in parts])


def _least_of_few(rows: Tensor, full: Tensor, smallest_share: float, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    best, best_error = full, torch.full_like(full, float("inf"))
    for share in torch.linspace(1.0, smallest_share, _CANDIDATES, dtype=torch.float64):
        scale = full * share
        step = scale.clamp(min=SMALLEST_SCALE)[:, None]
        error = (rounded(rows / step).mul_(step) - rows).square().sum(1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def scale_for_bias(scale: Tensor, bias: Tensor | None, input_scale: float) -> Tensor:
    """Raise the scales of channels whose weights are so small beside their bias that the bias would overflow.

    Integer kernels hold the bias as int32 in steps of ``input_scale * scale``. Folded batch norms and pruning leave
    channels with next to no weights and a real bias; without this floor their bias would saturate.
    """
    if bias is None:
        return scale
    floor = bias.detach().abs().double() / (input_scale * 2.0**28)
    if scale.dim() == 0:
        floor = floor.max()
    return torch.maximum(scale.double(), floor).float()


def settle_biases(graph: GraphModule) -> None:
    """Make biases what integer kernels hold, in place: int32 in steps of the input's scale times the weight's there.

    Scales of weights are raised where `scale_for_bias` asks for it, and biases rounded to whole steps. A step is small,
    but unrounded biases move one code in a thousand, and so the file's outputs away from the graph's. A bias that
    several layers read stays.
    """
    biased = list(_biased_layers(graph))
    for quantizer, _, values, input_scale in biased:
        target = str(get_argument(quantizer, "scale").target)
        set_attribute(graph, target, scale_for_bias(get_attribute(graph, target), values, input_scale))
    # A weight that several layers read has one scale, so that no bias is rounded before all of them have raised it.
    for quantizer, layer, values, input_scale in biased:
        if op_name(quantizer) in _BY_CHANNEL and reads_alone(graph, get_argument(layer, "bias"), layer):
            scale = get_attribute(graph, str(get_argument(quantizer, "scale").target)).detach().double()
            _round_bias(values, input_scale * scale)


def _biased_layers(graph: GraphModule) -> Iterator[tuple[Node, Node, Tensor, float]]:
    """Yield, for each layer with a bias and quantized weight and input: quantizer, layer, bias, the input's scale.

    The scale is divided by what kernels see the weight's codes multiplied by: so much finer are the bias's steps.
    """
    for quantizer in calls(graph):
        weight = get_argument(quantizer, "x") if op_name(quantizer) in QUANTIZERS else None
        if not isinstance(weight, Node) or weight.op != "get_attr":
            continue
        for layer in quantizer.users:
            bias = get_argument(layer, "bias") if schema_index(layer, "bias") is not None else None
            inputs = [node for node in layer.all_input_nodes if op_name(node) == "quantize_affine"]
            sources = [node for node in inputs if node is not quantizer]
            if isinstance(bias, Node) and bias.op == "get_attr" and sources:
                input_scale = float(get_attribute(graph, str(get_argument(sources[0], "scale").target)))
                yield quantizer, layer, get_attribute(graph, str(bias.target)), input_scale / _factor(graph, quantizer)


def _factor(graph: GraphModule, quantizer: Node) -> int:
    """Return what kernels see the codes or levels of a weight multiplied by."""
    if op_name(quantizer) == "quantize_levels":
        levels = get_attribute(graph, str(get_argument(quantizer, "levels").target))
        return widening(int(levels.min()), int(levels.max()))
    return widening(get_argument(quantizer, "quant_min"), get_argument(quantizer, "quant_max"))


def _round_bias(bias: Tensor, step: Tensor) -> None:
    with torch.no_grad():
        bias.copy_((bias.double() / step).round_().mul_(step))
