"""Choosing what to remove: chunks that keep widths on a multiple, ranked over the whole model, down to a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mil_cli.graph.coupling import Coupling, Space, repair, step_of

Scores = Sequence[NDArray[np.float64]]
"""By space: the importance of each class. Comparable between spaces: a space's mean is about 1."""


@dataclass(frozen=True)
class Chunk:
    """Classes of one space that are removed together, so that the width lands on a multiple.

    Attributes:
        score: Their mean importance.
        space: Index of the space.
        position: Its place among the space's chunks; they go in this order.
        classes: The classes.
    """

    score: float
    space: int
    position: int
    classes: tuple[int, ...]


def chunks_of(number: int, space: Space, scores: NDArray[np.float64], *, step: int, least: int) -> list[Chunk]:
    """Divide a space's free classes, the least important first, so that each prefix leaves a multiple of `step`.

    Args:
        number: Index of the space.
        space: The space.
        scores: Importance by class.
        step: What the number of classes kept is a multiple of.
        least: Fewest classes to keep.
    """
    order = sorted(space.free, key=lambda label: (float(scores[label]), label))
    fewest = max(least, len(space.frozen), 1)
    widths = [width for width in range(space.size - 1, fewest - 1, -1) if width % step == 0]
    chunks, start = [], 0
    for position, width in enumerate(widths):
        end = space.size - width
        classes = tuple(order[start:end])
        chunks.append(Chunk(float(np.mean(scores[list(classes)])), number, position, classes))
        start = end
    return chunks


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        removed: By space, the classes.
        left: What is left of the quantity that the target bounds.
        reached: Whether that is at most the target.
    """

    removed: dict[int, set[int]]
    left: float
    reached: bool


def select(
    coupling: Coupling,
    scores: Scores,
    *,
    target: float,
    measure: Callable[[Mapping[int, set[int]]], float],
    multiple: int,
    least: Mapping[int, int],
    returns: int = 400,
) -> Selection:
    """Remove the least important chunks of the whole model until a quantity is at most `target`.

    The shortest sufficient prefix of the ranking is found by bisection; then what the last chunk overshot is used up by
    returning chunks, the most important first, as long as the target holds.

    Args:
        coupling: The analysis.
        scores: Importance, by space and class.
        target: Bound on what `measure` gives.
        measure: The quantity that a removal leaves: operations, parameters or channels.
        multiple: What the widths end on.
        least: By space: fewest classes to keep.
        returns: How many chunks may be tried to be returned.
    """
    chunks = sorted(
        (
            chunk
            for number, space in enumerate(coupling.spaces)
            for chunk in chunks_of(
                number, space, scores[number], step=step_of(space, multiple), least=least.get(number, 1)
            )
        ),
        key=lambda chunk: (chunk.score, chunk.space, chunk.position),
    )

    def removal(chosen: Sequence[Chunk]) -> dict[int, set[int]]:
        removed: dict[int, set[int]] = {}
        for chunk in chosen:
            removed.setdefault(chunk.space, set()).update(chunk.classes)
        return removed

    low, high = 0, len(chunks)
    if measure(repair(coupling, removal(chunks))) > target:
        removed = repair(coupling, removal(chunks))
        return Selection(removed, measure(removed), reached=False)
    while low < high:
        middle = (low + high) // 2
        if measure(removal(chunks[:middle])) <= target:
            high = middle
        else:
            low = middle + 1
    removed = removal(chunks[:low])
    _return_chunks(removed, chunks[:low], lambda: measure(removed) <= target, most=returns)
    removed = repair(coupling, removed)
    left = measure(removed)
    while left > target and low < len(chunks):  # repair gave something back
        low += 1
        removed = repair(coupling, removal(chunks[:low]))
        left = measure(removed)
    return Selection(removed, left, reached=left <= target)


def _return_chunks(
    removed: dict[int, set[int]], chosen: Sequence[Chunk], holds: Callable[[], bool], *, most: int
) -> None:
    """Take chunks out of `removed` that may stay after all, trying the most important first."""
    closed: set[int] = set()
    tries = 0
    for chunk in reversed(chosen):
        if tries >= most:
            return
        if chunk.space in closed:
            continue
        tries += 1
        removed[chunk.space] -= set(chunk.classes)
        if not holds():
            removed[chunk.space] |= set(chunk.classes)
            closed.add(chunk.space)  # what goes before it in the same space cannot stay without it


def least_classes(coupling: Coupling, original: Mapping[str, Sequence[int]], *, max_per_layer: float) -> dict[int, int]:
    """Return, by space, the fewest classes to keep so that no layer loses more than a part of its first width.

    Args:
        coupling: The analysis of the model as it is now.
        original: Shapes of the parameters by name before the first step.
        max_per_layer: Largest part of a width that may go.
    """
    return {
        number: math.ceil(_first_size(space, original) * (1 - max_per_layer) - 1e-9)
        for number, space in enumerate(coupling.spaces)
    }


def _first_size(space: Space, original: Mapping[str, Sequence[int]]) -> float:
    """Return how many classes the space had before the first step, from the widest growth among its whole axes."""
    sizes = [
        space.size * original[member.parameter][member.axis] / len(member.classes)
        for member in space.members
        if member.parameter in original and bool((member.classes >= 0).all())
    ]
    return max(sizes, default=float(space.size))


def describe_widths(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Return, for each weight whose shape changed, its name and both shapes; JSON-able."""
    return [
        {"parameter": name, "before": list(before[name]), "after": list(shape)}
        for name, shape in after.items()
        if name in before and len(shape) > 1 and tuple(before[name]) != tuple(shape)
    ]


def by_space(removed: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
    """Return removed classes in the form that a checkpoint keeps."""
    return {number: sorted(classes) for number, classes in removed.items()}
