"""Folds batch norms into the convolution or linear layer before them; the outputs stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from mil_cli.graph.model import Model
from mil_cli.graph.nodes import calls, free_attribute, get_argument, get_attribute, op_name, set_argument, set_attribute
from mil_cli.ops.learned_scale import SMALLEST_SCALE
from mil_cli.ops.levels import level_codes
from mil_cli.ops.quantize import quantize_codes

_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_QUANTIZERS = ("quantize_affine", "quantize_levels")
_FOLDABLE = ("conv1d", "conv2d", "conv3d", "linear", *_TRANSPOSED)


def fold_batch_norm(model: Model) -> Model:
    """Return a model in evaluation mode whose batch norms are merged into the layers they follow.

    A batch norm is merged if its input is a convolution, transposed convolution or linear layer that nothing else
    reads and whose weights nothing else uses. With scale ``s = gamma / sqrt(var + eps)`` per output channel, the weight
    becomes ``w * s`` and the bias ``(b - mean) * s + beta``; computed in double precision.

    A layer may read its weight through a ``quantize_affine`` with zero point 0 or a ``quantize_levels``, per output
    channel or per tensor: its scale becomes ``scale * |s|`` for each channel, which leaves every code as it was, up to
    its sign where s is negative. Codes that are not symmetric have no such sign: there no s may be negative.

    Args:
        model: The model; it is not changed.
    """
    folded = model.clone().eval()
    graph = folded.graph
    for layer, norm in foldable_norms(graph):
        _fold(graph, layer, norm)
    graph.graph.lint()
    graph.recompile()
    return folded


def foldable_norms(graph: GraphModule) -> Iterator[tuple[Node, Node]]:
    """Find the batch norms of a graph in evaluation mode that can be folded; yields the layer before each, and it.

    Where one is folded before the next is asked for, a second batch norm after the same layer is found too.
    """
    for norm in list(calls(graph)):
        layer = norm.args[0] if op_name(norm) == "batch_norm" else None
        if isinstance(layer, Node) and _can_fold(graph, layer, norm):
            yield layer, norm


def _can_fold(graph: GraphModule, layer: Node, norm: Node) -> bool:
    if op_name(layer) not in _FOLDABLE or set(layer.users) != {norm}:
        return False
    if get_argument(norm, "training") or not isinstance(get_argument(norm, "running_mean"), Node):
        return False
    value = layer.meta.get("val")
    if op_name(layer) == "linear" and (not isinstance(value, Tensor) or value.ndim != 2):
        return False
    weight, bias = get_argument(layer, "weight"), get_argument(layer, "bias")
    if not isinstance(weight, Node) or not (bias is None or reads_alone(graph, bias, layer)):
        return False
    if op_name(weight) in _QUANTIZERS:
        return _can_scale(graph, weight, layer, norm)
    return reads_alone(graph, weight, layer)


def _can_scale(graph: GraphModule, quantizer: Node, layer: Node, norm: Node) -> bool:
    """Whether a weight's quantizer can take a factor for each output channel without a change of its codes."""
    if op_name(layer) in _TRANSPOSED or set(quantizer.users) != {layer}:
        return False
    affine = op_name(quantizer) == "quantize_affine"
    sources = [get_argument(quantizer, name) for name in ("x", "scale", *(("zero_point",) if affine else ()))]
    if not all(reads_alone(graph, source, quantizer) for source in sources):
        return False
    weight, _, *zero_points = (get_attribute(graph, str(source.target)) for source in sources)
    axis = get_argument(quantizer, "axis")
    if affine:
        symmetric = get_argument(quantizer, "quant_min") == -get_argument(quantizer, "quant_max")
    else:
        levels = _value(graph, quantizer, "levels")
        symmetric = torch.equal(levels, -levels.flip(0))
    gamma = _value(graph, norm, "weight")
    signed = gamma is not None and bool((gamma < 0).any())
    unshifted = not any(bool(zero_point.any()) for zero_point in zero_points)
    return (symmetric or not signed) and unshifted and (axis is None or axis % weight.ndim == 0)


def reads_alone(graph: GraphModule, source: Any, reader: Node) -> bool:
    """Whether `source` is an attribute of the graph that only `reader` reads, once."""
    if not isinstance(source, Node) or source.op != "get_attr":
        return False
    value = get_attribute(graph, str(source.target))
    readers = [
        (user, use)
        for node in graph.graph.find_nodes(op="get_attr")
        if get_attribute(graph, str(node.target)) is value
        for user in node.users
        for use in pytree.tree_leaves((user.args, user.kwargs))
        if use is node
    ]
    return len(readers) == 1 and readers[0][0] is reader


