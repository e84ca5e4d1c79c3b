"""Containers of a model's outputs that need none of the user's classes: records in place of dataclasses and the like.

A captured model must run in a process that never imports the user's code. Outputs that are dataclasses, or any other
registered class that names its parts, become a `Record`, named tuples one with the same fields.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Record(Mapping[str, Any]):
    """Named values, reached as ``r.logits``, ``r["logits"]`` or ``r[0]``; positions leave out what is None.

    Args:
        fields: The values by name, in order.
    """

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            return [value for value in self._fields.values() if value is not None][key]
        return self._fields[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(f"no output named {name!r}; there are: {', '.join(self._fields)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{name}={value!r}' for name, value in self._fields.items())})"


class NamedFields:
    """Marks a named tuple in a stored tree, where its class cannot be named; see `runtime_spec`."""


@lru_cache(maxsize=256)
def _named_tuple(names: tuple[str, ...]) -> type:
    """Return a named tuple class with these fields, always the same one."""
    return namedtuple("Outputs", names)


def register_dataclasses(value: Any) -> None:
    """Register with pytree every dataclass met in `value` that is not, so that `torch.export` can return it."""
    kind = type(value)
    if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(kind)
    for child in _children(value):
        register_dataclasses(child)


def portable_spec(value: Any) -> pytree.TreeSpec:
    """Return the tree of `value` in which no class of the user's is left: records and plain containers only.

    The leaves keep their order.

    Args:
        value: What the user's forward returned; its classes are registered with pytree.
    """
    kind = pytree._get_node_type(value)
    if kind not in pytree.SUPPORTED_NODES:
        return pytree.treespec_leaf()
    children = [portable_spec(child) for child in _children(value)]
    if kind in (tuple, list):
        return pytree.TreeSpec(kind, None, children)
    keys = _keys(value)
    if kind in (dict, OrderedDict):
        return pytree.TreeSpec(kind, keys, children)
    if isinstance(value, defaultdict):
        return pytree.TreeSpec(dict, keys, children)
    if isinstance(value, tuple):
        return pytree.TreeSpec(NamedFields, list(value._fields), children)  # type: ignore[attr-defined]
    names = [str(key) for key in keys]
    empty = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    return pytree.TreeSpec(Record, [names, [name for name in empty if name not in names]], children)


def plain_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return the same tree with records as dicts and named fields as tuples, for readers without this package."""
    children = [plain_spec(child) for child in spec.children()]
    if spec.is_leaf():
        return spec
    if spec.type is Record:
        return pytree.TreeSpec(dict, list(spec.context[0]), children)
    if spec.type is NamedFields:
        return pytree.TreeSpec(tuple, None, children)
    return pytree.TreeSpec(spec.type, spec.context, children)


def runtime_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Return the tree that a running graph puts its outputs into: named tuples instead of their marks."""
    if spec.is_leaf():
        return spec
    children = [runtime_spec(child) for child in spec.children()]
    if spec.type is NamedFields:
        return pytree.TreeSpec(namedtuple, _named_tuple(tuple(spec.context)), children)
    return pytree.TreeSpec(spec.type, spec.context, children)


def leaf_names(spec: pytree.TreeSpec, *, alone: str, prefix: str = "") -> list[str]:
    """Return a dotted name for each leaf of a tree.

    Args:
        spec: The tree.
        alone: The name of a leaf that is the whole tree; positions are joined to it: ``output_0``.
        prefix: The names of the containers around it.
    """
    if spec.is_leaf():
        return [prefix or alone]
    names = []
    if spec.type in (tuple, list):
        keys: list[Any] = list(range(len(spec.children())))
    else:
        keys = list(spec.context[0] if spec.type is Record else spec.context)
    for key, child in zip(keys, spec.children(), strict=True):
        named = f"{prefix}.{key}" if prefix else str(key)
        path = f"{prefix or alone}_{key}" if isinstance(key, int) else named
        names += leaf_names(child, alone=alone, prefix=path)
    return names


def _children(value: Any) -> list[Any]:
    kind = pytree._get_node_type(value)
    if kind not in pytree.SUPPORTED_NODES:
        return []
    return list(pytree.SUPPORTED_NODES[kind].flatten_fn(value)[0])


def _keys(value: Any) -> list[Any]:
    """Return the key of each child of a container that names its parts, positions where it does not."""
    flatten = pytree.SUPPORTED_NODES[pytree._get_node_type(value)].flatten_with_keys_fn
    if flatten is None:
        return [str(index) for index in range(len(_children(value)))]
    keys: Iterable[Any] = (key for key, _ in flatten(value)[0])
    return [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in keys]


def _flatten_record(record: Record) -> tuple[list[Any], list[list[str]]]:
    """Leave out what is None, as dataclasses registered with torch do."""
    given = {name: value for name, value in record.items() if value is not None}
    return list(given.values()), [list(given), [name for name in record if name not in given]]


def _record_keys(record: Record) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[list[str]]]:
    values, context = _flatten_record(record)
    keys: list[tuple[pytree.KeyEntry, Any]] = []
    keys += [(pytree.MappingKey(name), value) for name, value in zip(context[0], values, strict=True)]
    return keys, context


def _make_record(values: Iterable[Any], context: list[list[str]]) -> Record:
    names, empty = context
    return Record(dict(zip(names, values, strict=True)) | dict.fromkeys(empty))


def _no_instance(*_: Any) -> Any:
    raise TypeError("NamedFields only marks a place in a stored tree")


pytree.register_pytree_node(
    Record,
    _flatten_record,
    _make_record,
    serialized_type_name="mil.Record",
    flatten_with_keys_fn=_record_keys,
)
pytree.register_pytree_node(NamedFields, _no_instance, _no_instance, serialized_type_name="mil.NamedFields")
