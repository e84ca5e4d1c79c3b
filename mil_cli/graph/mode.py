"""The switch between training and evaluation: rewrites the node arguments that differ between the two.

A captured graph has no `self.training`: batch norm, dropout and recurrent layers carry their mode as an argument.
Every such node keeps its two values in its annotations (``mode: {argument: [eval, train]}``), so that layers that were
always on, were frozen by their owner, or lost an argument in the evaluation capture come back as they were.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from mil_cli.graph.nodes import annotate, get_argument, read_annotation, schema_index, set_argument

FLAGS = ("training", "train", "use_input_stats")
"""Names of the operators' arguments that say whether they train."""

_INFERENCE_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_TRAINING_NORM = torch.ops.aten._native_batch_norm_legit.default
_FLAG_POSITION = 5
_SWAPPED = "swapped_norm"


def mode_arguments(node: Node) -> dict[str, tuple[Any, Any]]:
    """Return the arguments of a node that depend on the mode, each with its value in evaluation and in training.

    A flag that is off in evaluation is on in training, and one that is on stays on, unless the node's annotations say
    otherwise. The node must be in its evaluation form, or have been switched by `set_mode` before.
    """
    recorded = read_annotation(node, "mode") or {}
    # A second export copies the annotations of a call to the nodes that take its results apart.
    known = {name: values for name, values in recorded.items() if schema_index(node, name) is not None}
    result = {name: (values[0], values[1]) for name, values in known.items()}
    for flag in FLAGS:
        if flag not in result and schema_index(node, flag) is not None:
            value = get_argument(node, flag)
            if isinstance(value, bool):
                result[flag] = (value, True)
    return result


def record_mode(node: Node, name: str, *, evaluation: Any, training: Any) -> None:
    """Note the two values of a mode-dependent argument on its node (both JSON-able)."""
    annotate(node, "mode", {**(read_annotation(node, "mode") or {}), name: [evaluation, training]})


def set_mode(graph: GraphModule, training: bool) -> None:
    """Switch a graph in place to training or evaluation, and its `training` flags with it."""
    changed = switch_nodes(graph.graph, training)
    for module in graph.modules():
        module.training = training
    if changed:
        graph.recompile()


def switch_nodes(graph: Graph, training: bool) -> bool:
    """Switch the nodes of a graph in place, and say whether that changed anything; its code is the caller's."""
    changed = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        changed |= _swap_inference_norm(node, training)
        for name, (evaluation, train) in mode_arguments(node).items():
            value = train if training else evaluation
            if get_argument(node, name) != value:
                record_mode(node, name, evaluation=evaluation, training=train)
                set_argument(node, name, value)
                changed = True
    return changed


def bind_mode_methods(graph: GraphModule) -> None:
    """Give a graph module working `train` and `eval` methods, so that training loops can call them as on any module.

    The ones that `torch.export` leaves on a captured module raise.
    """

    def train(self: GraphModule, mode: bool = True) -> GraphModule:
        set_mode(self, mode)
        return self

    def evaluate(self: GraphModule) -> GraphModule:
        set_mode(self, False)
        return self

    bound: nn.Module = graph
    bound.train = MethodType(train, graph)  # type: ignore[method-assign]
    bound.eval = MethodType(evaluate, graph)  # type: ignore[method-assign]


def _swap_inference_norm(node: Node, training: bool) -> bool:
    """Swap the inference-only batch norm of decomposed graphs for the one that can train, and back."""
    if training and node.target is _INFERENCE_NORM:
        arguments = list(node.args)
        node.target = _TRAINING_NORM
        node.args = (*arguments[:_FLAG_POSITION], True, *arguments[_FLAG_POSITION:])
        annotate(node, _SWAPPED, True)
        return True
    if not training and read_annotation(node, _SWAPPED):
        arguments = list(node.args)
        node.target = _INFERENCE_NORM
        node.args = (*arguments[:_FLAG_POSITION], *arguments[_FLAG_POSITION + 1 :])
        annotate(node, _SWAPPED, None)
        return True
    return False
