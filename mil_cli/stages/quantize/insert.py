"""Puts ``mil::quantize_affine`` nodes and their scales into a graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import mil_cli.ops  # noqa: F401  registers the operator
from mil_cli.graph.nodes import set_attribute
from mil_cli.stages.quantize.ranges import CodeRange

_OWNER = "quantizers"


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
        self._names: set[str] = set()

    def store(self, name: str, scale: Tensor, zero_point: Tensor) -> str:
        """Keep a scale (float32) and a zero point (int32) as buffers; returns the path of the pair."""
        base = name = name.replace(".", "_")
        number = 1
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        path = f"{self._owner}.{name}"
        set_attribute(self._graph, f"{path}.scale", scale.float())
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
        graph = self._graph.graph
        users = list(value.users if readers is None else readers)
        with graph.inserting_after(self._place(value)):
            scale = graph.get_attr(f"{path}.scale")
        with graph.inserting_after(scale):
            zero_point = graph.get_attr(f"{path}.zero_point")
        arguments = (value, scale, zero_point, axis, codes.quant_min, codes.quant_max)
        with graph.inserting_after(zero_point):
            quantizer = graph.call_function(torch.ops.mil.quantize_affine.default, arguments)
        quantizer.meta = {
            key: value.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in value.meta
        }
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
