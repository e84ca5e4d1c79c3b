"""Reads values inside a model by module path, beside its outputs: for feature distillation and for statistics."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from mil_cli.errors import ModelError, did_you_mean
from mil_cli.graph.coupling.operators import written_after
from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, module_stack, op_name
from mil_cli.graph.program import set_out_spec
from mil_cli.ops import QUANTIZERS


class Tapped:
    """A model that gives ``(outputs, {module path: value})``.

    It runs on the model's own weights, in the model's present mode, with gradients. Make a new one after the model's
    graph was changed.

    Args:
        model: The model.
        nodes: The node to read for each module path.
    """

    def __init__(self, model: Model, nodes: dict[str, Node]) -> None:
        self._model = model
        self._nodes = nodes
        self._graph: GraphModule | None = None
        self._training = model.training

    @property
    def paths(self) -> tuple[str, ...]:
        """The module paths that are read."""
        return tuple(self._nodes)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run the model once; return its outputs and the value at each path."""
        outputs, values = self.graph()(*args, **kwargs)
        return outputs, values

    def graph(self) -> GraphModule:
        """Return the graph module that this runs in the model's present mode, on the model's own weights."""
        if self._graph is None or self._training != self._model.training:
            self._training = self._model.training
            self._graph = _with_taps(self._model.graph, self._nodes)
        return self._graph


def tap(model: Model, module_paths: Sequence[str]) -> Tapped:
    """Return a callable that also gives the outputs of some of the user's modules.

    Where a module is called several times its last call counts; where it returns several tensors, the last one that
    is used outside of it. Of a quantized value it is what all its readers read.

    Args:
        model: The model; it is not changed.
        module_paths: Dotted paths, as ``named_modules`` of the user's module gives them.

    Raises:
        ModelError: If no node of the graph belongs to a path.
    """
    return Tapped(model, {path: module_output(model, path) for path in module_paths})


def tappable_paths(model: Model) -> list[str]:
    """Return every module path whose output can be read, in order of execution."""
    return list(module_outputs(model))


def module_output(model: Model, path: str) -> Node:
    """Return the node that holds the output of the last call of a module.

    Raises:
        ModelError: If no node of the graph belongs to the path.
    """
    output = _output(_inside(model.graph, path)) if path else None
    if output is None:
        raise ModelError(
            "no operation of the captured graph belongs to this module",
            where="module path",
            value=path,
            hint=did_you_mean(path, tappable_paths(model)),
        )
    return output


def module_outputs(model: Model) -> dict[str, Node]:
    """Return for every module path the node that holds the output of its last call, in order of execution."""
    inside: dict[str, list[Node]] = {}
    for node in calls(model.graph):
        for path in dict.fromkeys(path for path, _ in module_stack(node) if path):
            inside.setdefault(path, []).append(node)
    return {path: output for path, nodes in inside.items() if (output := _output(nodes)) is not None}


def _inside(graph: GraphModule, path: str) -> list[Node]:
    return [node for node in calls(graph) if any(path == name for name, _ in module_stack(node))]


def _output(nodes: Sequence[Node]) -> Node | None:
    """Return the output of a module with these nodes."""
    inside = set(nodes)
    leaving = [node for node in nodes if _is_tensor(node) and any(user not in inside for user in node.users)]
    if not leaving:
        return None
    output = leaving[-1]
    # Layers may read in fewer bits what shortcuts read as it is.
    while op_name(output) in QUANTIZERS and (source := output.all_input_nodes[0]) in leaving:
        output = source
    return output


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return value is None or isinstance(value, Tensor)


def _with_taps(graph: GraphModule, nodes: dict[str, Node]) -> GraphModule:
    """Return a graph module on the same weights whose outputs are ``(outputs, {path: value})``."""
    copied: dict[Node, Node] = {}
    new = Graph()
    outputs = new.graph_copy(graph.graph, copied)
    taps = []
    for node in nodes.values():
        value = copied[node]
        # A later in-place operation would change the value under the reader.
        if written_after(node):
            with new.inserting_after(value):
                value = new.call_function(torch.ops.aten.clone.default, (value,))
        taps.append(value)
    new.output((*_as_tuple(outputs), *taps))
    new._codegen = copy.copy(graph.graph._codegen)
    result = GraphModule(graph, new)
    tree = pytree.TreeSpec(dict, list(nodes), [pytree.treespec_leaf() for _ in nodes])
    codegen: Any = new._codegen
    set_out_spec(result, pytree.TreeSpec(tuple, None, [codegen.pytree_info.out_spec, tree]))
    result.training = graph.training
    return result


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
