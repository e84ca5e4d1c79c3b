"""Small helpers on the nodes of a captured graph: op names, arguments, attributes, and where a node came from."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
_CALL_COUNT = re.compile(r"@\d+")
_ANNOTATION = "mil"


def op_name(node: Node) -> str:
    """Return the short name of what a node calls: ``conv2d``, ``linear``, ``batch_norm``, ``mul``, ``quantize_affine``.

    In-place variants keep their underscore (``relu_``); anything that is not a call gives the node's op
    (``placeholder``, ``get_attr``, ``output``).
    """
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def namespace(node: Node) -> str:
    """Return the operator namespace of a node (``aten``, ``mil``), or ``""`` for Python functions."""
    target = node.target
    return target.namespace if isinstance(target, torch._ops.OpOverload) else ""


def calls(graph: GraphModule) -> Iterator[Node]:
    """Yield the nodes that call a function, in order of execution."""
    return (node for node in graph.graph.nodes if node.op == "call_function")


def schema_index(node: Node, name: str) -> int | None:
    """Return the position of the argument `name` in the schema of the operator that `node` calls, else None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return names.index(name) if name in names else None


def get_argument(node: Node, name: str) -> Any:
    """Return the value of the operator's argument `name`, its default where the node leaves it out.

    Raises:
        KeyError: If the operator has no such argument.
    """
    index = schema_index(node, name)
    if index is None:
        raise KeyError(name)
    if name in node.kwargs:
        return node.kwargs[name]
    if index < len(node.args):
        return node.args[index]
    return node.target._schema.arguments[index].default_value  # type: ignore[union-attr]


def set_argument(node: Node, name: str, value: Any) -> None:
    """Set the operator's argument `name`; a value that equals the schema's default is left out where it can be.

    Raises:
        KeyError: If the operator has no such argument.
    """
    index = schema_index(node, name)
    if index is None:
        raise KeyError(name)
    if index < len(node.args):
        node.update_arg(index, value)
        return
    kwargs = dict(node.kwargs)
    default = node.target._schema.arguments[index].default_value  # type: ignore[union-attr]
    if not isinstance(value, Node) and value == default:
        kwargs.pop(name, None)
    else:
        kwargs[name] = value
    node.kwargs = kwargs


def get_attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path: ``get_attribute(graph, "layer1.0.conv1.weight")``.

    Raises:
        AttributeError: If a part of the path does not exist.
    """
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def has_attribute(graph: nn.Module, name: str) -> bool:
    """Whether a graph module has an attribute of this dotted name."""
    try:
        get_attribute(graph, name)
    except AttributeError:
        return False
    return True


def meta_like(node: Node) -> dict[str, Any]:
    """Return the metadata of a node that stands for another: its example value, and where it came from."""
    return {key: node.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in node.meta}


def free_attribute(graph: nn.Module, wanted: str) -> str:
    """Return a dotted name that no attribute has: the one wanted, or that with a number behind it."""
    name, number = wanted, 0
    while has_attribute(graph, name):
        number += 1
        name = f"{wanted}_{number}"
    return name


def set_attribute(module: nn.Module, path: str, value: Any, *, persistent: bool = True) -> None:
    """Set the attribute at a dotted path, making submodules on the way.

    A `torch.nn.Parameter` becomes a parameter, another tensor a buffer (`persistent` says whether it is in the
    state dict), anything else a plain attribute.
    """
    owner = module
    *parents, leaf = path.split(".")
    for part in parents:
        child = owner._modules.get(part)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    for table in (owner._parameters, owner._buffers, owner.__dict__):
        table.pop(leaf, None)
    owner._non_persistent_buffers_set.discard(leaf)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    elif isinstance(value, Tensor):
        owner.register_buffer(leaf, value, persistent=persistent)
    else:
        setattr(owner, leaf, value)


def annotate(node: Node, key: str, value: Any) -> None:
    """Put a JSON-able note on a node; None removes it. Notes survive cloning, re-export and archives.

    Copies of a graph share the node's metadata until one of them writes, so nothing is changed in place.
    """
    custom = dict(node.meta.get("custom", {}))
    notes = {name: note for name, note in custom.get(_ANNOTATION, {}).items() if name != key}
    if value is not None:
        notes[key] = value
    custom[_ANNOTATION] = notes
    if not notes:
        del custom[_ANNOTATION]
    node.meta["custom"] = custom


def read_annotation(node: Node, key: str) -> Any:
    """Return one of our notes on a node, or None, without changing the node."""
    return node.meta.get("custom", {}).get(_ANNOTATION, {}).get(key)


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Return ``(path, class name)`` of the module calls that a node ran in, outermost first; the root is ``""``."""
    stack = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        stack.append((_CALL_COUNT.sub("", path), name))
    return stack


def module_path(node: Node) -> str:
    """Return the dotted path of the innermost user module that a node ran in (``""`` for the root or unknown)."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def source_line(node: Node) -> str | None:
    """Return ``file:line`` of the user's own code that made a node, or None where it is not known."""
    return user_frame(node.meta.get("stack_trace") or "")


def user_frame(trace: str) -> str | None:
    """Return ``file:line`` of the innermost frame of a textual stack trace that is not in an installed package."""
    frames = [(match["file"], match["line"]) for match in _FRAME.finditer(trace)]
    for file, line in reversed(frames):
        if is_user_file(file):
            return f"{file}:{line}"
    return None


def is_user_file(file: str) -> bool:
    """Whether a source file belongs to the user: not torch, not an installed package, not the standard library."""
    path = Path(file)
    if file.startswith("<") or path.is_relative_to(Path(torch.__file__).parent):
        return False
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    if path.is_relative_to(Path(contextlib.__file__).parent):
        return False
    return not path.is_relative_to(Path(__file__).parent)
