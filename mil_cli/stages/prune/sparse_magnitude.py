"""Sparsity by magnitude: the smallest weights become zero, ever more of them while the others train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mil_cli.graph.nodes import get_attribute
from mil_cli.stages.prune.sparse import SparsityConfig, finish, keep_largest, sparse_layers
from mil_cli.stages.registry import stage

if TYPE_CHECKING:
    from mil_cli.graph.model import Model
    from mil_cli.stages.context import Context
    from mil_cli.training.objective import StepHook


class SparseMagnitudeConfig(SparsityConfig):
    """Settings of sparsity by magnitude.

    Attributes:
        ramp: Share of the training over which the sparsity grows; 0 sets all zeros at once.
        every: After how many steps the zeros are chosen anew while it grows.
    """

    method: ClassVar[str] = "sparse_magnitude"

    ramp: float = Field(0.7, ge=0, le=1)
    every: int = Field(20, ge=1)


@stage(SparseMagnitudeConfig)
def sparse_magnitude(model: Model, config: SparseMagnitudeConfig, context: Context) -> Model:
    """Set the smallest weights of each layer to zero while the others train.

    Zhu and Gupta 2017, "To prune, or not to prune" (arXiv:1710.01878): the sparsity after a share t of the ramp is
    ``s (1 - (1 - t)^3)``. A pattern such as 2:4 (Mishra 2021, arXiv:2104.08378) is set at once.

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
    layers = sparse_layers(sparse.graph, config, context)
    gradual = config.train and config.ramp > 0 and config.pattern is None
    weights = {name: get_attribute(sparse.graph, name).detach() for name in layers}
    first = 0.0 if gradual else config.sparsity
    masks = {name: keep_largest(weight.abs(), first, config.kept_of) for name, weight in weights.items()}
    if not gradual:
        return finish(sparse, masks, config, context)
    return finish(
        sparse,
        masks,
        config,
        context,
        steer=lambda paths: growing_masks(paths, config.sparsity, ramp=config.ramp, every=config.every),
        complete=lambda trained, paths: _complete(trained, paths, config.sparsity, context),
    )


def _complete(model: Model, paths: Mapping[str, str], sparsity: float, context: Context) -> None:
    """Set what is missing to the zeros asked for, in place: a training that diverged ends before its ramp does."""
    tensors = model.state_dict()
    short = []
    for name, path in paths.items():
        kept = keep_largest(tensors[name].abs() * tensors[path], sparsity, None)
        if int(tensors[path].sum()) > int(kept.sum()):
            short.append(name)
            tensors[path].copy_(kept)
    if short:
        context.progress.notice(f"{context.name}: training ended before all zeros were set; the rest is set untrained")


def sparsity_at(progress: float, final: float) -> float:
    """Return the sparsity after a share of the ramp, by the cubic schedule."""
    return final * (1 - (1 - min(progress, 1.0)) ** 3)


def growing_masks(paths: Mapping[str, str], sparsity: float, *, ramp: float, every: int) -> StepHook:
    """Return what chooses the zeros anew every so many steps while the sparsity grows.

    Args:
        paths: Name of a weight -> name of its mask.
        sparsity: The final one.
        ramp: Share of the training over which it grows.
        every: Steps between two choices.
    """

    @torch.no_grad()
    def before_step(training: Model, steps: int, total: int) -> None:
        end = max(min(math.ceil(ramp * total), total) - 1, 0)
        if steps > end or (steps < end and steps % every):
            return
        share = sparsity_at(steps / end if end else 1.0, sparsity)
        tensors: dict[str, Tensor] = training.state_dict()
        for name, path in paths.items():
            tensors[path].copy_(keep_largest(tensors[name].abs(), share, None))

    return before_step
