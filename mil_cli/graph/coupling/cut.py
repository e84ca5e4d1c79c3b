"""Cutting classes out of a graph: smaller weights, buffers and constants, and every size and position rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from mil_cli.errors import ModelError
from mil_cli.graph.coupling.coupling import Coupling, Removed
from mil_cli.graph.coupling.normalise import copy_sharing_weights
from mil_cli.graph.coupling.operators import argument, operator_name
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.rewrites import REWRITES, Edit
from mil_cli.graph.coupling.selection import Masks, empty_axes, keep_masks, kept_count


def cut_graph(
    coupling: Coupling, removed: Removed, *, weights: Callable[[str], torch.Tensor | None] | None = None
) -> GraphModule:
    """Return a new graph module without the removed classes; the analysed one is not changed.

    Args:
        coupling: The analysis.
        removed: By space, the classes to remove; `repair` gives a selection that can be cut.
        weights: Present value of a weight by name, if it is no longer what it was at the analysis; None where it has
            none of that name.

    Raises:
        ModelError: A class cannot be removed, or an axis would become empty.
    """
    _check(coupling, removed)
    masks = keep_masks(coupling, removed)
    for key, axis in empty_axes(masks):
        raise ModelError(
            f"the cut would leave nothing of axis {axis} of {key}", hint="keep at least one class, or call `repair`"
        )
    recording = coupling.recording
    replaced = {
        id(leaf): _cut_tensor(_present(coupling, key, leaf, weights), leaf, masks.get(key, {}))
        for key, leaf in recording.leaves.items()
    }
    module = copy_sharing_weights(coupling.graph, replaced)
    pairs = list(zip(coupling.graph.graph.nodes, module.graph.nodes, strict=True))
    values: dict[str, Any] = {}
    for old, new in pairs:
        _rewrite(old, new, module, coupling, masks, values)
        _refresh_shapes(old, new, coupling, masks)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _check(coupling: Coupling, removed: Removed) -> None:
    for number, classes in removed.items():
        if not 0 <= number < len(coupling.spaces):
            raise ModelError("there is no such space", value=number, hint=f"0 ... {len(coupling.spaces) - 1}")
        space = coupling.spaces[number]
        for label in classes:
            if not 0 <= label < space.size:
                raise ModelError(f"space {number} ({space.origin}) has {space.size} classes", value=label)
            if label in space.frozen:
                raise ModelError(
                    f"class {label} of space {number} ({space.origin}) cannot be cut: {space.frozen[label]}"
                )


def _present(
    coupling: Coupling, key: Key, leaf: torch.Tensor, weights: Callable[[str], torch.Tensor | None] | None
) -> torch.Tensor:
    if weights is None:
        return leaf
    present = weights(coupling.recording.leaf_names[key][0])
    return leaf if present is None or present.shape != leaf.shape else present


def _cut_tensor(present: torch.Tensor, leaf: torch.Tensor, masks: dict[int, Any]) -> torch.Tensor:
    result = present.detach()
    for axis, mask in masks.items():
        result = result.index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
    result = result.clone() if not masks else result
    if isinstance(leaf, torch.nn.Parameter):
        return torch.nn.Parameter(result, requires_grad=present.requires_grad)
    return result


def _rewrite(
    old: Node, new: Node, module: GraphModule, coupling: Coupling, masks: Masks, values: dict[str, Any]
) -> None:
    recording = coupling.recording
    name = operator_name(old)
    if name == "sym_size":
        data = argument(old, "self")
        key = recording.key(data)
        axis = argument(old, "dim") % len(recording.shapes[key])
        values[old.name] = kept_count(masks, key, axis, recording.shapes[key][axis])
    elif old.op == "call_function" and isinstance(recording.values.get(old.name), int):
        values[old.name] = _recomputed(old, recording.values, values)
    elif name == "_assert_tensor_metadata":
        module.graph.erase_node(new)
    elif name in REWRITES:
        REWRITES[name](Edit(old=old, new=new, module=module, recording=recording, masks=masks, values=values))


def _refresh_shapes(old: Node, new: Node, coupling: Coupling, masks: Masks) -> None:
    """Give the shapes that the capture noted beside a node (``meta["val"]``) their new sizes."""
    noted = new.meta.get("val")
    recording = coupling.recording
    if isinstance(noted, torch.Tensor):
        new.meta["val"] = _resized(noted, masks.get(recording.key(old), {}))
    elif isinstance(noted, tuple | list):
        new.meta["val"] = type(noted)(
            _resized(part, masks.get(f"{old.name}#{number}", {})) if isinstance(part, torch.Tensor) else part
            for number, part in enumerate(noted)
        )


def _resized(noted: torch.Tensor, masks: dict[int, Any]) -> torch.Tensor:
    if not masks:
        return noted
    shape: list[Any] = list(noted.shape)
    for axis, mask in masks.items():
        kept = int(mask.sum())
        shape[axis] = kept if isinstance(shape[axis], int) else shape[axis] * kept // len(mask)
    return noted.new_empty(shape)


def _recomputed(node: Node, before: dict[str, Any], after: dict[str, Any]) -> Any:
    """Return the integer that a node computes once the sizes that it depends on are cut."""

    def known(value: Any) -> Any:
        return after.get(value.name, before.get(value.name)) if isinstance(value, Node) else value

    operands = [known(operand) for operand in node.args]
    if node.kwargs or any(not isinstance(operand, int | float) for operand in operands):
        return before[node.name]
    return node.target(*operands)  # type: ignore[operator]
