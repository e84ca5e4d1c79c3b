"""Cutting classes out of a graph: smaller weights, buffers and constants, and every size and position rewritten.

The smaller weights are either copies (`cut_graph`: a model of its own) or views of the weights of another graph
(`shared_cut`: a candidate of a supernet, which trains the weights that it shares).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node

from mil_cli.errors import ModelError
from mil_cli.graph.branches import outline_branches, restore_branches
from mil_cli.graph.coupling.coupling import Coupling, Removed
from mil_cli.graph.coupling.draft import draft_of
from mil_cli.graph.coupling.operators import Graphed, add_buffer, argument, operator_name
from mil_cli.graph.coupling.record import Key
from mil_cli.graph.coupling.rewrites import REWRITES, Edit
from mil_cli.graph.coupling.selection import Mask, Masks, empty_axes, keep_masks, kept_count
from mil_cli.graph.nodes import get_attribute


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
    masks = _checked_masks(coupling, removed)
    recording = coupling.recording
    replaced = {
        id(leaf): _cut_tensor(_present(coupling, key, leaf, weights), leaf, masks.get(key, {}))
        for key, leaf in recording.leaves.items()
    }
    module = draft_of(coupling.graph, replaced)
    pairs = list(zip(coupling.graph.graph.nodes, module.graph.nodes, strict=True))
    values: dict[str, Any] = {}
    for old, new in pairs:
        _rewrite(old, new, module, coupling, masks, values)
        _refresh_shapes(old, new, coupling, masks)
    module.graph.eliminate_dead_code()
    restore_branches(module)
    module.graph.lint()
    return module.compiled()


def shared_cut(
    coupling: Coupling,
    removed: Removed,
    weights: GraphModule,
    *,
    edit: Callable[[Graph, Mapping[str, Node]], None] = lambda graph, copies: None,
) -> GraphModule:
    """Return the cut graph over views of the weights of another graph module: its gradients reach those weights.

    Where an axis keeps one run of entries its view is a slice; where it keeps several (the parts of a fused query, key
    and value weight) they are gathered. It holds no weights of its own, computes to the bit what the cut graph does
    (with gradients on: torch chooses some kernels by whether a weight needs one), and is made in milliseconds: shapes
    noted beside nodes (``meta["val"]``) stay those of the whole graph.

    Args:
        coupling: The analysis.
        removed: By space, the classes to remove; `repair` gives a selection that can be cut.
        weights: Has the weights by name: a graph module with the analysed one's names and shapes.
        edit: Changes the new graph before its code is made; it is given the new nodes by the analysed ones' names.

    Raises:
        ModelError: A class cannot be removed, or an axis would become empty.
    """
    masks = _checked_masks(coupling, removed)
    source = coupling.graph.graph
    copies: dict[Node, Node] = {}
    scratch = _Scratch(Graph())
    graph = scratch.graph
    graph.output(graph.graph_copy(source, copies))
    graph.set_codegen(copy.copy(source._codegen))
    attributes: dict[str, Any] = {}
    for old, new in copies.items():
        if old.op == "get_attr":
            attributes[str(old.target)] = _shared_leaf(coupling, old, weights)
            _insert_views(scratch, new, masks.get(coupling.recording.key(old), {}))
    values: dict[str, Any] = {}
    for old, new in copies.items():
        _rewrite(old, new, scratch, coupling, masks, values)
    edit(graph, {old.name: new for old, new in copies.items()})
    graph.eliminate_dead_code()
    device = next((value.device for value in weights.parameters()), torch.device("cpu"))
    attributes.update({name: buffer.to(device) for name, buffer in scratch.named_buffers()})
    attributes.update(outline_branches(graph, attributes.__getitem__))
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    return GraphModule({name: attributes[name] for name in used}, graph)


class _Scratch(torch.nn.Module):
    """Holds a graph without code while it is edited, and the constants that the edits add."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph


def _shared_leaf(coupling: Coupling, node: Node, weights: GraphModule) -> Any:
    leaf = coupling.recording.leaves.get(coupling.recording.key(node))
    if leaf is None:
        return get_attribute(coupling.graph, str(node.target))
    shared = named_tensor(weights, coupling.recording.leaf_names[coupling.recording.key(node)][0])
    return leaf if shared is None or shared.shape != leaf.shape else shared


def _insert_views(scratch: _Scratch, leaf: Node, masks: Mapping[int, Mask]) -> None:
    """Let all that read a leaf read what its masks keep of it."""
    users = list(leaf.users)
    view = leaf
    for axis, mask in masks.items():
        kept = np.flatnonzero(mask)
        first, end = int(kept[0]), int(kept[-1]) + 1
        with scratch.graph.inserting_after(view):
            if end - first == len(kept):
                view = scratch.graph.call_function(torch.ops.aten.slice.Tensor, (view, axis, first, end))
                continue
            index = add_buffer(scratch, scratch.graph, "_kept", torch.from_numpy(kept))
        with scratch.graph.inserting_after(index):
            view = scratch.graph.call_function(torch.ops.aten.index_select.default, (view, axis, index))
    if any(axis > 0 for axis in masks):
        # On strided weights a kernel may add in another order than on the cut ones; most would copy them anyway.
        with scratch.graph.inserting_after(view):
            view = scratch.graph.call_function(torch.ops.aten.contiguous.default, (view,))
    if view is not leaf:
        for user in users:
            user.replace_input_with(leaf, view)


def named_tensor(module: torch.nn.Module, path: str) -> torch.Tensor | None:
    """Return the tensor at a dotted path; None if there is none."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) else None


def _checked_masks(coupling: Coupling, removed: Removed) -> Masks:
    """Return what each axis keeps.

    Raises:
        ModelError: A class cannot be removed, or an axis would become empty.
    """
    _check(coupling, removed)
    masks = keep_masks(coupling, removed)
    for key, axis in empty_axes(masks):
        raise ModelError(
            f"the cut would leave nothing of axis {axis} of {key}", hint="keep at least one class, or call `repair`"
        )
    return masks


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


def _rewrite(old: Node, new: Node, module: Graphed, coupling: Coupling, masks: Masks, values: dict[str, Any]) -> None:
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
