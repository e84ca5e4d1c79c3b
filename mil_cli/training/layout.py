"""The memory layout of images in training: channels_last where the model runs with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from mil_cli.data.base import Batch
from mil_cli.graph.nodes import get_argument, get_attribute, op_name
from mil_cli.training.trainee import Trainee


def use_channels_last(model: Trainee, *, wanted: bool | Literal["auto"]) -> bool:
    """Bring a model's weights into channels_last if that is wanted and works.

    Args:
        model: Changed in place: the layout of its 4-d weights.
        wanted: ``auto``: only where the model has 2-d convolutions over images and gives the same outputs; a captured
            view of memory may not survive the layout. True: wherever torch can train in it.

    Returns:
        Whether it now is in channels_last.
    """
    if wanted is False or _crashes(model.graph):
        return False
    if wanted is True:
        _to_channels_last(model)
        return True
    leaves = [leaf for leaf in tree_leaves(model.samples) if isinstance(leaf, torch.Tensor)]
    has_images = any(leaf.ndim == 4 and leaf.is_floating_point() for leaf in leaves)
    if not has_images or not any(parameter.ndim == 4 for parameter in model.parameters()):
        return False
    was_training = model.training
    model.eval()
    args, kwargs = model.samples
    with torch.no_grad():
        before = model(*args, **kwargs)
        _to_channels_last(model)
        try:
            after = model(*tree_map(images_channels_last, args), **tree_map(images_channels_last, kwargs))
            works = all(_close(*pair) for pair in zip(tree_leaves(before), tree_leaves(after), strict=True))
        except RuntimeError:  # a captured view that this layout cannot give
            works = False
    if was_training:
        model.train()
    if not works:
        to_contiguous(model)
    return works


def to_contiguous(model: Trainee) -> None:
    """Bring a model's weights back into the default layout, in place."""
    for tensor in [*model.graph.parameters(), *model.graph.buffers()]:
        tensor.data = tensor.data.contiguous()


def images_channels_last(value: Any) -> Any:
    """Return a value, laid out as channels_last if it is a batch of images."""
    if isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value


def place(batch: Batch, *, device: torch.device, channels_last: bool) -> Batch:
    """Return a batch on a device, its images laid out as channels_last if asked for."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(device, non_blocking=True)
        return images_channels_last(value) if channels_last else value

    if isinstance(batch, Mapping):
        return {key: move(value) for key, value in batch.items()}
    return tuple(move(value) for value in batch)


def _crashes(graph: nn.Module) -> bool:
    """Whether a group norm reads what needs no gradient, an input or what frozen layers give.

    torch 2.13 on CPUs writes the gradient of that input nevertheless in this layout, where there is no memory for it.
    """
    if not isinstance(graph, GraphModule):
        return any(isinstance(module, nn.GroupNorm) for module in graph.modules())
    trained: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = get_attribute(graph, str(node.target))
            trains = isinstance(value, nn.Parameter) and value.requires_grad
        else:
            trains = any(source in trained for source in node.all_input_nodes)
        if trains:
            trained.add(node)
        if op_name(node) == "group_norm" and get_argument(node, "input") not in trained:
            return True
    return False


def _to_channels_last(model: Trainee) -> None:
    for tensor in [*model.graph.parameters(), *model.graph.buffers()]:
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _close(before: Any, after: Any) -> bool:
    if not isinstance(before, torch.Tensor):
        return True
    if before.shape != after.shape:
        return False
    return torch.allclose(before, after, rtol=1e-3, atol=1e-3) if before.is_floating_point() else True
