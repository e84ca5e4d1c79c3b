"""One run of a graph on concrete sizes that records every shape, every integer and every integer tensor.

Coupling needs no symbolic reasoning once these are known: a view, a slice or a gather is plain index arithmetic on
concrete sizes. Floating-point tensors are run as shapes only (on the meta device), which takes milliseconds; a graph
whose shapes depend on their values is run in full. Tensors are named by keys, strings that stay valid in a copy of
the graph:

======================  =========================================================================
``conv2d_3``            the output of the node of that name
``split_1#0``           one tensor of a node that returns several
``@layer1.conv.weight`` an attribute, by the first name under which the graph reads it, so that
                        sharing and tying need no special case
``conv2d_3~weight``     a virtual tensor that a relation invented, such as (groups, channels per group)
======================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx._pytree import tree_flatten_spec
from torch.utils._pytree import tree_leaves, tree_map

from mil_cli.graph.coupling.operators import operator_name
from mil_cli.graph.nodes import get_attribute

Key = str

_LARGEST_VALUE = 4_000_000
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_VALUE_DTYPES = (torch.int64, torch.int32, torch.bool)


@dataclass
class Recording:
    """What one concrete run of `graph` showed.

    Attributes:
        graph: The graph that was run.
        shapes: Shape of every tensor by key, with the batch that the run had.
        dtypes: Its type.
        values: By node name: ints, floats, bools, and the content of integer tensors of moderate size.
        leaves: Attribute tensors by key.
        leaf_names: All attribute paths under which the graph reads a leaf.
        outputs: By node name: keys of the tensors of a node that returns several.
    """

    graph: GraphModule
    shapes: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[Key, torch.dtype] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    leaves: dict[Key, torch.Tensor] = field(default_factory=dict)
    leaf_names: dict[Key, list[str]] = field(default_factory=dict)
    outputs: dict[str, list[Key]] = field(default_factory=dict)
    _leaf_keys: dict[str, Key] = field(default_factory=dict)
    _tensor_keys: dict[int, Key] = field(default_factory=dict)

    def key(self, node: Node) -> Key:
        """Return the key of the tensor that `node` stands for."""
        if node.op == "get_attr":
            return self._leaf_keys.get(str(node.target), node.name)
        if operator_name(node) == "getitem" and isinstance(node.args[0], Node):
            element = f"{node.args[0].name}#{node.args[1]}"
            if element in self.shapes:
                return element
        return node.name

    def is_parameter(self, key: Key) -> bool:
        """Return whether `key` names a leaf that is a parameter."""
        return isinstance(self.leaves.get(key), torch.nn.Parameter)

    def value(self, argument: Any) -> Any:
        """Return an argument with every node in it replaced by the value that it had in the run.

        Raises:
            KeyError: A node's value was not recorded.
        """
        if isinstance(argument, Node):
            return self.values[argument.name]
        if isinstance(argument, list | tuple):
            return [self.value(element) for element in argument]
        return argument

    def add_leaf(self, path: str) -> None:
        """Make the attribute at `path` known."""
        tensor = get_attribute(self.graph, path)
        if not isinstance(tensor, torch.Tensor):
            return
        key = self._tensor_keys.setdefault(id(tensor), f"@{path}")
        if key not in self.leaves:
            self.leaves[key] = tensor
            self.shapes[key] = tuple(tensor.shape)
            self.dtypes[key] = tensor.dtype
        names = self.leaf_names.setdefault(key, [])
        if path not in names:
            names.append(path)
        self._leaf_keys[path] = key

    def take(self, node: Node, result: Any) -> None:
        """Keep what `result`, the value of `node`, shows."""
        if isinstance(result, torch.Tensor):
            if node.op != "get_attr":
                self.shapes[node.name] = tuple(result.shape)
                self.dtypes[node.name] = result.dtype
            if result.dtype in _VALUE_DTYPES and not result.is_meta and result.numel() <= _LARGEST_VALUE:
                self.values[node.name] = result.detach().clone()
        elif isinstance(result, int | float | bool):
            self.values[node.name] = result
        elif isinstance(result, tuple | list):
            keys = []
            for position, element in enumerate(result):
                if isinstance(element, torch.Tensor):
                    key = f"{node.name}#{position}"
                    self.shapes[key] = tuple(element.shape)
                    self.dtypes[key] = element.dtype
                    keys.append(key)
            self.outputs[node.name] = keys


class _NeedsValues(Exception):
    """An op changes a tensor whose values are kept by one of which only the shape is known."""


class _Recorder(Interpreter):
    """Runs the graph in full."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording.graph)
        self._recording = recording

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self._recording.take(n, result)
        return result


class _ShapeRecorder(_Recorder):
    """Runs the graph with floating-point tensors as shapes only; what is computed from integers alone keeps values."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self._shapes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._without_floats(super().get_attr(target, args, kwargs))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._without_floats(super().placeholder(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            schema = getattr(target, "_schema", None)
            if schema is not None and schema.is_mutable and not all(tensor.is_meta for tensor in tensors):
                raise _NeedsValues
            args, kwargs = tree_map(self._on_meta, (args, kwargs))
            if target.__name__.partition(".")[0] in _RECURRENT:
                # of shapes alone torch takes them apart, time step by time step; zeros are much faster
                result = super().call_function(target, *tree_map(_as_zeros, (args, kwargs)))
                return tree_map(self._on_meta, result)
        result = super().call_function(target, args, kwargs)
        if result is NotImplemented:  # a loop whose end depends on values
            raise _NeedsValues
        return result

    def _without_floats(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype not in _VALUE_DTYPES:
            return self._on_meta(value)
        return value

    def _on_meta(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return value
        if id(value) not in self._shapes:
            shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            self._shapes[id(value)] = (value, shape)
        return self._shapes[id(value)][1]


def _as_zeros(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_meta:
        return torch.zeros(value.shape, dtype=value.dtype)
    return value


def record(graph: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Run `graph` once, without gradients, and return what the run showed.

    Args:
        graph: A captured graph in eval form.
        args: Positional inputs as the graph's callable takes them.
        kwargs: Keyword inputs.
    """
    inputs = flat_inputs(graph, args, kwargs)
    try:
        return _run(graph, inputs, _ShapeRecorder)
    except (_NeedsValues, RuntimeError, NotImplementedError, TypeError, ValueError):
        return _run(graph, inputs, _Recorder)  # shapes depend on values, or an op has no rule for shapes alone


def _run(graph: GraphModule, inputs: Sequence[Any], recorder: type[_Recorder]) -> Recording:
    recording = Recording(graph)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            recording.add_leaf(str(node.target))
    with torch.no_grad():
        recorder(recording).run(*inputs, enable_io_processing=False)
    return recording


def flat_inputs(graph: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the inputs in the order of the graph's placeholders."""
    specification = getattr(graph, "_in_spec", None)
    if specification is None:
        return [*args, *kwargs.values()]
    return list(tree_flatten_spec((tuple(args), dict(kwargs)), specification))
