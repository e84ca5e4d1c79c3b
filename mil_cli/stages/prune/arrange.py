"""Independent choices inside groups and heads: what matters least in each of them is moved to the same places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mil_cli.graph.coupling import Coupling, arrange, entry_spaces, find_rows

if TYPE_CHECKING:
    from mil_cli.graph.coupling.equivalence import Call
    from mil_cli.graph.model import Model
    from mil_cli.stages.prune.selection import Scores

Importance = Callable[["Model", Coupling], "Scores"]
"""Scores of a model's classes, by space."""


def arranged(
    model: Model, coupling: Coupling, importance: Importance, calls: Iterable[Call]
) -> tuple[Model, Scores, list[int]]:
    """Permute the channels of each convolution group, and of each head, by importance, and score all classes.

    A cut takes the same places from every group. Once each group has its channels in order, those are the channels
    that matter least in that group, whichever they were.

    Args:
        model: The model; not changed.
        coupling: Its analysis, which holds for what is returned too.
        importance: Scores of a model's classes.
        calls: Inputs, as (args, kwargs), on which the outputs are compared.

    Returns:
        The model, which computes the same; the scores by space, those of a class in groups being the mean over what
        the groups have at its place; and the spaces that were arranged.
    """
    rows = find_rows(coupling)
    spaces = tuple(entry_spaces(coupling, rows))
    scores = list(importance(model, replace(coupling, spaces=(*coupling.spaces, *spaces))))
    scores, single = scores[: len(coupling.spaces)], scores[len(coupling.spaces) :]
    by_row = {number: entries[rows[number].entries] for number, entries in zip(rows, single, strict=True)}
    by_row = {number: lines for number, lines in by_row.items() if not np.isnan(lines).any()}
    if not by_row:
        return model, scores, []
    orders = {number: np.argsort(lines, axis=1, kind="stable") for number, lines in by_row.items()}
    result = model.clone()
    done = arrange(result.graph, coupling, {number: rows[number] for number in orders}, orders, calls)
    for number in done:
        free = list(coupling.spaces[number].free)
        sorted_ = np.sort(by_row[number], axis=1).mean(axis=0)
        # single entries may score on another scale than whole classes, which other spaces are compared by
        scale = scores[number][free].mean() / sorted_.mean() if sorted_.mean() > 0 else 1.0
        scores[number] = scores[number].copy()
        scores[number][free] = sorted_ * scale
    return result, scores, done
