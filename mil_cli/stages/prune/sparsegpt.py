"""SparseGPT: weights are set to zero one input at a time, and the others make up for what each took away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.graph.nodes import get_argument, get_attribute, op_name
from mil_cli.stages.curvature import input_curvature, inverse_factor
from mil_cli.stages.prune.sparse import (
    SparsityConfig,
    finish,
    keep_largest,
    sparse_layers,
    used_once,
)
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class SparseGptConfig(SparsityConfig):
    """Settings of SparseGPT.

    Attributes:
        samples: Training samples whose values are looked at, without augmentation.
        batch_size: How many of them at once.
        damping: Share of the mean curvature that is added to each, so that it can be inverted.
        block: Inputs among which the weights that go are chosen at a time.
    """

    method: ClassVar[str] = "sparsegpt"
    version: ClassVar[int] = 3

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
        StageError: No layer can become sparse, a pattern of `skip` fits none, or there is no stage `recover` that
            trains.
    """
    sparse = model.clone().eval()
    layers = sparse_layers(sparse.graph, config, context, wanted=lambda node: _can_solve(sparse.graph, node))
    masks = {}
    with context.progress.work(f"{context.name}: solving layers", len(layers)) as bar:
        for name, node in layers.items():
            weight = get_attribute(sparse.graph, name)
            curvature = input_curvature(sparse, node, context, samples=config.samples, batch_size=config.batch_size)
            solved, masks[name] = solve(weight.detach(), curvature[0], config)
            with torch.no_grad():
                weight.copy_(solved)
            bar.advance()
    return finish(sparse, masks, config, context)


def _can_solve(graph: GraphModule, node: Node) -> bool:
    return used_once(graph, node) and (op_name(node) == "linear" or get_argument(node, "groups") == 1)


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
