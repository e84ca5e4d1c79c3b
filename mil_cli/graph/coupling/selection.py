"""From removed classes to keep masks per axis, and giving classes back where an axis would become empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from mil_cli.graph.coupling.coupling import Coupling, Removed, Space
from mil_cli.graph.coupling.record import Key

Mask = NDArray[np.bool_]
Masks = dict[Key, dict[int, Mask]]


def step_of(space: Space, multiple: int) -> int:
    """Return how many classes of a space go at a time, so that the narrowest of its axes loses whole multiples."""
    return multiple // math.gcd(multiple, space.entries_per_class)


def keep_masks(coupling: Coupling, removed: Removed) -> Masks:
    """Return, for every axis that loses entries, which it keeps: those that no space removes.

    Args:
        coupling: The analysis.
        removed: By space, the classes to remove.
    """
    masks: Masks = {}
    for number, classes in removed.items():
        space = coupling.spaces[number]
        gone = np.zeros(space.size + 1, dtype=bool)  # the last entry stands for no class
        gone[list(classes)] = True
        gone[-1] = False
        if not gone.any():
            continue
        for key, axes in space.labels.items():
            for axis, labels in axes.items():
                lost = gone[labels]
                if lost.any():
                    axis_masks = masks.setdefault(key, {})
                    axis_masks[axis] = axis_masks[axis] & ~lost if axis in axis_masks else ~lost
    return masks


def repair(coupling: Coupling, removed: Removed) -> dict[int, set[int]]:
    """Return `removed` with classes given back until no axis of any tensor would become empty.

    Each space may keep a class and a tensor still lose all: a part of a split, or an axis that two spaces share.
    Frozen classes are taken out as well.
    """
    allowed = {number: set(classes) - set(coupling.spaces[number].frozen) for number, classes in removed.items()}
    for key, axes in keep_masks(coupling, allowed).items():
        for axis, mask in axes.items():
            if mask.any():
                continue
            on_axis = {
                number: coupling.spaces[number].labels[key][axis]
                for number in allowed
                if axis in coupling.spaces[number].labels.get(key, {})
            }
            gone = np.zeros(len(mask), dtype=int)
            for number, labels in on_axis.items():
                gone += np.isin(labels, list(allowed[number]))
            if not (gone > 0).all():
                continue  # an entry came back with another axis
            index = int(gone.argmin())
            for number, labels in on_axis.items():
                allowed[number].discard(int(labels[index]))
    return {number: classes for number, classes in allowed.items() if classes}


def kept_count(masks: Mapping[Key, Mapping[int, Mask]], key: Key, axis: int, size: int) -> int:
    """Return how many of the `size` entries of an axis are kept."""
    mask = masks.get(key, {}).get(axis)
    return size if mask is None else int(mask.sum())


def empty_axes(masks: Masks) -> Iterable[tuple[Key, int]]:
    """Yield the axes that would keep nothing."""
    for key, axes in masks.items():
        for axis, mask in axes.items():
            if not mask.any():
                yield key, axis
