"""Decides which values of a graph are quantized, so that onnxruntime can run its layers on integer kernels.

Two policies, measured on onnxruntime:

* ``cnn``: inputs and outputs of convolutions, and both sides of additions, concatenations and pooling between them.
  Quantizing the inputs of convolutions alone leaves most of them unfused, and gains nothing.
* ``transformer``: inputs of linear layers (products with a weight) only; what lies between them stays float, which is
  both faster and more accurate there. Convolutions still get both sides: without their output they would run in float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.errors import StageError, did_you_mean
from mil_cli.graph.nodes import calls, get_argument, get_attribute, module_path, op_name
from mil_cli.graph.segment import overwritten

Policy = Literal["cnn", "transformer"]

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_PRODUCTS = {"linear": ("input", "weight", 0), "matmul": ("self", "other", -1), "mm": ("self", "mat2", 1)}
"""Operator -> its activation, its weight, and the weight's axis of output channels."""

_JOINS = frozenset({"add", "cat", "avg_pool2d", "adaptive_avg_pool2d", "mean"})
_RECTIFIERS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min"})
_PASSING = frozenset(
    {
        *("max_pool1d", "max_pool2d", "max_pool3d", "view", "reshape", "flatten", "unflatten", "permute", "transpose"),
        *("squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach", "dropout", "feature_dropout", "select"),
        *("slice", "movedim", "upsample_nearest2d"),
    }
)
"""Operators whose outputs are some of their input's values: the same codes serve both."""

_FINISHING = frozenset(
    {
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "log_sigmoid", "tanh", "hardsigmoid"),
        *("pixel_shuffle", "upsample_bilinear2d", "upsample_bicubic2d"),
    }
)
"""Operators that bring what a last layer gives into the form of an output."""

