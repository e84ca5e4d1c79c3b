"""Finds the layers of a graph whose weights can be quantized, and which of them share one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mil_cli.device.profile import Int8Form
from mil_cli.errors import StageError, did_you_mean
from mil_cli.graph.nodes import calls, get_argument, get_attribute, module_path, module_stack, op_name
from mil_cli.stages.quantize.passing import backwards, comes_from_any, comes_from_input, goes_to_output

T = TypeVar("T")

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_PRODUCTS = {"linear": ("input", "weight", 0), "matmul": ("self", "other", -1), "mm": ("self", "mat2", 1)}
"""Operator -> its activation, its weight, and the weight's axis of output channels."""

_QUANTIZED = (*sorted(CONVOLUTIONS), *_PRODUCTS)

_OWNERS = ("torch.nn.modules.sparse.Embedding", "torch.nn.modules.linear.Linear")
"""Modules that often share their weights: heads with embeddings."""

LOOK_UP = "embedding"
"""The operator that looks rows up in a table."""

NEVER = {
    **dict.fromkeys(_TRANSPOSED, "onnxruntime has no integer kernel for transposed convolutions"),
    "lstm": "onnxruntime has no static integer kernel for recurrent layers",
    "gru": "onnxruntime has no static integer kernel for recurrent layers",
    "rnn_tanh": "onnxruntime has no integer kernel for this recurrent layer",
    "rnn_relu": "onnxruntime has no integer kernel for this recurrent layer",
    "scaled_dot_product_attention": "products of two activations stay float",
    "bmm": "products of two activations stay float",
    "baddbmm": "products of two activations stay float",
    "einsum": "only plain products with a weight become integer kernels",
    "addmm": "only plain products with a weight become integer kernels",
}
NO_TABLES = {LOOK_UP: "embeddings: false"}

OVERWRITTEN = "an operator in place changes its input after it was made"


def left_float(device: Int8Form, *, tables: bool, never: Mapping[str, str] = NEVER) -> dict[str, str]:
    """Return each operator that stays float, and why.

    Args:
        device: The form of the device, which may leave some float.
        tables: Whether tables of embeddings are quantized.
        never: Those that stay float on every device.
    """
    own = {name: f"the device profile leaves {name} in float" for name in _QUANTIZED if device.leaves_float(name)}
    return {**own, **never, **({} if tables else NO_TABLES)}


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is quantized; where its input is too it will run on an integer kernel.

    Attributes:
        node: The convolution, product or look-up.
        name: The dotted path of its module, or the name of its weight or node where there is none.
        alias: The name of its node, which settings may use too; its `name` again where that is the path of a module.
        source: The node of its activation; of a look-up that of its indices, which stay as they are.
        weight: The node that reads its weight.
        axis: The weight's axis of output channels; of a table that of its rows.
        bias: The node that reads its bias, or None.
        edge: Whether it is the first layer after an input, or the last before an output; a look-up is neither.
        partners: The other layers whose weight is quantized together with it, since it is the same; their own
            partners are left empty.
    """

    node: Node
    name: str
    alias: str
    source: Node
    weight: Node
    axis: int
    bias: Node | None
    edge: bool
    partners: tuple[Layer, ...] = ()

    @property
    def looks_up(self) -> bool:
        """Whether it looks rows up in a table, and computes nothing."""
        return op_name(self.node) == LOOK_UP

    @property
    def sharing(self) -> tuple[Layer, ...]:
        """All layers that read its weight, itself first."""
        return (self, *self.partners)

    @property
    def has_table(self) -> bool:
        """Whether rows are looked up in its weight, by itself or by a partner."""
        return any(layer.looks_up for layer in self.sharing)


class FoundLayers(NamedTuple):
    """The layers of a graph.

    Attributes:
        layers: Those that can be quantized, in order of execution.
        left_out: Name of each other layer -> why.
        names: Alias -> layer name, of all of them.
    """

    layers: list[Layer]
    left_out: dict[str, str]
    names: dict[str, str]


def find_layers(
    graph: GraphModule,
    *,
    skip: Sequence[str] = (),
    apart: Mapping[Node, str] | None = None,
    never: Mapping[str, str] = NEVER,
    whole: bool = False,
) -> FoundLayers:
    """Find the layers with weights.

    A table in which something looks rows up that is not quantized, or that is read along two axes, stays float for all
    of its readers: it is most of a file's bytes, and would be in it twice.

    Args:
        graph: The graph.
        skip: Patterns of layers to leave out; see `mil_cli.stages.quantize.placement.place`.
        apart: Value that must stay float -> why; layers that read it are left out. None: all can be quantized.
        never: Operator -> why it is left out.
        whole: Whether weights are read out as a whole, along whatever axis: then all that read one are partners, and
            none may be in the file twice.

    Raises:
        StageError: A pattern of `skip` fits no layer.
    """
    layers: list[Layer] = []
    left_out: dict[str, str] = {}
    names: dict[str, str] = {}
    unused, apart = set(skip), apart or {}
    weighted = [(node, _weighted(graph, node)) for node in calls(graph)]
    weighted = [(node, found) for node, found in weighted if found is not None or op_name(node) in never]
    paths = [_layer_name(graph, node, found) for node, found in weighted]
    for (node, found), name in zip(weighted, paths, strict=True):
        alias = name if any(f"{path}.".startswith(f"{node.name}.") for path in paths) else node.name
        names[alias] = name
        patterns = {pattern for pattern in skip if matches(pattern, name, alias)}
        unused -= patterns
        looks_up = op_name(node) == LOOK_UP
        if patterns:
            left_out[name] = f"skipped by '{min(patterns)}'"
        elif op_name(node) in never:
            left_out[name] = never[op_name(node)]
        elif isinstance(found, str):
            left_out[name] = found
        elif found is not None and not looks_up and comes_from_any(found[0], apart):
            left_out[name] = next(apart[step] for step in backwards(found[0]) if step in apart)
        elif found is not None:
            source, weight, axis, bias = found
            edge = not looks_up and (comes_from_input(source) or goes_to_output(node))
            layers.append(Layer(node, name, alias, source, weight, axis, bias, edge))
    if unused:
        pattern = min(unused)
        hint = did_you_mean(pattern, names.values())
        raise StageError(f"'{pattern}' fits no layer", where="skip", value=list(skip), hint=hint)
    return FoundLayers(_with_partners(graph, layers, left_out, whole=whole), left_out, names)


def matches(pattern: str, layer: str, alias: str) -> bool:
    """Whether a pattern is for a layer of such a name and such an alias."""
    return fnmatchcase(layer, pattern) or fnmatchcase(alias, pattern) or layer.startswith(f"{pattern}.")


def once_for_each_weight(layers: Sequence[Layer], make: Callable[[Layer], T]) -> list[T]:
    """Return what `make` gives for each layer, in their order; layers that share a weight share the result."""
    known: dict[Node, T] = {}
    for layer in layers:
        first = next((other.node for other in layer.partners if other.node in known), None)
        known[layer.node] = make(layer) if first is None else known[first]
    return list(known.values())


def _weighted(graph: GraphModule, node: Node) -> tuple[Node, Node, int, Node | None] | str | None:
    """Return a layer's activation, weight, axis and bias; why it cannot be quantized; or None if it is no layer."""
    name = op_name(node)
    if name in CONVOLUTIONS:
        source, weight, axis = get_argument(node, "input"), get_argument(node, "weight"), 0
    elif name in _TRANSPOSED:
        source, weight, axis = get_argument(node, "input"), get_argument(node, "weight"), 1
    elif name == LOOK_UP:
        source, weight, axis = get_argument(node, "indices"), get_argument(node, "weight"), 0
    elif name in _PRODUCTS:
        source_name, weight_name, axis = _PRODUCTS[name]
        source, weight = get_argument(node, source_name), get_argument(node, weight_name)
    else:
        return None
    if weight.op != "get_attr":
        if name in ("matmul", "mm"):
            return "its weight stands on the left" if _is_matrix(graph, source) else None
        return "its weight is computed in the graph"
    value = get_attribute(graph, str(weight.target))
    if source.op == "get_attr" and name != LOOK_UP:
        return "its input is a constant"
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return "its weight is not float32"
    if name == "matmul" and value.ndim != 2:
        return "only two-dimensional weights become integer kernels"
    bias = get_argument(node, "bias") if name not in ("matmul", "mm", LOOK_UP) else None
    return source, weight, axis % value.ndim, bias if isinstance(bias, Node) and bias.op == "get_attr" else None


