"""How strongly what a layer gives depends on its inputs: ``X X^T`` over calibration samples, and its inverse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mil_cli.graph.nodes import get_argument, op_name
from mil_cli.graph.watch import watched

if TYPE_CHECKING:
    from torch.fx import Node

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_NUMBERS_AT_ONCE = 2**22
"""Of what a layer multiplies: the windows of one large image alone can take gigabytes."""


def input_curvature(model: Model, node: Node, context: Context, *, samples: int, batch_size: int) -> Tensor:
    """Return ``X X^T`` over what a layer multiplies its weights by, float64 ``[groups, inputs, inputs]``.

    Args:
        model: The model.
        node: A product with a weight, which has one group, or a convolution: its inputs are the entries of its windows
            in each group, in the order of its flattened weight.
        context: Gives training samples.
        samples: How many.
        batch_size: How many at once.
    """
    total: Tensor | float = 0.0

    def look(value: Tensor) -> None:
        nonlocal total
        for part in _windows(value, node) if op_name(node) in _CONVOLUTIONS else _vectors(value):
            rows = part.double()
            total = total + torch.einsum("ngi,ngj->gij", rows, rows)

    source = node.args[0]
    runner = watched(model.graph, {source: look})  # type: ignore[dict-item]
    with torch.no_grad():
        for args, kwargs in context.calibration(samples=samples, batch_size=batch_size, model=model):
            runner(*args, **kwargs)
    return torch.as_tensor(total)


def _vectors(value: Tensor) -> Iterator[Tensor]:
    """Yield what a product with a weight reads, some at once, ``[vectors, 1, inputs]``."""
    rows = value.reshape(-1, 1, value.shape[-1])
    return iter(torch.split(rows, max(1, _NUMBERS_AT_ONCE // value.shape[-1])))


def _windows(value: Tensor, node: Node) -> Iterator[Tensor]:
    """Yield the windows of a convolution, some at once, ``[windows, groups, inputs of a group]``."""
    weight = node.args[1].meta["val"]  # type: ignore[union-attr]
    dimensions = weight.ndim - 2
    if value.ndim < weight.ndim:  # one sample without an axis of samples
        value = value.unsqueeze(0)
    strides, dilations = (_tuple(get_argument(node, name), dimensions) for name in ("stride", "dilation"))
    padding = get_argument(node, "padding")
    if padding == "same":  # an odd one goes behind
        whole = [dilation * (size - 1) for dilation, size in zip(dilations, weight.shape[2:], strict=True)]
        sides = [(each // 2, each - each // 2) for each in whole]
    else:
        sides = [(each, each) for each in _tuple(0 if padding == "valid" else padding, dimensions)]
    padded = torch.nn.functional.pad(value, [side for pair in reversed(sides) for side in pair])
    for axis, (size, stride, dilation) in enumerate(zip(weight.shape[2:], strides, dilations, strict=True)):
        padded = padded.unfold(axis + 2, (size - 1) * dilation + 1, stride)[..., ::dilation]
    # [samples, channels, positions..., window...] -> [samples * positions, groups, channels of a group * window]
    order = [0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions)]
    numbers, positions = padded.shape[1:].numel(), padded.shape[2]
    for samples in torch.split(padded, max(1, _NUMBERS_AT_ONCE // numbers)):
        for strip in torch.split(samples, max(1, _NUMBERS_AT_ONCE * positions // numbers), dim=2):
            yield strip.permute(order).reshape(-1, get_argument(node, "groups"), weight[0].numel())


def _tuple(value: object, dimensions: int) -> list[int]:
    values = [int(each) for each in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    return values * dimensions if len(values) == 1 else values


def inverse_factor(curvature: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped curvature's inverse.

    Inputs that are always 0 get the mean of the others (1 if all are), and do not count in it: those that there are
    beside a layer's other inputs change nothing for these.

    Args:
        curvature: ``[..., inputs, inputs]``.
        damping: Share of the mean curvature that is added to each.

    Raises:
        torch.linalg.LinAlgError: Even damped it cannot be inverted.
    """
    damped = curvature.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(dead.all(-1, keepdim=True), 1.0, mean)
    diagonal.copy_(torch.where(dead, mean, diagonal) + damping * mean)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor
