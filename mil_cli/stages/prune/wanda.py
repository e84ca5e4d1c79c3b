"""Wanda: weights go that are small beside what flows through them, without any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    from torch.fx import Node

    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context


class WandaConfig(SparsityConfig):
    """Settings of Wanda.

    Attributes:
        samples: Training samples whose values are looked at, without augmentation.
        batch_size: How many of them at once.
    """

    method: ClassVar[str] = "wanda"

    samples: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)


@stage(WandaConfig)
def wanda(model: Model, config: WandaConfig, context: Context) -> Model:
    """Set the weights of each output to zero whose magnitude times the norm of their input is smallest.

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv:2306.11695). The input
    of a convolution is a whole channel. The inputs are those of the dense model (the paper's are those behind the
    layers that are sparse already, which batch norms with old statistics would distort). With ``train: false`` nothing
    is trained, as in the paper. Weights that several layers share stay dense.

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
    layers = sparse_layers(sparse.graph, config, context, wanted=lambda node: used_once(sparse.graph, node))
    norms = input_norms(sparse, layers, context, samples=config.samples, batch_size=config.batch_size)
    masks = {}
    for name, node in layers.items():
        weight = get_attribute(sparse.graph, name)
        scores = weighted(weight.detach(), norms[name], node)
        masks[name] = keep_largest(scores, config.sparsity, config.kept_of, by_row=True)
        with torch.no_grad():
            weight.mul_(masks[name])
    return finish(sparse, masks, config, context)


def input_norms(
    model: Model, layers: Mapping[str, Node], context: Context, *, samples: int, batch_size: int
) -> dict[str, Tensor]:
    """Return by name of a layer's weight the norm of each of its input channels, over samples and positions."""
    totals: dict[str, Tensor] = {}
    looks: dict[Node, Callable[[Tensor], None]] = {}
    for source in dict.fromkeys(get_argument(node, "input") for node in layers.values()):
        reading = {name: node for name, node in layers.items() if get_argument(node, "input") is source}
        looks[source] = _adding(
            totals, {name: -1 if op_name(node) == "linear" else 1 for name, node in reading.items()}
        )
    runner = watched(model.graph, looks)
    size = fixed_batch(model) or batch_size
    with context.progress.work(f"{context.name}: watching inputs", -(-samples // size)) as bar, torch.no_grad():
        for args, kwargs in context.calibration(samples=samples, batch_size=batch_size, model=model):
            runner(*args, **kwargs)
            bar.advance()
    return {name: total.sqrt() for name, total in totals.items()}


def _adding(totals: dict[str, Tensor], axes: Mapping[str, int]) -> Callable[[Tensor], None]:
    """Return what adds the squares of a value along the axis of each layer that reads it."""

    def look(value: Tensor) -> None:
        for name, axis in axes.items():
            squares = value.double().square().movedim(axis, 0).flatten(1).sum(1)
            totals[name] = totals[name] + squares if name in totals else squares

    return look


def weighted(weight: Tensor, norms: Tensor, node: Node) -> Tensor:
    """Return ``|W| * ||X||``, shaped like the weight; a grouped convolution's outputs see their group's channels."""
    groups = int(get_argument(node, "groups")) if op_name(node) != "linear" else 1
    seen = norms.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return weight.abs().double() * seen.reshape(*seen.shape, *[1] * (weight.ndim - 2))