NEVER = {
    **dict.fromkeys(_TRANSPOSED, "onnxruntime has no integer kernel for transposed convolutions"),
    "embedding": "a table look-up computes nothing",
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
_ATTENTION = frozenset({"scaled_dot_product_attention", "softmax", "_softmax"})

OVERWRITTEN = "an operator in place changes its input after it was made"
_SILENT = "its input was nothing but zeros in calibration"


@dataclass(frozen=True)
class Layer:
    """A layer whose weight is quantized; where its input is too it will run on an integer kernel.

    Attributes:
        node: The convolution, product or look-up.
        name: The dotted path of its module, or the name of its weight or node where there is none.
        alias: The name of its node, which settings may use too; its `name` again where that is the path of a module.
        source: The node of its activation.
        weight: The node that reads its weight.
        axis: The weight's axis of output channels.
        bias: The node that reads its bias, or None.
        edge: Whether it is the first layer after an input, or the last before an output.
    """

    node: Node
    name: str
    alias: str
    source: Node
    weight: Node
    axis: int
    bias: Node | None
    edge: bool


Narrow = Callable[[Layer], bool]
"""Whether a layer reads its input in fewer bits than the rest of the graph has."""


@dataclass
class Placement:
    """Which values of a graph get quantizers.

    Attributes:
        policy: The policy that decided.
        layers: The layers that become integer kernels, in order of execution.
        owned: The values that get a quantizer with a range of their own, in order of execution.
        shared: Value -> the owned value whose scale and zero point serve it too.
        exclusive: The values that everyone reads quantized, because integer kernels make them.
        readers: For every other quantized value, who reads it quantized.
        edges: The owned values that a first or last layer reads, or that are outputs of the model themselves.
        narrow: Value -> the layers that read it in fewer bits than the rest of the graph has.
        kept_float: Layer name -> why it stays float.
        names: Alias -> layer name, of all that can be named in settings, quantized or float.
    """

    policy: Policy
    layers: list[Layer] = field(default_factory=list)
    owned: list[Node] = field(default_factory=list)
    shared: dict[Node, Node] = field(default_factory=dict)
    exclusive: set[Node] = field(default_factory=set)
    readers: dict[Node, set[Node]] = field(default_factory=dict)
    edges: set[Node] = field(default_factory=set)
    narrow: dict[Node, set[Node]] = field(default_factory=dict)
    kept_float: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def owner(self, value: Node) -> Node:
        """Return the owned value whose scale and zero point serve a quantized value."""
        return self.shared.get(value, value)

    def facts(self) -> dict[str, object]:
        """Return what the report shows."""
        return {
            "policy": self.policy,
            "quantized_layers": len(self.layers),
            "quantized_values": len({*self.owned, *self.narrow}),
            "kept_float": self.kept_float,
        }


def choose_policy(graph: GraphModule) -> Policy:
    """Return the policy that fits a graph: ``transformer`` if it has attention or no convolution, else ``cnn``."""
    names = {op_name(node) for node in calls(graph)}
    if names & _CONVOLUTIONS and not names & _ATTENTION:
        return "cnn"
    return "transformer"


def place(
    graph: GraphModule,
    *,
    policy: Policy,
    skip: Sequence[str] = (),
    narrow: Narrow | None = None,
    silent: Collection[Node] = (),
) -> Placement:
    """Decide which values of a graph are quantized.

    Layers that are `narrow` read their inputs through quantizers of their own, of few bits; what is added, joined or
    pooled keeps more, for errors of residual sums would pile up.

    Args:
        graph: A graph in evaluation mode, batch norms folded, in-place operators replaced; it is not changed.
        policy: The policy.
        skip: Patterns of layers to leave float: a module's path (with all below it), a node's name, or either with
            ``*`` and ``?``.
        narrow: Says which layers read fewer bits than the rest of the graph has; None: no layer does.
        silent: Values of which nothing but zeros was seen, which is no range; they and their readers stay float, as do
            values that an operator in place changes later.

    Raises:
        StageError: A pattern of `skip` fits no layer.
    """
    apart = {**dict.fromkeys(overwritten(graph), OVERWRITTEN), **dict.fromkeys(silent, _SILENT)}
    found = find_layers(graph, skip=skip, apart=apart)
    placement = Placement(policy, found.layers, kept_float=found.left_out, names=found.names)
    wanted: dict[Node, set[Node]] = {}
    for layer in placement.layers:
        readers = placement.narrow if narrow is not None and narrow(layer) else wanted
        readers.setdefault(layer.source, set()).add(layer.node)
        if op_name(layer.node) in _CONVOLUTIONS:
            placement.exclusive.add(after_rectifier(layer.node))
    placement.exclusive = {node for node in placement.exclusive if not _is_any(node, apart)}
    if policy == "cnn":
        _place_joins(graph, placement, wanted, apart)
    placement.exclusive -= {node for node, layers in placement.narrow.items() if set(node.users) <= layers}
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    for node in sorted({*wanted, *placement.exclusive}, key=order.__getitem__):
        root = _root(node, placement)
        if root is None:
            placement.owned.append(node)
        else:
            placement.shared[node] = root
        if node not in placement.exclusive:
            placement.readers[node] = wanted[node]
    at_edges = [layer.source for layer in placement.layers if layer.edge]
    at_outputs = [node for node in [*placement.owned, *placement.shared] if _goes_to_output(node)]
    placement.edges = {placement.owner(node) for node in [*at_edges, *at_outputs]}
    return placement


def place_any(
    graph: GraphModule,
    *,
    policy: Literal["auto"] | Policy,
    skip: Sequence[str] = (),
    narrow: Narrow | None = None,
    silent: Collection[Node] = (),
) -> Placement:
    """Decide as `place` does, by the policy that fits where it is ``auto``.

    Raises:
        StageError: No layer is left to quantize, or a pattern of `skip` fits none.
    """
    chosen = choose_policy(graph) if policy == "auto" else policy
    placement = place(graph, policy=chosen, skip=skip, narrow=narrow, silent=silent)
    if not placement.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in placement.kept_float.items())
        raise StageError("no layer of the model can be quantized", value=reasons or "it has no layer with weights")
    return placement


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
) -> FoundLayers:
    """Find the layers with weights.

    Args:
        graph: The graph.
        skip: Patterns of layers to leave out; see `place`.
        apart: Value that must stay float -> why; layers that read it are left out. None: all can be quantized.
        never: Operator -> why it is left out.

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
        if patterns:
            left_out[name] = f"skipped by '{min(patterns)}'"
        elif op_name(node) in never:
            left_out[name] = never[op_name(node)]
        elif isinstance(found, str):
            left_out[name] = found
        elif found is not None and _is_any(found[0], apart):
            left_out[name] = next(apart[step] for step in _backwards(found[0]) if step in apart)
        elif found is not None:
            source, weight, axis, bias = found
            edge = _comes_from_input(source) or _goes_to_output(node)
            layers.append(Layer(node, name, alias, source, weight, axis, bias, edge))
    if unused:
        pattern = min(unused)
        hint = did_you_mean(pattern, names.values())
        raise StageError(f"'{pattern}' fits no layer", where="skip", value=list(skip), hint=hint)
    return FoundLayers(layers, left_out, names)


def _weighted(graph: GraphModule, node: Node) -> tuple[Node, Node, int, Node | None] | str | None:
    """Return a layer's activation, weight, axis and bias; why it cannot be quantized; or None if it is no layer."""
    name = op_name(node)
    if name in _CONVOLUTIONS:
        source, weight, axis = get_argument(node, "input"), get_argument(node, "weight"), 0
    elif name in _TRANSPOSED:
        source, weight, axis = get_argument(node, "input"), get_argument(node, "weight"), 1
    elif name == "embedding":
        source, weight, axis = get_argument(node, "indices"), get_argument(node, "weight"), 0
    elif name in _PRODUCTS:
        source_name, weight_name, axis = _PRODUCTS[name]
        source, weight = get_argument(node, source_name), get_argument(node, weight_name)
    else:
        return None
    if weight.op != "get_attr":
        return None if name in ("matmul", "mm") else "its weight is computed in the graph"
    value = get_attribute(graph, str(weight.target))
    if source.op == "get_attr":
        return "its input is a constant"
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return "its weight is not float32"
    if name == "matmul" and value.ndim != 2:
        return "only two-dimensional weights become integer kernels"
    bias = get_argument(node, "bias") if name not in ("matmul", "mm", "embedding") else None
    return source, weight, axis % value.ndim, bias if isinstance(bias, Node) and bias.op == "get_attr" else None


