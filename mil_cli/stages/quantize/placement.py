"""Decides which values of a graph are quantized, so that onnxruntime can run its layers on integer kernels.

Two policies, measured on onnxruntime:

* ``cnn``: inputs and outputs of convolutions, and both sides of additions, concatenations and pooling between them.
  Quantizing the inputs of convolutions alone leaves most of them unfused, and gains nothing.
* ``transformer``: inputs of linear layers (products with a weight) only; what lies between them stays float, which is
  both faster and more accurate there. Convolutions still get both sides: without their output they would run in float.

Tables of embeddings are quantized by either: codes are looked up, and only these become floats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mil_cli.errors import StageError
from mil_cli.graph.nodes import calls, get_argument, op_name
from mil_cli.graph.segment import overwritten
from mil_cli.stages.quantize.layers import CONVOLUTIONS, NEVER, OVERWRITTEN, Layer, find_layers
from mil_cli.stages.quantize.passing import after_rectifier, backwards, comes_from_any, goes_to_output, readers

Policy = Literal["cnn", "transformer"]

_JOINS = frozenset({"add", "cat", "avg_pool2d", "adaptive_avg_pool2d", "mean"})
_SHARES = frozenset({"softmax", "_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "mm", "einsum"})
_BESIDE_SHARES = frozenset({"to", "_to_copy", "type_as", "expand", "mul", "where", "masked_fill", "nan_to_num"})
"""What may lie between the shares of attention and their product with what is attended to, beside views and dropout."""
_SILENT = "its input was nothing but zeros in calibration"

Narrow = Callable[[Layer], bool]
"""Whether a layer reads its input in fewer bits than the rest of the graph has."""


@dataclass
class Placement:
    """Which values of a graph get quantizers.

    Attributes:
        policy: The policy that decided.
        layers: The layers whose weights are quantized, in order of execution.
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

    @property
    def products(self) -> list[Layer]:
        """The layers that become integer kernels: all but those that look rows up in tables."""
        return [layer for layer in self.layers if not layer.looks_up]

    def owner(self, value: Node) -> Node:
        """Return the owned value whose scale and zero point serve a quantized value."""
        return self.shared.get(value, value)

    def facts(self) -> dict[str, object]:
        """Return what the report shows."""
        return {
            "policy": self.policy,
            "quantized_layers": len(self.products),
            "quantized_tables": len(self.layers) - len(self.products),
            "quantized_values": len({*self.owned, *self.narrow}),
            "kept_float": self.kept_float,
        }


def choose_policy(graph: GraphModule) -> Policy:
    """Return the policy that fits a graph: ``transformer`` if it has attention or no convolution, else ``cnn``.

    A softmax alone is no attention: it may make probabilities of scores, or weigh channels.
    """
    nodes = list(calls(graph))
    attends = any(
        op_name(node) == "scaled_dot_product_attention" or (op_name(node) in _SHARES and _is_multiplied(node))
        for node in nodes
    )
    return "cnn" if not attends and any(op_name(node) in CONVOLUTIONS for node in nodes) else "transformer"


def _is_multiplied(shares: Node) -> bool:
    """Whether a softmax goes into a product of matrices."""
    return any(
        op_name(reader) in _PRODUCTS or (op_name(reader) in _BESIDE_SHARES and _is_multiplied(reader))
        for reader in readers(shares)
    )


def place(
    graph: GraphModule,
    *,
    policy: Policy,
    skip: Sequence[str] = (),
    narrow: Narrow | None = None,
    silent: Collection[Node] = (),
    never: Mapping[str, str] = NEVER,
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
        never: Operator -> why it stays float.

    Raises:
        StageError: A pattern of `skip` fits no layer.
    """
    apart = {**dict.fromkeys(overwritten(graph), OVERWRITTEN), **dict.fromkeys(silent, _SILENT)}
    found = find_layers(graph, skip=skip, apart=apart, never=never)
    placement = Placement(policy, found.layers, kept_float=found.left_out, names=found.names)
    wanted: dict[Node, set[Node]] = {}
    for layer in placement.products:
        readers = placement.narrow if narrow is not None and narrow(layer) else wanted
        readers.setdefault(layer.source, set()).add(layer.node)
        if op_name(layer.node) in CONVOLUTIONS:
            placement.exclusive.add(after_rectifier(layer.node))
    placement.exclusive = {node for node in placement.exclusive if not comes_from_any(node, apart)}
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
    at_outputs = [node for node in [*placement.owned, *placement.shared] if goes_to_output(node)]
    placement.edges = {placement.owner(node) for node in [*at_edges, *at_outputs]}
    return placement


def place_any(
    graph: GraphModule,
    *,
    policy: Literal["auto"] | Policy,
    skip: Sequence[str] = (),
    narrow: Narrow | None = None,
    silent: Collection[Node] = (),
    never: Mapping[str, str] = NEVER,
) -> Placement:
    """Decide as `place` does, by the policy that fits where it is ``auto``.

    Raises:
        StageError: No layer is left to quantize, or a pattern of `skip` fits none.
    """
    chosen = choose_policy(graph) if policy == "auto" else policy
    placement = place(graph, policy=chosen, skip=skip, narrow=narrow, silent=silent, never=never)
    if not placement.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in placement.kept_float.items())
        raise StageError("no layer of the model can be quantized", value=reasons or "it has no layer with weights")
    return placement


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
            if any(comes_from_any(value, apart) for value in (*inputs, after)):
                continue
            if any(comes_from_any(source, placement.exclusive) for source in inputs):
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


def _root(node: Node, placement: Placement) -> Node | None:
    """Return the owned value whose codes a value passes on, or None if it needs a range of its own."""
    for step in backwards(node):
        if step is node:
            continue
        if step in placement.shared:
            return placement.shared[step]
        if step in placement.owned:
            return step
    return None


def _only_goes_out(node: Node) -> bool:
    """Whether nobody but the caller of the model reads a value: then 8 bits would only cost accuracy."""
    return all(user.op == "output" for user in node.users)
