"""Follows values of a graph through the operators that pass them on as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch.fx import Node

from mil_cli.graph.nodes import op_name

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


def backwards(node: Node) -> Iterator[Node]:
    """Yield a value and those before it that it takes its values from."""
    yield node
    while op_name(node) in _PASSING and isinstance(node.args[0], Node):
        node = node.args[0]
        yield node


def origin(value: Node) -> Node:
    """Return where a value has its values from, which are passed on to it or its own."""
    *_, first = backwards(value)
    return first


def readers(value: Node) -> Iterator[Node]:
    """Yield those that read a value, or what passes its values on."""
    for user in value.users:
        if op_name(user) in _PASSING:
            yield from readers(user)
        else:
            yield user


def comes_from_any(node: Node, values: Collection[Node]) -> bool:
    """Whether a value is one of some, or has its values from one."""
    return any(step in values for step in backwards(node))


def comes_from_input(node: Node) -> bool:
    """Whether a value has its values from an input of the model."""
    return any(step.op == "placeholder" for step in backwards(node))


def goes_to_output(node: Node) -> bool:
    """Whether a value gets to an output of the model through what only passes on, rectifies or finishes values."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            if user not in seen and op_name(user) in _PASSING | _RECTIFIERS | _FINISHING:
                seen.add(user)
                pending.append(user)
    return False


def after_rectifier(node: Node) -> Node:
    """Return the rectifier that is all that follows a node, else the node: onnxruntime fuses the two."""
    if len(node.users) == 1:
        user = next(iter(node.users))
        if op_name(user) in _RECTIFIERS and user.args[0] is node:
            return user
    return node
