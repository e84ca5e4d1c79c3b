"""Choosing one of several choices on every axis: the smallest sum of losses for which enough is saved."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

Values = Sequence[NDArray[np.float64]]
"""By axis: one number for each of its choices."""

_MOST_NODES = 10_000
"""Nodes of the search tree: what is asked here is solved in a few; a freak case must not hang."""


def choose(
    losses: Values, savings: Values, needed: float, limits: Sequence[tuple[Sequence[int], int]] = ()
) -> tuple[int, ...] | None:
    """Return by axis the choice of the integer programme, or None if nothing was found that saves enough.

    It minimises the sum of the losses of what is chosen, subject to its savings adding up to `needed` at least. Shen et
    al. 2022, "Structural Pruning via Latency-Saliency Knapsack" (HALP), choose channels so for a latency. After 10,000
    nodes of the search tree the best so far is taken.

    Args:
        losses: What each choice costs; one that is not finite is never taken.
        savings: What each choice saves.
        needed: What must be saved.
        limits: Axes of two choices, and of how many of them the second one may be taken.
    """
    sizes = [len(axis) for axis in losses]
    ends = np.cumsum([0, *sizes])
    loss, saving = np.concatenate(list(losses)), np.concatenate(list(savings))
    allowed = np.isfinite(loss)
    loss = np.where(allowed, loss, 0.0)
    unit = float(np.abs(saving).max()) or 1.0  # seconds may be fewer than the solver tells from 0
    one = lil_array((len(sizes), len(loss)))
    for axis, (start, end) in enumerate(pairwise(ends)):
        one[axis, start:end] = 1
    constraints = [LinearConstraint(one.tocsr(), 1, 1), LinearConstraint(saving[None, :] / unit, needed / unit, np.inf)]
    for axes, most in limits:
        second = np.zeros((1, len(loss)))
        second[0, [ends[axis] + 1 for axis in axes]] = 1
        constraints.append(LinearConstraint(second, -np.inf, most))
    scale = float(np.abs(loss).max()) or 1.0
    result = milp(
        loss / scale,
        integrality=np.ones(len(loss), dtype=np.int64),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=constraints,
        options={"mip_rel_gap": 0.0, "node_limit": _MOST_NODES},
    )
    if result.x is None:
        return None
    return tuple(int(np.argmax(result.x[start:end])) for start, end in pairwise(ends))
