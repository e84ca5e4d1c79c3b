"""Rounds the weights of quantized layers one input at a time, the inputs to come making up for each rounding error."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.graph.fold import reads_alone
from mil_cli.graph.nodes import get_argument, get_attribute, op_name
from mil_cli.ops.blocks import block_steps
from mil_cli.stages.curvature import input_curvature, inverse_factor
from mil_cli.stages.quantize.ranges import CodeRange

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.stages.quantize.layers import Layer

_BLOCK = 128
"""Inputs among which errors are passed on at once; those behind them get theirs in one product."""

_RAISES = (1.0, 10.0, 100.0)
"""What damping is multiplied by, in turn, until the curvature can be inverted."""


@dataclass(frozen=True)
class Compensation:
    """How weights are rounded.

    Attributes:
        samples: Training samples over which layers keep their outputs.
        batch_size: How many of them at once.
        damping: Share of the mean curvature that is added to each.
        act_order: Whether inputs with the largest curvature are rounded first.
    """

    samples: int
    batch_size: int
    damping: float
    act_order: bool


def round_layers(model: Model, layers: Sequence[Layer], how: Compensation, context: Context) -> None:
    """Put the weights of quantized layers on their grids, in place, so that the layers' outputs change little.

    The layers follow each other: each sees what the quantized ones before it give. A layer whose weight others read
    too, or whose curvature cannot be inverted, keeps its weight, which its quantizer rounds to nearest.

    Args:
        model: A model with quantizers; the scales of its weights stay as they are.
        layers: Its layers, in order of execution.
        how: The settings.
        context: Gives calibration samples and checkpoints; is told what the report shows.
    """
    curvatures = _Curvatures(model, how, context)
    ratios: dict[str, float] = {}
    nearest: dict[str, str] = {}
    with context.progress.work(f"{context.name}: rounding weights", len(layers)) as bar:
        for number, layer in enumerate(layers):
            slot = context.slot(f"layer{number}")
            state = slot.load()
            if state is None:
                state = _round_layer(model.graph, layer, curvatures, how)
                slot.save(state)
            if state["weight"] is None:
                nearest[layer.name] = state["reason"]
            else:
                ratios[layer.name] = state["ratio"]
                with torch.no_grad():
                    get_attribute(model.graph, _weight_name(layer)).copy_(state["weight"])
            bar.advance()
    context.note(error_to_nearest=ratios, rounded_to_nearest=nearest)


class _Curvatures:
    """Gives the curvature of each layer's inputs; products that follow each other and read one value share theirs."""

    def __init__(self, model: Model, how: Compensation, context: Context) -> None:
        self._model, self._how, self._context = model, how, context
        self._source: object = None
        self._known = torch.empty(0)

    def of(self, layer: Layer) -> Tensor:
        source = layer.node.args[0]
        if self._source is not source:
            samples, batch_size = self._how.samples, self._how.batch_size
            self._known = input_curvature(
                self._model, layer.node, self._context, samples=samples, batch_size=batch_size
            )
            self._source = None if op_name(layer.node).startswith("conv") else source
        return self._known


def _weight_name(layer: Layer) -> str:
    return str(layer.node.args[1].args[0].target)  # type: ignore[union-attr]


def _round_layer(graph: GraphModule, layer: Layer, curvatures: _Curvatures, how: Compensation) -> dict[str, Any]:
    """Return a layer's new weight and its output error beside that of rounding to nearest, or why there is none."""
    quantizer: Node = layer.node.args[1]  # type: ignore[assignment]
    if set(quantizer.users) != {layer.node} or not reads_alone(graph, quantizer.args[0], quantizer):
        return {"weight": None, "reason": "several layers read its weight"}
    weight: Tensor = get_attribute(graph, _weight_name(layer)).detach()
    rows = weight.movedim(layer.axis, 0)
    curvature = curvatures.of(layer)
    shape = (len(curvature), -1, curvature.shape[-1])  # groups, outputs of each, inputs
    step = weight_steps(graph, quantizer, weight.shape).movedim(layer.axis, 0).reshape(shape)
    codes = CodeRange(get_argument(quantizer, "quant_min"), get_argument(quantizer, "quant_max"))
    solved = round_rows(rows.double().reshape(shape), step.double(), curvature, codes, how)
    if solved is None:
        return {"weight": None, "reason": "the curvature of its inputs cannot be inverted; raise damping"}
    rounded, ratio = solved
    return {"weight": rounded.reshape(rows.shape).movedim(0, layer.axis).to(weight.dtype), "ratio": ratio}


