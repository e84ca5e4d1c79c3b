"""What no other is better than in everything: non-dominated fronts, and how crowded they are."""

from __future__ import annotations

import numpy as np

from mil_cli.assess.ranking import Floats
from mil_cli.assess.table import Bools, Ints


def fronts(points: Floats) -> list[Ints]:
    """Return the rows of points by front: the first are those that none dominates, the next those that only they do.

    Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", section III A.

    Args:
        points: Shape (points, objectives); smaller is better.
    """
    dominates = _domination(points)
    dominated_by = dominates.sum(axis=0)
    found: list[Ints] = []
    left = np.ones(len(points), dtype=bool)
    while left.any():
        front = np.flatnonzero(left & (dominated_by == 0))
        found.append(front)
        left[front] = False
        dominated_by = dominated_by - dominates[front].sum(axis=0)
    return found


def crowding(points: Floats) -> Floats:
    """Return how far the neighbours of each point of a front are apart, shape (points,); infinite at its ends.

    The same paper, section III B: the sum over objectives of the distance between the neighbours on either side, as a
    share of the front's extent.

    Args:
        points: Those of one front, shape (points, objectives).
    """
    distances = np.zeros(len(points))
    for column in finite(points).T:
        order = np.argsort(column, kind="stable")
        extent = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if extent > 0:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / extent
    return distances


def finite(points: Floats) -> Floats:
    """Return points with what is infinite put just beyond what is the largest of its objective."""
    known = np.where(np.isfinite(points), points, -np.inf)
    largest = np.maximum.reduce(known, axis=0, initial=-np.inf)
    beyond = np.where(np.isfinite(largest), largest + 1.0, 0.0)
    return np.where(np.isfinite(points), points, beyond)


def _domination(points: Floats) -> Bools:
    """Return whether a row dominates a column: nowhere worse, and somewhere better."""
    better: Bools = np.logical_or.reduce(points[:, None] < points[None], axis=-1)
    return better & ~better.T