def _is_matrix(graph: GraphModule, node: Node) -> bool:
    """Whether a node reads a parameter of two axes, as the weights of products are."""
    value = get_attribute(graph, str(node.target)) if node.op == "get_attr" else None
    return isinstance(value, nn.Parameter) and value.ndim == 2


def _layer_name(graph: GraphModule, node: Node, found: object) -> str:
    if isinstance(found, tuple):
        owner, _, leaf = str(found[1].target).rpartition(".")
        path, kind = (module_stack(node) or [("", "")])[-1]
        if path and leaf == "weight" and kind in _OWNERS:  # of several names of a weight the module's own
            return path
        return owner if leaf == "weight" and owner else str(found[1].target)
    path = module_path(node)
    return f"{path}.{node.name}" if path else node.name


def _with_partners(
    graph: GraphModule, layers: Sequence[Layer], left_out: dict[str, str], *, whole: bool
) -> list[Layer]:
    """Return the layers that may be quantized, each with those that share its weight; the others are left out."""
    sharing: dict[int, list[Layer]] = {}
    for layer in layers:
        sharing.setdefault(id(get_attribute(graph, str(layer.weight.target))), []).append(layer)
    quantized = {layer.node for layer in layers}
    others: dict[int, set[str]] = {}
    for source in graph.graph.find_nodes(op="get_attr"):
        readers = {op_name(user) for user in source.users if user not in quantized}
        others.setdefault(id(get_attribute(graph, str(source.target))), set()).update(readers)
    kept: dict[Node, Layer] = {}
    for weight, group in sharing.items():
        table = LOOK_UP in others[weight] or any(layer.looks_up for layer in group)
        reason = None
        if others[weight] and (table or whole):
            reason = f"{', '.join(sorted(others[weight]))} reads its weight too"
        elif table and not whole and len({layer.axis for layer in group}) > 1:
            reason = "its weight is read along two axes, which need scales of their own"
        for layer in group:
            if reason is not None:
                left_out[layer.name] = reason
            else:
                partners = [other for other in group if other is not layer and (whole or other.axis == layer.axis)]
                kept[layer.node] = replace(layer, partners=tuple(partners))
    return [kept[layer.node] for layer in layers if layer.node in kept]