def weight_steps(graph: GraphModule, quantizer: Node, shape: torch.Size) -> Tensor:
    """Return the step of each number of a weight with this shape."""
    scale: Tensor = get_attribute(graph, str(get_argument(quantizer, "scale").target)).detach()
    axis = get_argument(quantizer, "axis")
    if op_name(quantizer) == "quantize_blocks":
        return block_steps(scale, shape, axis, get_argument(quantizer, "block_size"))
    if axis is None:
        return scale.reshape(()).expand(shape)
    return scale.reshape([-1 if position == axis % len(shape) else 1 for position in range(len(shape))]).expand(shape)


def round_rows(
    rows: Tensor, step: Tensor, curvature: Tensor, codes: CodeRange, how: Compensation
) -> tuple[Tensor, float] | None:
    """Round weights so that ``X w`` changes little, where rounding to nearest changes each weight least.

    A column's error ``e`` is made up for by the columns behind it: they lose ``e / U_ii * U_i,:``, U being the upper
    Cholesky factor of the inverse curvature. An output that this makes worse, as clipping can, is rounded to nearest.
    Weights of 0 stay, so that a sparse layer does.

    Args:
        rows: float64 ``[groups, outputs, inputs]``.
        step: float64, shaped so: distance of neighbouring codes.
        curvature: float64 ``[groups, inputs, inputs]``.
        codes: The codes, whose zero point is 0.
        how: The settings.

    Returns:
        The rounded rows, and their error in the layer's outputs over that of rounding to nearest (1 where that has
        none); None if the curvature cannot be inverted.
    """

    def nearest(values: Tensor, steps: Tensor) -> Tensor:
        return (values / steps).round_().clamp_(codes.quant_min, codes.quant_max).mul_(steps)

    order = torch.arange(rows.shape[2]).expand(len(rows), -1)
    if how.act_order:
        order = curvature.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None].expand_as(rows)
    inverse = _inverse(curvature.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2), how.damping)
    if inverse is None:
        return None
    left, steps = rows.gather(2, columns), step.gather(2, columns)
    kept = left != 0
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[2], _BLOCK):
        end = min(start + _BLOCK, left.shape[2])
        errors = left.new_empty(*left.shape[:2], end - start)
        for column in range(start, end):
            rounded[..., column] = nearest(left[..., column], steps[..., column]).mul_(kept[..., column])
            error = (left[..., column] - rounded[..., column]) / inverse[:, column, column, None]
            left[..., column + 1 : end] -= error[..., None] * inverse[:, None, column, column + 1 : end]
            errors[..., column - start] = error
        left[..., end:] -= errors @ inverse[:, start:end, end:]
    compensated = torch.empty_like(rounded).scatter_(2, columns, rounded)
    plain = nearest(rows, step)
    error, plain_error = (((each - rows) @ curvature) * (each - rows) for each in (compensated, plain))
    error, plain_error = error.sum(2, keepdim=True), plain_error.sum(2, keepdim=True)
    better = error < plain_error
    total = float(plain_error.sum())
    ratio = float(torch.where(better, error, plain_error).sum()) / total if total else 1.0
    return torch.where(better, compensated, plain), ratio


def _inverse(curvature: Tensor, damping: float) -> Tensor | None:
    for factor in _RAISES:
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            return inverse_factor(curvature, factor * damping)
    return None
