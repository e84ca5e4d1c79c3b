"""Which axis of a value counts its channels, by the operators that read and make it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from mil_cli.graph.nodes import get_argument, namespace, op_name

_SECOND = ("conv", "batch_norm", "group_norm", "instance_norm", "prelu", "pixel_shuffle", "upsample")
_POOLING = ("avg_pool", "max_pool")
_LAST = ("linear", "layer_norm", "rms_norm")
_KEEPS = ("dropout", "contiguous", "to", "_to_copy", "hardswish", "hardswish_", "slice", "pad", "cat")


def channel_axis(node: Node) -> int | None:
    """Return the axis of the channels of a node's value of shape (batch, ...), counted from 0; None: it has none.

    Convolutions and batch norms have them second, linear layers and layer norms last: the nearest of them decides, seen
    through operators that leave the axes alone. Where there is none nearby, values of three axes are taken
    for (batch, tokens, channels), others for (batch, channels, ...).

    Args:
        node: A node that knows its value (``meta["val"]``), as those around it.
    """
    axes = node.meta["val"].ndim
    if axes < 3:
        return 1 if axes == 2 else None
    seen, pending = {node}, [node]
    for current in pending:
        for other in (current, *_around(current)):
            found = _told_by(other, axes)
            if found is not None:
                return found
            if other not in seen and _keeps_axes(other, axes):
                seen.add(other)
                pending.append(other)
    return 2 if axes == 3 else 1


def _around(node: Node) -> Iterator[Node]:
    yield from node.users
    if _keeps_axes(node, node.meta["val"].ndim):
        yield from (used for used in node.all_input_nodes if used.op != "get_attr")


def _told_by(node: Node, axes: int) -> int | None:
    """Return the axis by the operator of a node that reads or makes a value of so many axes."""
    name, value = op_name(node), node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.ndim != axes:
        return None
    if name == "layer_norm" and len(get_argument(node, "normalized_shape")) > 1:
        return None
    if name.startswith(_LAST):
        return axes - 1
    return 1 if name.startswith(_SECOND) or any(part in name for part in _POOLING) else None


def _keeps_axes(node: Node, axes: int) -> bool:
    """Whether a node changes numbers of a value of so many axes, or how many there are, but not what an axis counts."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.ndim != axes:
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or op_name(node) in _KEEPS or namespace(node) == "mil"