def _layer_name(graph: GraphModule, node: Node, found: object) -> str:
    if isinstance(found, tuple):
        owner, _, leaf = str(found[1].target).rpartition(".")
        return owner if leaf == "weight" and owner else str(found[1].target)
    path = module_path(node)
    return f"{path}.{node.name}" if path else node.name


def matches(pattern: str, layer: str, alias: str) -> bool:
    """Whether a pattern is for a layer of such a name and such an alias."""
    return fnmatchcase(layer, pattern) or fnmatchcase(alias, pattern) or layer.startswith(f"{pattern}.")


def after_rectifier(node: Node) -> Node:
    """Return the rectifier that is all that follows a node, else the node: onnxruntime fuses the two."""
    if len(node.users) == 1:
        user = next(iter(node.users))
        if op_name(user) in _RECTIFIERS and user.args[0] is node:
            return user
    return node


def _place_joins(
    graph: GraphModule, placement: Placement, wanted: dict[Node, set[Node]], apart: Collection[Node]
) -> None:
    """Quantize both sides of joins whose inputs come from integer kernels, until nothing changes."""
    joins = list(filter(is_join, calls(graph)))
    changed = True
    while changed:
        changed = False
        for node in joins:
            inputs = join_inputs(node)
            after = after_rectifier(node)
            if after in placement.exclusive or not inputs or _only_goes_out(after):
                continue
            if any(_is_any(value, apart) for value in (*inputs, after)):
                continue
            if any(_is_any(source, placement.exclusive) for source in inputs):
                for source in inputs:
                    wanted.setdefault(source, set()).add(node)
                placement.exclusive.add(after)
                changed = True


def is_join(node: Node) -> bool:
    """Whether a call can run on integers without a weight of its own."""
    return op_name(node) in _JOINS


def join_inputs(node: Node) -> list[Node]:
    """Return the activations that a join reads; none if one of its inputs is no activation, or none in float32."""
    if op_name(node) == "cat":
        candidates = list(get_argument(node, "tensors"))
    elif op_name(node) == "add":
        candidates = [get_argument(node, "self"), get_argument(node, "other")]
        if get_argument(node, "alpha") != 1:
            return []
    else:
        candidates = [node.args[0]]
    return candidates if all(_is_activation(source) for source in candidates) else []


def _is_activation(source: object) -> bool:
    if not isinstance(source, Node) or source.op not in ("call_function", "placeholder"):
        return False
    value = source.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _is_any(node: Node, values: Collection[Node]) -> bool:
    """Whether a value is one of some, or has its values from one."""
    return any(step in values for step in _backwards(node))


def _root(node: Node, placement: Placement) -> Node | None:
    """Return the owned value whose codes a value passes on, or None if it needs a range of its own."""
    for step in _backwards(node):
        if step is node:
            continue
        if step in placement.shared:
            return placement.shared[step]
        if step in placement.owned:
            return step
    return None


def _backwards(node: Node) -> Iterator[Node]:
    """Yield a value and those before it that it takes its values from."""
    yield node
    while op_name(node) in _PASSING and isinstance(node.args[0], Node):
        node = node.args[0]
        yield node


def origin(value: Node) -> Node:
    """Return where a value has its values from, which are passed on to it or its own."""
    *_, first = _backwards(value)
    return first


def readers(value: Node) -> Iterator[Node]:
    """Yield those that read a value, or what passes its values on."""
    for user in value.users:
        if op_name(user) in _PASSING:
            yield from readers(user)
        else:
            yield user


def _comes_from_input(node: Node) -> bool:
    return any(step.op == "placeholder" for step in _backwards(node))


def _goes_to_output(node: Node) -> bool:
    return _reaches(node, lambda user: user.op == "output")


def _reaches(node: Node, goal: Callable[[Node], bool]) -> bool:
    """Whether a value gets to a node that fits, through nothing but what passes on, rectifies or finishes values."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if goal(user):
                return True
            if user not in seen and op_name(user) in _PASSING | _RECTIFIERS | _FINISHING:
                seen.add(user)
                pending.append(user)
    return False


def _only_goes_out(node: Node) -> bool:
    """Whether nobody but the caller of the model reads a value: then 8 bits would only cost accuracy."""
    return all(user.op == "output" for user in node.users)
