"""Rewriting positions that a node holds as constants: slices, splits, selected entries, shifts, indices, padding."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.fx import Node

from mil_cli.graph.coupling.rewrites.edit import Edit, Rewrite
from mil_cli.graph.coupling.selection import Mask
from mil_cli.graph.nodes import get_argument

aten = torch.ops.aten

SPLITS = (
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
)


def _data(edit: Edit) -> tuple[str, Node]:
    """Return the key of the first argument before the cut, and the node that gives it after."""
    first = edit.old.args[0]
    assert isinstance(first, Node)
    after = edit.new.args[0]
    assert isinstance(after, Node)
    return edit.recording.key(first), after


def split(edit: Edit) -> None:
    """Give every part the number of entries that it keeps."""
    key, data = _data(edit)
    axis = edit.axis(key, edit.value("dim", 0))
    if edit.mask(key, axis) is not None:
        sizes = [edit.kept(part, axis) for part in edit.recording.outputs[edit.old.name]]
        edit.replace_target(aten.split_with_sizes.default, data, sizes, axis)


def slice_(edit: Edit) -> None:
    """Move the borders by what is cut before them; with a step, gather what is left."""
    key, data = _data(edit)
    axis = edit.axis(key, edit.value("dim", 0))
    mask = edit.mask(key, axis)
    if mask is None:
        return
    start, end, step = edit.value("start") or 0, edit.value("end"), edit.value("step", 1)
    end = sys.maxsize if end is None else end
    if step == 1:
        edit.replace_target(aten.slice.Tensor, data, axis, _border(mask, start), _border(mask, end), 1)
        return
    kept = np.flatnonzero(mask)
    chosen = np.flatnonzero(np.isin(kept, np.arange(len(mask))[start:end:step]))
    edit.replace_target(aten.index_select.default, data, axis, edit.constant(chosen))


def _border(mask: Mask, position: int) -> int:
    """Return where a border of a slice is among the kept entries, counted from the side that it was counted from.

    An axis into which samples are folded is longer in a larger batch than the mask is.
    """
    if position >= len(mask):
        return position  # the end, wherever that is
    if position >= 0:
        return int(mask[:position].sum())
    return -int(mask[position:].sum()) or sys.maxsize


def narrow(edit: Edit) -> None:
    """Move the start and the length by what is cut."""
    key, _ = _data(edit)
    mask = edit.mask(key, edit.axis(key, edit.value("dim")))
    if mask is not None:
        start = edit.value("start") % len(mask)
        edit.set("start", int(mask[:start].sum()))
        edit.set("length", int(mask[start : start + edit.value("length")].sum()))


def select(edit: Edit) -> None:
    """Move the selected position by what is cut before it."""
    key, _ = _data(edit)
    mask = edit.mask(key, edit.axis(key, edit.value("dim")))
    if mask is not None:
        edit.set("index", _border(mask, edit.value("index")))


def roll(edit: Edit) -> None:
    """Shift by the entries that are left of those that went round the end."""
    key, _ = _data(edit)
    shifts = list(edit.value("shifts"))
    changed = False
    for number, axis in enumerate(edit.value("dims", [])):
        mask = edit.mask(key, edit.axis(key, axis))
        if mask is not None:
            around = shifts[number] % len(mask)
            shifts[number] = int(mask[len(mask) - around :].sum()) if around else 0
            changed = True
    if changed:
        edit.set("shifts", shifts)


def index_select(edit: Edit) -> None:
    """Renumber the constant index, and drop the gathered entries that are cut."""
    key, data = _data(edit)
    axis = edit.axis(key, edit.value("dim"))
    mask, kept = edit.mask(key, axis), edit.mask(edit.output, axis)
    if mask is None and kept is None:
        return
    index = np.atleast_1d(edit.value("index").numpy())
    index = index if kept is None else index[kept]
    renumbered = index if mask is None else (np.cumsum(mask) - 1)[index]
    edit.replace_target(aten.index_select.default, data, axis, edit.constant(renumbered))


def pad(edit: Edit) -> None:
    """Keep as much padding as the masks leave before and after the data, and crop as much as they leave to crop."""
    key, _ = _data(edit)
    name = "pad" if edit.has("pad") else "padding"
    rank = len(edit.shape(key))
    widths, given = list(get_argument(edit.new, name)), edit.value(name)
    for axis, size in enumerate(edit.shape(key)):
        at = (rank - 1 - axis) * 2
        if at + 1 < len(given) and (edit.mask(key, axis) is not None or edit.mask(edit.output, axis) is not None):
            before, after = given[at], given[at + 1]
            cropped = _or_all(edit.mask(key, axis), size)
            padded = _or_all(edit.mask(edit.output, axis), size + before + after)
            widths[at] = int(padded[:before].sum()) if before > 0 else -int(cropped[:-before].sum())
            widths[at + 1] = int(padded[before + size :].sum()) if after > 0 else -int(cropped[size + after :].sum())
    if edit.touched(key) or edit.touched(edit.output):
        edit.set(name, widths)


def _or_all(mask: Mask | None, size: int) -> Mask:
    return np.ones(size, dtype=bool) if mask is None else mask


REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(SPLITS, split),
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "roll": roll,
    "index_select": index_select,
    "pad": pad,
    "constant_pad_nd": pad,
}
