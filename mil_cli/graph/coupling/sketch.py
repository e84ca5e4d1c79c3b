"""A module's graph on shapes alone, as a capture would have it: what follows from sizes is known in milliseconds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mil_cli.graph.coupling.coupling import Coupling
from mil_cli.graph.coupling.draft import Draft
from mil_cli.graph.coupling.normalise import normalise
from mil_cli.graph.coupling.record import Recording
from mil_cli.graph.coupling.table import RelationTable
from mil_cli.graph.program import capture_settings


class Sketcher:
    """Draws the graphs of modules that have much in common, such as the architectures of a space.

    A sketch has the operators that a capture has, in the same form and order, with their shapes. It has no dynamic
    sizes, no dropout that evaluation leaves out, and of a branch only what is taken. What an operator gives is
    remembered by the shapes that it reads, so that little runs for another module.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def sketch(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Coupling:
        """Run a module once on shapes, and return its analysis, in which nothing can be cut.

        Args:
            module: In evaluation mode, its floating-point tensors on the meta device; others may have values.
            args: Positional inputs: one sample, on the meta device.
            kwargs: Named inputs.

        Raises:
            RuntimeError: The module does not run on these shapes, or depends on values.
            NotImplementedError: Likewise.
        """
        drawing = _Drawing(self._known)
        drawing.begin((args, kwargs))
        # Without the bookkeeping of gradients an operator that torch is made of others of is seen whole.
        with capture_settings(), torch.inference_mode(), drawing:
            outputs = module(*args, **(kwargs or {}))
        drawing.end(outputs)
        recording = drawing.recording
        normalise(recording)
        table = RelationTable(recording, recording.shapes)
        return Coupling(table=table, spaces=(), frozen=(), unknown=(), single=recording.shapes)


class _Drawing(TorchDispatchMode):
    """Adds a node for every operator that runs in it.

    Args:
        known: What operators gave, by what they read.
    """

    def __init__(self, known: dict[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording(Draft(nn.Module(), Graph()))
        self._graph = self.recording.graph.graph
        self._known = known
        self._nodes: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # while they live, no other tensor has their identity

    def begin(self, inputs: Any) -> None:
        """Add the tensors among the inputs."""
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._stands_for(self._graph.placeholder(f"input_{len(self._alive)}"), leaf)

    def end(self, outputs: Any) -> None:
        """Add the outputs."""
        self._graph.output(tuple(self._node(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(args), dict(kwargs or {})
        nodes = map_aggregate(args, self._node), map_aggregate(kwargs, self._node)
        result = self._run(func, args, kwargs)
        node = self._graph.call_function(func, *nodes)
        if not isinstance(result, list | tuple):
            self._stands_for(node, result)
            return result
        self.recording.take(node, result)
        for number, part in enumerate(result):
            if isinstance(part, Tensor):
                self._stands_for(self._graph.call_function(operator.getitem, (node, number)), part)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        key = (func, map_aggregate(args, _shown(tensors)), map_aggregate(kwargs, _shown(tensors)))
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if not all(tensor.is_meta for tensor in tensors):
            if func._schema.is_mutable:
                raise NotImplementedError("a tensor with values takes some of which only the shape is known")
            args, kwargs = map_aggregate(args, _on_meta), map_aggregate(kwargs, _on_meta)
        if any(given.alias_info is not None for given in func._schema.returns):
            return func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, Tensor.detach, self._known[key])

    def _node(self, leaf: Any) -> Any:
        """Return what stands for a value in the graph; a tensor that nothing made is a weight or a constant."""
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self._nodes:
            graph, name = self.recording.graph, f"held_{len(self._alive)}"
            if isinstance(leaf, nn.Parameter):
                graph.register_parameter(name, leaf)
            else:
                graph.register_buffer(name, leaf)
            self.recording.add_leaf(name)
            self._stands_for(self._graph.get_attr(name), leaf)
        return self._nodes[id(leaf)]

    def _stands_for(self, node: Node, value: Any) -> None:
        self.recording.take(node, value)
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
            self._alive.append(value)


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _shown(tensors: list[Tensor]) -> Callable[[Any], Any]:
    """Return what tells operands apart, and adds those that are tensors; equal numbers may be of different types."""

    def shown(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return type(leaf), leaf
        tensors.append(leaf)
        return leaf.shape, leaf.stride(), leaf.dtype

    return shown
