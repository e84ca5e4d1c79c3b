"""Moves factors of channels from what makes a value into the layers that read it; the outputs stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.graph.fold import per_output, reads_alone
from mil_cli.graph.nodes import (
    free_attribute,
    get_argument,
    get_attribute,
    meta_like,
    op_name,
    schema_index,
    set_attribute,
)

_SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
LAYERS = frozenset({"linear", *_SPATIAL})
_NORMS = frozenset({"layer_norm", "rms_norm"})
_ELEMENTWISE = frozenset({"relu", "leaky_relu", "dropout", "contiguous", "clone", "alias", "detach"})
"""Operators with ``f(s x) = s f(x)`` for every s > 0, number by number."""
_POOLS = {f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)}
"""The same over the last n axes."""


@dataclass(frozen=True)
class Link:
    """A value whose channels can be divided where it is made and multiplied where it is read.

    Attributes:
        value: The value.
        axis: Its axis of channels.
        maker: A layer, a norm with a gain, or a product with a gain: its weights are divided.
        readers: The layers that read the value: their weights are multiplied.
        others: What else reads it, such as the sum of a residual connection: a product restores the value for it.
    """

    value: Node
    axis: int
    maker: Node
    readers: tuple[Node, ...]
    others: tuple[Node, ...]


def find_links(graph: GraphModule, *, restoring: bool = False) -> Iterator[Link]:
    """Find the values between a maker and its layers with nothing between but operators with ``f(s x) = s f(x)``.

    Weights that something else reads too are left alone.

    Args:
        graph: The graph.
        restoring: Whether values of norms may have other readers too, as those of a transformer have that adds what a
            norm gives to what its layers make of it.
    """
    for value in graph.graph.nodes:
        readers = tuple(reader for reader in value.users if _reads(graph, value, reader))
        others = tuple(reader for reader in value.users if reader not in readers)
        axes = {channel_axis(reader) for reader in readers}
        maker = _maker(graph, value, min(axes)) if len(axes) == 1 else None
        if maker is not None and (not others or (restoring and op_name(maker) in _NORMS)):
            yield Link(value, min(axes), maker, readers, others)


def channel_axis(layer: Node) -> int:
    """Return the axis of the channels that a layer reads, which is also that of those that it makes."""
    return len(_shape(layer)) - 1 - _SPATIAL.get(op_name(layer), 0)


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _reads(graph: GraphModule, value: Node, reader: Node) -> bool:
    return (
        op_name(reader) in LAYERS
        and _shape(reader) != ()
        and get_argument(reader, "input") is value
        and reads_alone(graph, get_argument(reader, "weight"), reader)
    )


def _maker(graph: GraphModule, value: Node, axis: int) -> Node | None:
    """Return what makes the channels along `axis` of a value that nothing but what the caller knows reads."""
    name = op_name(value)
    if name in LAYERS:
        return value if axis == channel_axis(value) and _alone(graph, value, "weight", "bias") else None
    if name in _NORMS:
        last = axis == len(_shape(value)) - 1 and len(get_argument(value, "normalized_shape")) == 1
        parts = ("weight", "bias") if name == "layer_norm" else ("weight",)
        gain = isinstance(get_argument(value, "weight"), Node)
        return value if last and gain and _alone(graph, value, *parts) else None
    if name == "mul":
        return _maker_of_product(graph, value, axis)
    source = value.args[0] if value.op == "call_function" and value.args else None
    if not isinstance(source, Node) or set(source.users) != {value}:
        return None
    before = _axis_before(value, source, axis)
    return None if before is None else _maker(graph, source, before)


def _maker_of_product(graph: GraphModule, product: Node, axis: int) -> Node | None:
    """A factor on one side of a product is a factor on the product: a gain, or what makes a side as wide."""
    if gain_of(graph, product) is not None:
        return product if axis == len(_shape(product)) - 1 else None
    sides = get_argument(product, "self"), get_argument(product, "other")
    for side in sides if sides[0] is not sides[1] else ():
        if isinstance(side, Node) and set(side.users) == {product} and _shape(side) == _shape(product):
            maker = _maker(graph, side, axis)
            if maker is not None:
                return maker
    return None


def gain_of(graph: GraphModule, product: Node) -> Node | None:
    """Return the node of the gain ``[channels]`` that a product multiplies its last axis with, or None."""
    for name in ("self", "other"):
        side = get_argument(product, name)
        if isinstance(side, Node) and reads_alone(graph, side, product):
            value = get_attribute(graph, str(side.target))
            if value.shape == _shape(product)[-1:] and value.is_floating_point():
                return side
    return None


def _alone(graph: GraphModule, maker: Node, *names: str) -> bool:
    sources = [get_argument(maker, name) for name in names]
    return all(source is None or reads_alone(graph, source, maker) for source in sources)


def _axis_before(node: Node, source: Node, axis: int) -> int | None:
    """Return which axis of a node's input holds the channels along `axis` of its output; None if it mixes them."""
    name, rank = op_name(node), len(_shape(source))
    if not rank:
        return None
    if name in _ELEMENTWISE:
        return axis
    if name in _POOLS:
        return axis if axis < rank - _POOLS[name] else None
    if name in ("transpose", "permute"):
        order = list(range(rank))
        if name == "permute":
            order = [dim % rank for dim in get_argument(node, "dims")]
        else:
            first, second = (get_argument(node, key) % rank for key in ("dim0", "dim1"))
            order[first], order[second] = second, first
        return order[axis]
    if name == "mean" and schema_index(node, "dim") is not None:
        gone = {dim % rank for dim in get_argument(node, "dim") or range(rank)}
        left = [dim for dim in range(rank) if dim not in gone or get_argument(node, "keepdim")]
        return left[axis] if left[axis] not in gone else None
    if name == "flatten":
        first, last = (get_argument(node, key) % rank for key in ("start_dim", "end_dim"))
        alone = last == rank - 1 and all(size == 1 for size in _shape(source)[first + 1 :])
        return axis if alone and axis <= first else None
    return None


