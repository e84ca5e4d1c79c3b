"""Rewriting sizes, counts and scales that a node holds as constants."""

from __future__ import annotations

import math

import torch

from mil_cli.graph.coupling.rewrites.edit import Edit, Rewrite
from mil_cli.graph.nodes import get_argument

SIZED = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), ("size", "shape")),
    **dict.fromkeys(
        ("zeros", "ones", "full", "empty", "randn", "rand", "new_zeros", "new_ones", "new_full", "new_empty"), ("size",)
    ),
}
"""Op -> the possible names of its size argument."""


def size(edit: Edit) -> None:
    """Give every axis that is cut its new size."""
    if not edit.touched(edit.output):
        return
    name = next(name for name in SIZED[edit.name] if edit.has(name))
    old, new = edit.argument(name), get_argument(edit.new, name)
    edit.set(
        name,
        [
            edit.resized(before, after, edit.kept(edit.output, axis))
            if edit.mask(edit.output, axis) is not None
            else after
            for axis, (before, after) in enumerate(zip(old, new, strict=True))
        ],
    )


def copies(edit: Edit) -> None:
    """Make as many copies of a single entry as the masks leave; of several entries each copy is cut alike."""
    name = "repeats" if edit.has("repeats") else "dims"
    old, new = edit.argument(name), list(get_argument(edit.new, name))
    shape, rank = edit.shape(edit.key("self")), len(edit.shape(edit.output))
    for axis in edit.masks.get(edit.output, {}):
        position, source = axis - rank + len(old), axis - rank + len(shape)
        if position >= 0 and (source < 0 or shape[source] == 1):
            new[position] = edit.resized(old[position], new[position], edit.kept(edit.output, axis))
    if edit.touched(edit.output):
        edit.set(name, new)


def unflatten(edit: Edit) -> None:
    """Give the parts of the divided axis their new sizes."""
    if not edit.touched(edit.output):
        return
    first = edit.axis(edit.key("self"), edit.argument("dim"))
    old, new = edit.argument("sizes"), get_argument(edit.new, "sizes")
    edit.set(
        "sizes",
        [
            edit.resized(before, after, edit.kept(edit.output, first + part))
            for part, (before, after) in enumerate(zip(old, new, strict=True))
        ],
    )


def squeeze(edit: Edit) -> None:
    """Squeeze the axes that had size 1 before the cut, not those that have it since."""
    data = edit.key("self")
    shape = edit.shape(data)
    if any(shape[axis] > 1 and mask.sum() == 1 for axis, mask in edit.masks.get(data, {}).items()):
        given = edit.value("dim", range(len(shape)))
        axes = [edit.axis(data, axis) for axis in ([given] if isinstance(given, int) else given)]
        source = edit.new.args[0]
        edit.replace_target(torch.ops.aten.squeeze.dims, source, [axis for axis in axes if shape[axis] == 1])


def normalized_shape(edit: Edit) -> None:
    """Give layer norm the sizes of the axes that it normalises."""
    data = edit.key("input")
    if edit.touched(data):
        rank, count = len(edit.shape(data)), len(edit.argument("normalized_shape"))
        edit.set("normalized_shape", [edit.kept(data, axis) for axis in range(rank - count, rank)])


def group_count(edit: Edit) -> None:
    """Give group norm and grouped convolutions the number of groups that are left."""
    tag, name = ("groups", "num_groups") if edit.name == "group_norm" else ("input", "groups")
    virtual = f"{edit.old.name}~{tag}"
    if edit.mask(virtual, 0) is not None:
        groups = edit.argument(name), get_argument(edit.new, name)
        edit.set(name, edit.resized(*groups, int(edit.masks[virtual][0].sum())))


def attention_scale(edit: Edit) -> None:
    """Keep the scale of the scores where the head size that it is derived from changes."""
    query = edit.key("query")
    last = len(edit.shape(query)) - 1
    if edit.mask(query, last) is not None and edit.argument("scale") is None:
        edit.set("scale", 1.0 / math.sqrt(edit.shape(query)[last]))


REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(SIZED, size),
    "repeat": copies,
    "tile": copies,
    "unflatten": unflatten,
    "squeeze": squeeze,
    "layer_norm": normalized_shape,
    "rms_norm": normalized_shape,
    "_fused_rms_norm": normalized_shape,
    "group_norm": group_count,
    **dict.fromkeys(
        (*(f"conv{rank}d" for rank in (1, 2, 3)), *(f"conv_transpose{rank}d" for rank in (1, 2, 3)), "convolution"),
        group_count,
    ),
    "scaled_dot_product_attention": attention_scale,
}