def _fold(graph: GraphModule, layer: Node, norm: Node) -> None:
    weight_node, bias_node = get_argument(layer, "weight"), get_argument(layer, "bias")
    quantizer = weight_node if op_name(weight_node) in _QUANTIZERS else None
    if quantizer is not None:
        weight_node = get_argument(quantizer, "x")
    weight: Tensor = get_attribute(graph, str(weight_node.target))
    bias = get_attribute(graph, str(bias_node.target)) if isinstance(bias_node, Node) else None
    mean, variance = _value(graph, norm, "running_mean"), _value(graph, norm, "running_var")
    gamma, beta = _value(graph, norm, "weight"), _value(graph, norm, "bias")
    scale = torch.rsqrt(variance + float(get_argument(norm, "eps")))
    scale = scale if gamma is None else scale * gamma
    shift = (0.0 if bias is None else bias.detach().double()) - mean
    new_bias = shift * scale + (0.0 if beta is None else beta)
    new_weight = weight.detach().double() * per_output(layer, weight, scale)
    if quantizer is not None:
        new_weight = _scale_codes(graph, quantizer, weight.detach(), new_weight, scale)
    _assign(graph, str(weight_node.target), new_weight, weight)
    if isinstance(bias_node, Node):
        _assign(graph, str(bias_node.target), new_bias, weight if bias is None else bias)
    else:
        name = free_bias(graph, str(weight_node.target))
        _assign(graph, name, new_bias, weight)
        with graph.graph.inserting_before(layer):
            set_argument(layer, "bias", graph.graph.get_attr(name))
    norm.replace_all_uses_with(layer)
    _remove(graph, norm)


def _scale_codes(graph: GraphModule, quantizer: Node, weight: Tensor, new_weight: Tensor, factor: Tensor) -> Tensor:
    """Give a weight's quantizer the scales that fit the new weight; returns the new weight.

    Args:
        graph: The graph.
        quantizer: The quantizer; it becomes one of output channels.
        weight: The weight before, ``[out, ...]``.
        new_weight: The same times `factor`, float64.
        factor: float64 ``[out]``.
    """
    scale_node = get_argument(quantizer, "scale")
    scale: Tensor = get_attribute(graph, str(scale_node.target))
    codes = _codes(graph, quantizer, weight)
    new_scale = (scale.detach().double() * factor.abs()).clamp(min=SMALLEST_SCALE).to(scale.dtype)
    set_attribute(graph, str(scale_node.target), nn.Parameter(new_scale) if _trains(scale) else new_scale)
    if op_name(quantizer) == "quantize_affine":
        name = str(get_argument(quantizer, "zero_point").target)
        set_attribute(graph, name, torch.zeros(factor.shape, dtype=get_attribute(graph, name).dtype))
    set_argument(quantizer, "axis", 0)
    # A weight midway between two codes could fall to the other side by rounding; it moves to its code.
    columns = [-1, *[1] * (weight.ndim - 1)]
    codes = codes * factor.sign().reshape(columns)
    found = _codes(graph, quantizer, new_weight.to(weight.dtype))
    return torch.where(found == codes, new_weight, codes * new_scale.double().reshape(columns))


def _codes(graph: GraphModule, quantizer: Node, weight: Tensor) -> Tensor:
    """Return what a weight's quantizer rounds it to, in units of its scale."""
    scale, axis = _attribute(graph, quantizer, "scale").detach(), get_argument(quantizer, "axis")
    if op_name(quantizer) == "quantize_levels":
        levels = _attribute(graph, quantizer, "levels")
        return levels[level_codes(weight, scale, levels, axis)].double()
    limits = get_argument(quantizer, "quant_min"), get_argument(quantizer, "quant_max")
    return quantize_codes(weight, scale, _attribute(graph, quantizer, "zero_point"), axis, *limits)


def _attribute(graph: GraphModule, node: Node, name: str) -> Tensor:
    value: Tensor = get_attribute(graph, str(get_argument(node, name).target))
    return value


def _trains(value: Tensor) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def _value(graph: GraphModule, norm: Node, name: str) -> Any:
    source = get_argument(norm, name)
    return get_attribute(graph, str(source.target)).detach().double() if isinstance(source, Node) else None


def per_output(layer: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Shape a per-channel scale ``[C]`` so that it multiplies a weight along its output channels."""
    if op_name(layer) not in _TRANSPOSED:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    groups = int(get_argument(layer, "groups"))
    # A transposed weight is [in, out / groups, ...]; the inputs of group g meet the outputs of group g.
    per_input = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return per_input.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def _assign(graph: GraphModule, name: str, value: Tensor, like: Tensor) -> None:
    strided = torch.empty_like(like) if value.shape == like.shape else torch.empty_like(value, dtype=like.dtype)
    strided = strided.detach().copy_(value)
    set_attribute(graph, name, nn.Parameter(strided, requires_grad=like.requires_grad))


def free_bias(graph: GraphModule, weight_name: str) -> str:
    """Return the name of a new bias beside a weight."""
    return free_attribute(graph, f"{weight_name.removesuffix('weight')}bias")


def _remove(graph: GraphModule, norm: Node) -> None:
    """Erase a batch norm with the weights and statistics that nothing else reads."""
    sources = [source for source in norm.all_input_nodes if source.op == "get_attr"]
    graph.graph.erase_node(norm)
    owners = {str(source.target).rpartition(".")[0] for source in sources}
    counters = {f"{owner}.num_batches_tracked".lstrip(".") for owner in owners}
    for source in [*sources, *(n for n in graph.graph.find_nodes(op="get_attr") if n.target in counters)]:
        others = [n for n in graph.graph.find_nodes(op="get_attr") if n.target == source.target and n is not source]
        if source.users:
            continue
        graph.graph.erase_node(source)
        if not others:
            owner_path, _, leaf = str(source.target).rpartition(".")
            delattr(graph.get_submodule(owner_path), leaf)
