"""Puts quantizers and their scales into a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.errors import StageError
from mil_cli.graph.nodes import calls, meta_like, op_name, set_attribute
from mil_cli.ops import QUANTIZERS
from mil_cli.stages.quantize.layers import Layer
from mil_cli.stages.quantize.placement import Placement
from mil_cli.stages.quantize.ranges import CodeRange

_OWNER = "quantizers"


@dataclass(frozen=True)
class Quantizer:
    """How one value or weight is quantized.

    Attributes:
        scale: float32 ``[]``, or ``[channels]`` along `axis`.
        zero_point: int32, shaped like `scale`.
        codes: The integer codes.
        axis: The axis of per-channel scales, or None.
    """

    scale: Tensor
    zero_point: Tensor
    codes: CodeRange
    axis: int | None = None

    @classmethod
    def of_weight(cls, scale: Tensor, codes: CodeRange, axis: int | None) -> Quantizer:
        """Return the quantizer of a weight, whose zero point is 0."""
        return cls(scale, torch.zeros(scale.shape, dtype=torch.int32), codes, axis)


def refuse_quantized(graph: GraphModule) -> None:
    """Refuse a graph that has quantizers.

    Raises:
        StageError: It has.
    """
    if any(op_name(node) in QUANTIZERS for node in calls(graph)):
        raise StageError("the model is quantized already", hint="start from the float model")


@dataclass(frozen=True)
class Paths:
    """The paths below which the scales and zero points of a graph's quantizers are kept.

    Attributes:
        values: Of each owned value.
        narrow: Of each value that layers read in fewer bits.
        weights: Of each layer's weight, in the placement's order.
    """

    values: dict[Node, str]
    narrow: dict[Node, str]
    weights: list[str]


def insert_quantizers(
    graph: GraphModule,
    placement: Placement,
    values: Mapping[Node, Quantizer],
    narrow: Mapping[Node, Quantizer],
    weights: Sequence[Quantizer],
) -> Paths:
    """Quantize all values and weights of a placement, in place.

    Args:
        graph: The graph that was placed on.
        placement: What is quantized.
        values: For each owned value how it, and what shares its codes, is quantized.
        narrow: For each value that layers read in fewer bits how they read it.
        weights: For each layer of the placement, in its order; layers that share a weight may share one.
    """
    writer = QuantizerWriter(graph)
    paths = Paths({node: writer.store(node.name, form.scale, form.zero_point) for node, form in values.items()}, {}, [])
    paths.weights.extend(writer.insert_weights(placement.layers, weights))
    quantized: dict[Node, Node] = {}
    for node in [*placement.owned, *placement.shared]:
        owner = placement.owner(node)
        readers = None if node in placement.exclusive else placement.readers[node]
        added = writer.insert(node, paths.values[owner], axis=None, codes=values[owner].codes, readers=readers)
        if readers is None:
            quantized[node] = added
    for node, form in narrow.items():
        paths.narrow[node] = writer.store(f"{node.name}_narrow", form.scale, form.zero_point)
        source = quantized.get(node, node)
        writer.insert(source, paths.narrow[node], axis=None, codes=form.codes, readers=placement.narrow[node])
    writer.finish()
    return paths


def quantizers_at(graph: GraphModule, path: str) -> list[Node]:
    """Return the quantizers of a graph that read the zero point below a path."""
    zeros = [node for node in graph.graph.find_nodes(op="get_attr") if node.target == f"{path}.zero_point"]
    return [user for node in zeros for user in node.users]


def replace_quantizer(graph: GraphModule, old: Node, target: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> Node:
    """Put another quantizer in the place of one, in place."""
    with graph.graph.inserting_before(old):
        new = graph.graph.call_function(target, arguments)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.graph.erase_node(old)
    return new


class QuantizerWriter:
    """Adds quantizers to one graph, in place; `finish` makes the graph runnable.

    Scales and zero points are buffers below one submodule, each pair named after what it belongs to.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: GraphModule) -> None:
        self._graph = graph
        self._owner = _OWNER
        while hasattr(graph, self._owner):
            self._owner += "_"
        self._names = set(dir(nn.Module()))  # what every module has is no name for one below it: a node may be `to`

    def store(self, name: str, scale: Tensor, zero_point: Tensor | None = None) -> str:
        """Keep a scale (float32) and a zero point (int32), if any, as buffers; returns the path of the pair."""
        base = name = name.replace(".", "_")
        number = 1
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        path = f"{self._owner}.{name}"
        set_attribute(self._graph, f"{path}.scale", scale.float())
        if zero_point is not None:
            set_attribute(self._graph, f"{path}.zero_point", zero_point.to(torch.int32))
        return path

    def insert(
        self, value: Node, path: str, *, axis: int | None, codes: CodeRange, readers: Iterable[Node] | None
    ) -> Node:
        """Quantize `value` with the stored pair at `path`.

        Args:
            value: The node whose output is quantized.
            path: What `store` returned.
            axis: The axis of per-channel scales, or None.
            codes: The integer codes.
            readers: The nodes that read it quantized; None: all.
        """
        settings = (axis, codes.quant_min, codes.quant_max)
        names = [f"{path}.scale", f"{path}.zero_point"]
        return self._insert(torch.ops.mil.quantize_affine.default, value, names, settings, readers)

    def insert_weights(self, layers: Sequence[Layer], forms: Sequence[Quantizer]) -> list[str]:
        """Quantize the weights of layers and return where their scales and zero points are kept, in their order.

        Args:
            layers: The layers.
            forms: How the weight of each is quantized; those that share a weight may share one, which is kept once.
        """
        stored: dict[int, str] = {}
        reading: dict[tuple[int, Node], list[Node]] = {}
        for layer, form in zip(layers, forms, strict=True):
            if id(form) not in stored:
                stored[id(form)] = self.store(f"{layer.name}_weight", form.scale, form.zero_point)
            reading.setdefault((id(form), layer.weight), []).append(layer.node)
        known = {id(form): form for form in forms}
        for (number, weight), readers in reading.items():
            form = known[number]
            self.insert(weight, stored[number], axis=form.axis, codes=form.codes, readers=readers)
        return [stored[id(form)] for form in forms]

    def insert_blocks(
        self, value: Node, path: str, *, axis: int, block_size: int, codes: CodeRange, readers: Iterable[Node]
    ) -> Node:
        """Quantize a weight with the scales at `path`, ``[rows along the axis, blocks]``, for some readers."""
        settings = (axis, block_size, codes.quant_min, codes.quant_max)
        return self._insert(torch.ops.mil.quantize_blocks.default, value, [f"{path}.scale"], settings, readers)

    def insert_dynamic(self, value: Node, readers: Iterable[Node]) -> Node:
        """Quantize `value` by the range that it has at run time, for some readers."""
        return self._insert(torch.ops.mil.quantize_dynamic.default, value, [], (), readers)

    def _insert(
        self,
        operator: torch._ops.OpOverload,
        value: Node,
        names: Sequence[str],
        settings: tuple[int | None, ...],
        readers: Iterable[Node] | None,
    ) -> Node:
        """Call a quantizer on a value, some attributes and settings, and let readers, or all, read what it gives."""
        graph = self._graph.graph
        users = list(value.users if readers is None else readers)
        before, attributes = self._place(value), []
        for name in names:
            with graph.inserting_after(before):
                before = graph.get_attr(name)
            attributes.append(before)
        with graph.inserting_after(before):
            quantizer = graph.call_function(operator, (value, *attributes, *settings))
        quantizer.meta = meta_like(value)
        for user in users:
            user.replace_input_with(value, quantizer)
        return quantizer

    def finish(self) -> None:
        """Check the graph and generate its code."""
        self._graph.graph.lint()
        self._graph.recompile()

    def _place(self, value: Node) -> Node:
        """Return the node after which a quantizer of `value` can stand: placeholders must stay together."""
        if value.op != "placeholder":
            return value
        last: Node = list(self._graph.graph.find_nodes(op="placeholder"))[-1]
        return last