def made_range(graph: GraphModule, layer: Node) -> Tensor:
    """Return the largest ``|w|`` of each channel that a layer makes, its bias among them, float64 ``[channels]``."""
    weight, bias = _weight(graph, layer).abs(), get_argument(layer, "bias")
    if op_name(layer).startswith("conv_transpose"):
        groups = int(get_argument(layer, "groups"))
        largest = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).flatten()
    else:
        largest = weight.flatten(1).amax(1)
    if bias is None:
        return largest
    return torch.maximum(largest, get_attribute(graph, str(bias.target)).detach().double().abs())


def read_range(graph: GraphModule, layer: Node) -> Tensor:
    """Return the largest ``|w|`` with which a layer reads each channel, float64 ``[channels]``."""
    weight = _weight(graph, layer).abs()
    if op_name(layer).startswith("conv_transpose"):
        return weight.flatten(1).amax(1)
    groups = int(get_argument(layer, "groups")) if op_name(layer) in _SPATIAL else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).flatten()


def _weight(graph: GraphModule, layer: Node) -> Tensor:
    weight: Tensor = get_attribute(graph, str(get_argument(layer, "weight").target))
    return weight.detach().double()


def move(graph: GraphModule, link: Link, factor: Tensor) -> None:
    """Divide a value's channels where they are made and multiply them where they are read, in place.

    Args:
        graph: The graph.
        link: The value.
        factor: ``[channels]``, above 0.
    """
    maker = link.maker
    if op_name(maker) == "mul":
        gain = gain_of(graph, maker)
        _scale(graph, gain, 1 / factor)
    else:
        weight = get_argument(maker, "weight")
        shaped = 1 / factor
        if op_name(maker) in LAYERS:
            shaped = per_output(maker, _weight(graph, maker), shaped)
        _scale(graph, weight, shaped)
        if op_name(maker) != "rms_norm":
            _scale(graph, get_argument(maker, "bias"), 1 / factor)
    for reader in link.readers:
        _scale(graph, get_argument(reader, "weight"), _per_input(graph, reader, factor))
    if link.others:
        _restore(graph, link, factor)


def _restore(graph: GraphModule, link: Link, factor: Tensor) -> None:
    """Multiply the value again for its other readers."""
    value: Tensor = link.value.meta["val"]
    name = free_attribute(graph, f"{link.value.name}_factor")
    set_attribute(graph, name, factor.reshape(-1, *[1] * (value.ndim - 1 - link.axis)).to(value.dtype))
    with graph.graph.inserting_after(link.value):
        attribute = graph.graph.get_attr(name)
    with graph.graph.inserting_after(attribute):
        restored = graph.graph.call_function(torch.ops.aten.mul.Tensor, (link.value, attribute))
    restored.meta = meta_like(link.value)
    for reader in link.others:
        reader.replace_input_with(link.value, restored)


def _per_input(graph: GraphModule, layer: Node, factor: Tensor) -> Tensor:
    """Shape a factor ``[channels]`` so that it multiplies a layer's weight along the channels that it reads."""
    weight = _weight(graph, layer)
    if op_name(layer).startswith("conv_transpose"):
        return factor.reshape(-1, *[1] * (weight.ndim - 1))
    groups = int(get_argument(layer, "groups")) if op_name(layer) in _SPATIAL else 1
    rows = factor.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def _scale(graph: GraphModule, source: Node | None, factor: Tensor) -> None:
    if source is not None:
        value: Tensor = get_attribute(graph, str(source.target))
        with torch.no_grad():
            value.copy_(value.double() * factor)
