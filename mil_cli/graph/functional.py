"""Brings a graph into its plainest forms: no operator works in place, products with a weight are linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.graph.fold import reads_alone
from mil_cli.graph.nodes import calls, get_argument, get_attribute, op_name, set_attribute
from mil_cli.graph.segment import is_in_place, is_view

_SWAPS = frozenset({"t", "numpy_T", "mT"})
"""Operators that always swap the axes of a matrix."""


def make_functional(graph: GraphModule) -> None:
    """Replace in-place operators, and roundabout products with weights, in place; no result changes by it.

    ``relu_(x)`` becomes ``relu(x)``, and whoever read ``x`` afterwards reads the result. An operator that writes into a
    view, or whose target somebody else views, is left alone. ``x @ w.T`` becomes ``linear(x, w)``, as the heads of
    language models are written that share the weight of their embedding; so does ``addmm(b, x, w)``, the linear layer
    of GPT-2, whose weight is stored transposed from then on. Nodes keep their names.
    """
    _make_functional(graph)
    for node in list(calls(graph)):
        if op_name(node) == "addmm":
            _make_biased(graph, node)
        elif op_name(node) in ("matmul", "mm"):
            _make_linear(graph, node)
    graph.graph.lint()
    graph.recompile()


def _make_functional(graph: GraphModule) -> None:
    position = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in list(calls(graph)):
        functional = _functional_target(node)
        target = node.args[0] if node.args else None
        if functional is None or not isinstance(target, Node) or target.op != "call_function" or is_view(target):
            continue
        # Of the operators in place that read the target, those before this one are functional already, if they can be.
        views = [user for user in target.users if is_view(user)]
        if any(not is_in_place(user) or position[user] < position[node] for user in views):
            continue
        node.target = functional
        later = [user for user in target.users if position[user] > position[node]]
        for user in later:
            user.replace_input_with(target, node)


def _make_biased(graph: GraphModule, node: Node) -> None:
    """Write ``addmm`` with a weight and a bias as a linear layer, for which the weight is stored transposed."""
    bias, source, matrix = (get_argument(node, name) for name in ("self", "mat1", "mat2"))
    if get_argument(node, "alpha") != 1 or get_argument(node, "beta") != 1:
        return
    if bias.op != "get_attr" or get_attribute(graph, str(bias.target)).shape != node.meta["val"].shape[1:]:
        return
    weight = _untransposed(graph, matrix)
    if weight is None and reads_alone(graph, matrix, node):
        weight = matrix
        value = get_attribute(graph, str(weight.target))
        swapped = nn.Parameter(value.detach().T.contiguous(), requires_grad=value.requires_grad)
        set_attribute(graph, str(weight.target), swapped)
        weight.meta["val"] = weight.meta["val"].T.contiguous()
    if weight is not None:
        _become_linear(graph, node, (source, weight, bias), matrix)


def _make_linear(graph: GraphModule, node: Node) -> None:
    """Write a product with a transposed weight as a linear layer."""
    names = ("self", "other" if op_name(node) == "matmul" else "mat2")
    source, transposed = (get_argument(node, name) for name in names)
    weight = _untransposed(graph, transposed)
    if weight is not None:
        _become_linear(graph, node, (source, weight), transposed)


def _become_linear(graph: GraphModule, node: Node, arguments: tuple[Node, ...], matrix: Node) -> None:
    node.target, node.args, node.kwargs = torch.ops.aten.linear.default, arguments, {}
    if not matrix.users:
        graph.graph.erase_node(matrix)


def _untransposed(graph: GraphModule, value: Node) -> Node | None:
    """Return the matrix of the graph that `value` is the transposition of, or None."""
    name, source = op_name(value), value.args[0] if value.args else None
    if name not in (*_SWAPS, "transpose", "permute") or not isinstance(source, Node) or source.op != "get_attr":
        return None
    weight = get_attribute(graph, str(source.target))
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if name in _SWAPS:
        return source
    if name == "transpose":
        swaps = (get_argument(value, "dim0") - get_argument(value, "dim1")) % 2 == 1
    else:
        swaps = [axis % 2 for axis in get_argument(value, "dims")] == [1, 0]
    return source if swaps else None


def _functional_target(node: Node) -> torch._ops.OpOverload | None:
    """Return the functional overload with the same arguments as the in-place one that `node` calls, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_in_place(node):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), op_name(node)[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    if not isinstance(functional, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in target._schema.arguments]
    same = names == [argument.name for argument in functional._schema.arguments]
    return functional if same and not functional._schema.is_mutable else None
