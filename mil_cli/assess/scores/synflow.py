"""SynFlow: how much would flow through a network if every weight were positive and no norm held it back."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from mil_cli.assess.scores.layers import weighted_layers
from mil_cli.assess.scores.subject import Subject
from mil_cli.errors import ModelError
from mil_cli.graph.functional import make_functional
from mil_cli.graph.nodes import calls, get_argument, op_name, schema_index, set_argument
from mil_cli.graph.samples import resize_batch

_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
_NATIVE_NORMS = ("_native_batch_norm", "native_batch_norm", "native_layer_norm", "native_group_norm")
"""Those of decomposed graphs: they give their statistics too."""


def synflow(subject: Subject) -> float:
    """Return the sum of ``|weight * derivative of the outputs' sum|`` over convolutions and linear layers.

    Tanaka et al. 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow", as
    Abdelfattah et al. 2021, "Zero-cost proxies for lightweight NAS", take it: all parameters by their magnitudes, one
    input of ones, batch norms left out, in double precision. Other norms are left out as batch norms are, and dropout
    is off. Inputs that are not floating-point are those of the first sample. It grows exponentially with depth (rank by
    it, or take its logarithm), in very deep networks to infinity.

    Raises:
        ModelError: The model has no convolution and no linear layer.
    """
    network = subject.model.clone().eval()
    make_functional(network.graph)
    _leave_norms_out(network.graph)
    _make_double(network.graph)
    weights = list(dict.fromkeys(weighted_layers(network.graph).values()))
    if not weights:
        raise ModelError("the model has no convolution and no linear layer through which anything could flow")
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.abs()
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    samples = network.spec.fixed_batch or 1
    call: Any = pytree.tree_map_only(
        Tensor,
        lambda value: torch.ones_like(value, dtype=torch.float64) if value.is_floating_point() else value,
        resize_batch(subject.task.inputs(subject.batches[0]), network.spec, samples),
    )
    outputs = network.flatten_outputs(network(*call[0], **call[1]))
    floating = [value for value in outputs if value.is_floating_point()]
    ones = [torch.ones_like(value) for value in floating]
    gradients = torch.autograd.grad(floating, weights, ones, allow_unused=True, materialize_grads=True)
    pairs = zip(weights, gradients, strict=True)
    return sum(float((weight.detach() * gradient).abs().sum()) for weight, gradient in pairs) / samples


def _leave_norms_out(graph: GraphModule) -> None:
    for node in list(calls(graph)):
        name = op_name(node)
        if name in _NORMS:
            _replace(node, node.args[0])
        elif name.startswith(_NATIVE_NORMS):
            for user in list(node.users):
                if user.target is operator.getitem and user.args[1] == 0:
                    _replace(user, node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _replace(node: Node, source: Any) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _make_double(graph: GraphModule) -> None:
    """Bring a graph to double precision: its tensors, what it casts, and the constants that it makes."""
    graph.double()

    def double(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    for node in calls(graph):
        node.args = tuple(torch.fx.node.map_aggregate(each, double) for each in node.args)
        node.kwargs = {name: torch.fx.node.map_aggregate(each, double) for name, each in node.kwargs.items()}
        if _makes_single(node):
            set_argument(node, "dtype", torch.float64)
    graph.recompile()


def _makes_single(node: Node) -> bool:
    """Whether a node makes a constant of a precision that is not written down, as ``torch.zeros(3)`` does."""
    if schema_index(node, "dtype") is None or get_argument(node, "dtype") is not None:
        return False
    made, *read = (each.meta.get("val") for each in (node, *node.all_input_nodes))
    from_tensors = any(isinstance(value, Tensor) for value in read)
    return isinstance(made, Tensor) and made.is_floating_point() and not from_tensors
