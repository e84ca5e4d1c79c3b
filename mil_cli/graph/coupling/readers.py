"""Where a class can be scaled by a factor on weights alone, so that factor 0 is what a cut leaves of it."""

from __future__ import annotations

from torch.fx import Node

from mil_cli.graph.coupling.coupling import Coupling, Member, Space
from mil_cli.graph.nodes import get_argument, op_name

_READ_AXIS = {
    "linear": 1,
    **{f"conv{n}d": 1 for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": 0 for n in (1, 2, 3)},
}
"""The axis of a layer's weight along which it reads its input's channels."""

_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear")


def scaling_members(coupling: Coupling, space: Space) -> list[Member]:
    """Return the axes of parameters that a factor for each class of a space goes on.

    Those along which layers read the classes: a factor there is one on what the layer reads, whatever norms and
    rectifiers stand before it, so that factor 0 takes the class from the layer, and no norm's statistics feel it.
    Where something else reads the classes too (the product of queries and keys, a sum over channels) all trainable
    members are returned: at 0 the class is zero from where it is made.

    Args:
        coupling: The analysis.
        space: One of its spaces.
    """
    recording = coupling.recording
    trainable = [member for member in space.members if member.trainable]
    by_name = {(name, member.axis): member for member in trainable for name in member.names}
    readers: dict[Member, None] = {}
    for node in coupling.graph.graph.nodes:
        if node.op != "call_function":
            continue
        reader = _reader(node, by_name)
        if reader is not None:
            readers[reader] = None
            continue
        keys = recording.outputs.get(node.name) or [recording.key(node)]
        if _multiplies(coupling, space, node):
            return trainable
        reads = any(used.op != "get_attr" and recording.key(used) in space.labels for used in node.all_input_nodes)
        if reads and not any(key in space.labels for key in keys) and _gives_tensors(coupling, node):
            return trainable
    return list(readers) or trainable


def _reader(node: Node, by_name: dict[tuple[str, int], Member]) -> Member | None:
    if op_name(node) not in _READ_AXIS:
        return None
    weight = get_argument(node, "weight")
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    return by_name.get((str(weight.target), _READ_AXIS[op_name(node)]))


def _multiplies(coupling: Coupling, space: Space, node: Node) -> bool:
    """Whether a call may sum over a space's classes that it takes from two values, even if its output has them too."""
    name, recording = op_name(node), coupling.recording
    if name not in _PRODUCTS and "attention" not in name:
        return False
    keys = [recording.key(used) for used in node.all_input_nodes if used.op != "get_attr"]
    return any(axis >= len(recording.shapes[key]) - 2 for key in keys for axis in space.labels.get(key, ()))


def _gives_tensors(coupling: Coupling, node: Node) -> bool:
    """Whether a call gives a tensor; sizes of a tensor do not read its channels."""
    recording = coupling.recording
    return bool(recording.outputs.get(node.name)) or recording.key(node) in recording.shapes
