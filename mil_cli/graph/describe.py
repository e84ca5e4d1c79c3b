"""Describes the tensors that enter and leave an exported program: unique names, dtypes, symbolic sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mil_cli.errors import CaptureError
from mil_cli.graph.program import symbolic_shape
from mil_cli.graph.spec import TensorSpec
from mil_cli.graph.tree import leaf_names


def unique_names(names: Sequence[str], given: Sequence[str] | None, what: str) -> list[str]:
    """Return the given names if they fit, else the found ones; each occurs once."""
    if given is not None:
        if len(given) != len(names) or len(set(given)) != len(given):
            raise CaptureError(
                f"the model has {len(names)} {what} tensors, name each once",
                value=list(given),
                hint=f"they are: {', '.join(names)}",
            )
        return list(given)
    result: list[str] = []
    for name in names:
        unique, count = name, 1
        while unique in result:
            unique, count = f"{name}_{count}", count + 1
        result.append(unique)
    return result


def output_specs(
    program: ExportedProgram,
    outputs: Any,
    tree: pytree.TreeSpec,
    symbols: Mapping[str, str],
    given: Sequence[str] | None,
) -> tuple[list[TensorSpec], dict[int, Any]]:
    """Describe the output tensors, and collect the leaves that are constants."""
    leaves = pytree.tree_leaves(outputs)
    found = leaf_names(tree, alone="output")
    names = unique_names(
        [name for name, leaf in zip(found, leaves, strict=True) if isinstance(leaf, Tensor)], given, "output"
    )
    values = (
        [_meta_value(argument) for argument in program.graph.output_node().args[0][-len(leaves) :]] if leaves else []
    )
    specs: list[TensorSpec] = []
    constants: dict[int, Any] = {}
    remaining = iter(names)
    for index, (leaf, value) in enumerate(zip(leaves, values, strict=True)):
        if not isinstance(leaf, Tensor):
            if leaf is not None and not isinstance(leaf, bool | int | float | str):
                raise CaptureError(
                    f"output {found[index]} is neither a tensor nor a plain constant",
                    value=type(leaf).__name__,
                    hint="return tensors in tuples, lists, dicts or dataclasses",
                )
            constants[index] = leaf
            continue
        sizes = symbolic_shape(value) if isinstance(value, Tensor) else tuple(leaf.shape)
        dynamic = {
            axis: symbols.get(str(size), str(size)) for axis, size in enumerate(sizes) if not isinstance(size, int)
        }
        specs.append(TensorSpec(next(remaining), tuple(leaf.shape), dtype_name(leaf), dynamic))
    return specs, constants


def _meta_value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument


def dtype_name(tensor: Tensor) -> str:
    """Return the short name of a tensor's dtype: ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")
