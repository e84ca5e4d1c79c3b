"""Wanda: weights go that are small beside what flows through them, without any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.graph.nodes import get_argument, get_attribute, op_name
from mil_cli.graph.watch import watched
from mil_cli.stages.prune.masks import insert_masks, settle_masks
from mil_cli.stages.prune.sparse import SparsityConfig, keep_largest, note_sparsity, sparse_layers
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
    of a convolution is a whole channel. With ``trainer: {epochs: 0}`` nothing is trained, as in the paper.

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
    layers = sparse_layers(sparse.graph, config, context)
    norms = input_norms(sparse, layers, context, samples=config.samples, batch_size=config.batch_size)
    masks = {}
    for name, node in layers.items():
        scores = weighted(get_attribute(sparse.graph, name).detach(), norms[name], node)
        masks[name] = keep_largest(scores, config.sparsity, config.kept_of, by_row=True)
    paths = insert_masks(sparse.graph, masks)
    if config.trains:
        sparse = context.finetune(sparse, stage=config.recover, name="sparse", trainer=config.trainer)
    settle_masks(sparse.graph, paths)
    note_sparsity(sparse, layers, config, context)
    return sparse.eval()


def input_norms(
    model: Model, layers: Mapping[str, Node], context: Context, *, samples: int, batch_size: int
) -> dict[str, Tensor]:
    """Return by name of a layer's weight the norm of each of its input channels, over samples and positions."""
    squares = {name: _Squares(-1 if op_name(node) == "linear" else 1) for name, node in layers.items()}
    by_source: dict[Node, list[_Squares]] = {}
    for name, node in layers.items():
        by_source.setdefault(get_argument(node, "input"), []).append(squares[name])
    runner = watched(model.graph, {source: _all(found) for source, found in by_source.items()})
    size = fixed_batch(model) or batch_size
    with context.progress.work(f"{context.name}: watching inputs", -(-samples // size)) as bar, torch.no_grad():
        for args, kwargs in context.calibration(samples=samples, batch_size=size):
            runner(*args, **kwargs)
            bar.advance()
    return {name: torch.as_tensor(found.total).sqrt() for name, found in squares.items()}


class _Squares:
    """The sum of squares by channel of all values seen."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.total: Tensor | float = 0.0

    def update(self, value: Tensor) -> None:
        self.total = self.total + value.double().square().movedim(self.axis, 0).flatten(1).sum(1)


def _all(found: Sequence[_Squares]) -> Callable[[Tensor], None]:
    def look(value: Tensor) -> None:
        for squares in found:
            squares.update(value)

    return look


def weighted(weight: Tensor, norms: Tensor, node: Node) -> Tensor:
    """Return ``|W| * ||X||``, shaped like the weight; a grouped convolution's outputs see their group's channels."""
    groups = int(get_argument(node, "groups")) if op_name(node) != "linear" else 1
    seen = norms.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return weight.abs().double() * seen.reshape(*seen.shape, *[1] * (weight.ndim - 2))
