"""SparseGPT: weights are set to zero one input at a time, and the others make up for what each took away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.graph.nodes import get_argument, get_attribute, op_name
from mil_cli.graph.watch import watched
from mil_cli.stages.prune.sparse import (
    SparsityConfig,
    finish,
    keep_largest,
    sparse_layers,
    used_once,
)
from mil_cli.stages.registry import stage
from mil_cli.training.evaluate import fixed_batch

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


_SAMPLES_AT_ONCE = 4


class SparseGptConfig(SparsityConfig):
    """Settings of SparseGPT.

    Attributes:
        samples: Training samples whose values are looked at, without augmentation.
        batch_size: How many of them at once.
        damping: Share of the mean curvature that is added to each, so that it can be inverted.
        block: Inputs among which the weights that go are chosen at a time.
    """

    method: ClassVar[str] = "sparsegpt"

    samples: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    damping: float = Field(0.01, gt=0, allow_inf_nan=False)
    block: int = Field(128, ge=1)


@stage(SparseGptConfig)
def sparsegpt(model: Model, config: SparseGptConfig, context: Context) -> Model:
    """Set weights to zero that cost a layer's outputs least, and change the others so that the outputs stay.

    Frantar and Alistarh 2023, "SparseGPT" (arXiv:2301.00774): by the layer's curvature ``H = X X^T`` over its inputs,
    a weight's cost is ``w^2 / [H^-1]_ii``, and the weights behind it take over what it did. Layers follow each other:
    each sees what the sparse ones before it give. Grouped convolutions, and weights that several layers share, stay
    dense. With ``train: false`` nothing is trained, as in the paper.

    Args:
        model: The model; not changed.
        config: The settings.
        context: Gives data, training and checkpoints.

    Returns:
        The model with zeros among its weights; its shapes stay.

    Raises:
        StageError: No layer can become sparse, or there is no stage `recover` that trains.
    """
    sparse = model.clone().eval()
    layers = sparse_layers(sparse.graph, config, context, wanted=lambda node: _can_solve(sparse.graph, node))
    masks = {}
    with context.progress.work(f"{context.name}: solving layers", len(layers)) as bar:
        for name, node in layers.items():
            weight = get_attribute(sparse.graph, name)
            curvature = input_curvature(sparse, node, context, samples=config.samples, batch_size=config.batch_size)
            solved, masks[name] = solve(weight.detach(), curvature, config)
            with torch.no_grad():
                weight.copy_(solved)
            bar.advance()
    return finish(sparse, masks, config, context)


def _can_solve(graph: GraphModule, node: Node) -> bool:
    return used_once(graph, node) and (op_name(node) == "linear" or get_argument(node, "groups") == 1)


def input_curvature(model: Model, node: Node, context: Context, *, samples: int, batch_size: int) -> Tensor:
    """Return ``X X^T`` over what a layer multiplies its weights by, float64 ``[inputs, inputs]``.

    Args:
        model: The model.
        node: A linear layer, or a convolution of one group: its inputs are the entries of its windows.
        context: Gives training samples.
        samples: How many.
        batch_size: How many at once.
    """
    total: Tensor | float = 0.0

    def look(value: Tensor) -> None:
        nonlocal total
        for part in torch.split(value, _SAMPLES_AT_ONCE):  # the windows of many large images would not fit into memory
            rows = (part.reshape(-1, part.shape[-1]) if op_name(node) == "linear" else _windows(part, node)).double()
            total = total + rows.T @ rows

    runner = watched(model.graph, {get_argument(node, "input"): look})
    size = fixed_batch(model) or batch_size
    with torch.no_grad():
        for args, kwargs in context.calibration(samples=samples, batch_size=size):
            runner(*args, **kwargs)
    return torch.as_tensor(total)


def _windows(value: Tensor, node: Node) -> Tensor:
    """Return the windows of a convolution as rows, in the order of its flattened weight."""
    weight = node.args[1].meta["val"]  # type: ignore[union-attr]
    dimensions = weight.ndim - 2
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
    # [samples, channels, positions..., window...] -> [samples * positions, channels * window]
    order = [0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions)]
    return padded.permute(order).reshape(-1, weight[0].numel())


def _tuple(value: object, dimensions: int) -> list[int]:
    values = [int(each) for each in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    return values * dimensions if len(values) == 1 else values


def solve(weight: Tensor, curvature: Tensor, config: SparseGptConfig) -> tuple[Tensor, Tensor]:
    """Return a layer's weight with its zeros, and which of its numbers stay.

    Args:
        weight: ``[outputs, inputs, ...]``.
        curvature: ``[inputs, inputs]`` over the flattened inputs.
        config: The settings.
    """
    rows = weight.double().reshape(len(weight), -1).clone()
    rows[:, curvature.diagonal() == 0] = 0.0  # nothing ever comes in there
    inverse = inverse_factor(curvature, config.damping)
    pattern = config.kept_of
    kept = torch.ones_like(rows, dtype=torch.bool)
    # Neighbours along the inputs of a convolution do not lie side by side: their costs are those at the start.
    apart = pattern is not None and weight[0, 0].numel() > 1
    if apart:
        costs = (rows / inverse.diagonal()).square().reshape(weight.shape)
        kept = keep_largest(costs, config.sparsity, pattern).reshape(rows.shape)
    step = config.block if pattern is None else pattern[1]
    for start in range(0, rows.shape[1], step):
        end = min(start + step, rows.shape[1])
        if not apart:
            costs = (rows[:, start:end] / inverse.diagonal()[start:end]).square()
            kept[:, start:end] = keep_largest(costs, config.sparsity, pattern)
        for column in range(start, end):
            lost = torch.where(kept[:, column], 0.0, rows[:, column]) / inverse[column, column]
            rows[:, column:] -= lost[:, None] * inverse[column, column:]
            rows[:, column] = torch.where(kept[:, column], rows[:, column], 0.0)
    return rows.reshape(weight.shape).to(weight.dtype), kept.reshape(weight.shape)


def inverse_factor(curvature: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped curvature's inverse; inputs that are always 0 count as 1."""
    damped = curvature.clone()
    damped.diagonal().masked_fill_(damped.diagonal() == 0, 1.0)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor
